"""API keys: who calls, with which roles. A key is `bp_<id>_<secret>_<check>`.

The id finds the key, the secret has 256 bits, and the check catches typing errors before anything is looked
up. What is stored, and told to gateways, is HMAC-SHA256 of the secret under a salt of its own: a secret of 256
random bits needs no slow hash.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from backpack_serving.errors import Forbidden, Unauthenticated

SYSTEM = "system"
"""The tenant of those who operate the service. It has no patches."""

PREFIX = "bp_"
"""What every API key begins with."""

_KEY = re.compile(r"bp_([0-9a-f]{12})_([0-9a-f]{64})_([0-9a-f]{8})")


class Role(StrEnum):
    """What a credential is for. A releaser may all that an author may; else roles do not include each other."""

    ADMIN = "admin"
    AUTHOR = "author"
    RELEASER = "releaser"
    CALLER = "caller"
    REPLICA = "replica"


OPERATORS = frozenset({Role.ADMIN, Role.REPLICA})
"""Roles of the tenant `system`, and of no other; it has no other roles."""


def misplaced(roles: Iterable[Role], tenant: str) -> Role | None:
    """The first of these roles that nobody of this tenant may have."""
    return next((role for role in roles if (role in OPERATORS) != (tenant == SYSTEM)), None)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling, as their credential says: an API key, or the name in a token or a certificate."""

    tenant: str
    key: str
    roles: frozenset[Role]
    kind: str = "keys"

    @property
    def name(self) -> str:
        return f"tenants/{self.tenant}/{self.kind}/{self.key}"

    def require(self, role: Role, *others: Role) -> None:
        """Raise Forbidden unless this principal has the role, or one of the others."""
        wanted = {role, *others}
        if self.roles & wanted or (Role.AUTHOR in wanted and Role.RELEASER in self.roles):
            return
        raise Forbidden(
            "MISSING_ROLE",
            f"{self.name} has the roles {', '.join(sorted(self.roles)) or 'none'}; this needs "
            f"{' or '.join((role, *others))}",
            needed=role,
        )


@dataclass(frozen=True, slots=True)
class Holder:
    """Whom a client certificate stands for."""

    tenant: str
    roles: tuple[Role, ...]


@dataclass(frozen=True, slots=True)
class Verifier:
    """What is needed to recognise a secret, and useless for guessing it."""

    salt: bytes
    digest: bytes

    @classmethod
    def of(cls, secret: str, salt: bytes | None = None) -> Verifier:
        salt = secrets.token_bytes(16) if salt is None else salt
        return cls(salt, hmac.digest(salt, secret.encode(), "sha256"))

    def accepts(self, secret: str) -> bool:
        return hmac.compare_digest(self.digest, Verifier.of(secret, self.salt).digest)


@dataclass(frozen=True, slots=True)
class ApiKeySecret:
    """A key in clear: it exists where it is made and where it is presented, and is stored by its owner only."""

    id: str
    secret: str

    @classmethod
    def mint(cls) -> ApiKeySecret:
        return cls(secrets.token_hex(6), secrets.token_hex(32))

    @classmethod
    def parse(cls, text: str) -> ApiKeySecret:
        """Raises Unauthenticated if the text isn't a whole key. The message never repeats the text."""
        match = _KEY.fullmatch(text.strip())
        if not match or match[3] != _check_digits(match[1], match[2]):
            raise Unauthenticated(
                "MALFORMED_KEY", "not an API key of ours: a character is wrong or missing; copy it whole"
            )
        return cls(match[1], match[2])

    def __str__(self) -> str:
        return f"bp_{self.id}_{self.secret}_{_check_digits(self.id, self.secret)}"

    def __repr__(self) -> str:
        return f"ApiKey({self.id}, …)"


def unknown_key() -> Unauthenticated:
    """The refusal of a key that nobody has, or has any more."""
    return Unauthenticated("UNKNOWN_KEY", "this API key is unknown or revoked")


def suspended(tenant: str) -> Unauthenticated:
    """The refusal of whoever belongs to a suspended tenant."""
    text = f"tenants/{tenant} is suspended; ask who operates this service"
    return Unauthenticated("TENANT_SUSPENDED", text, tenant=tenant)


def write_key_file(key: str, file: Path) -> None:
    """Write a key into a file that only its owner can read; whoever reads it finds the whole key or no file.

    Raises OSError, with the file, if it can't be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.touch(mode=0o600)
        partial.write_text(f"{key}\n")
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from None  # of a disk that is full, none is told


def read_key_file(file: Path) -> str:
    """The key in a file. Bytes that are no text make it a malformed one, which is told like any other."""
    return file.read_text("utf-8", "replace").strip()


def _check_digits(key: str, secret: str) -> str:
    return f"{zlib.crc32(f'{key}_{secret}'.encode()):08x}"
