"""Verifies JSON Web Tokens of an OpenID Connect issuer.

The issuer's keys come from its JWKS. They are fetched again when a token names an unknown key, but at most every
`READ_AGAIN` seconds, so that a stranger's tokens cannot flood the issuer. Keys that the issuer dropped disappear
within `KEEP` seconds; while the issuer is unreachable, the last keys remain valid.
"""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
import structlog
from backpack_lm import strict_json

from backpack_serving import proxies
from backpack_serving.errors import Unauthenticated, Unavailable

log = structlog.get_logger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Asymmetric signatures only: a shared secret would let every verifier forge tokens."""

LEEWAY = 30
"""Allowed difference between the issuer's clock and ours, in seconds."""

READ_AGAIN, KEEP = 5.0, 600.0
"""Seconds between two fetches: at least, for an unknown key; at most, in any case."""

PATIENCE = 1.0
"""Longest wait of a token with a known key for a fetch in progress, in seconds."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """An accepted issuer, the audience of its tokens, and the claims with tenant and roles.

    `keys` locates the JWKS, as an https URL or a file; by default the issuer's discovery document does.
    """

    url: str
    audience: str
    keys: str = ""
    tenant_claim: str = "tenant"
    roles_claim: str = "roles"

    def check(self) -> None:
        """Raise ValueError unless the keys come over https, from this machine, or from a file."""
        if not self.audience:
            raise ValueError("BACKPACK_JWT_AUDIENCE isn't set: tokens made for other services would be taken")
        if not self.keys or urlsplit(self.keys).scheme:
            _check_unforged(self.keys or self.url)

    def read(self) -> dict[str, jwt.PyJWK]:
        """Fetch the keys, by id. Blocks. Raises OSError, HTTPException or ValueError if that fails."""
        where = self.keys
        if not where:
            where = str(_fetch_url(self.url.rstrip("/") + "/.well-known/openid-configuration")["jwks_uri"])
            _check_unforged(where)
        found = _fetch_url(where) if urlsplit(where).scheme else strict_json.read(Path(where))
        keys = (_parse_jwk(values) for values in found["keys"] if values.get("use", "sig") == "sig")
        return {key.key_id: key for key in keys if key is not None and key.key_id}


@dataclass(frozen=True, slots=True)
class Claims:
    """The claims of a valid token."""

    subject: str
    tenant: str
    roles: tuple[str, ...]


class TokenVerifier:
    """Verifies tokens of one issuer."""

    def __init__(self, issuer: Issuer, clock: Callable[[], float] = time.monotonic) -> None:
        issuer.check()
        self._issuer, self._clock = issuer, clock
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._tried = self._read = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def read(self, token: str) -> Claims:
        """Verify a token. Raises Unauthenticated if it is invalid, Unavailable if no keys can be fetched."""
        issuer = self._issuer
        try:
            name = jwt.get_unverified_header(token).get("kid", "")
            key = await self._key_named(str(name))
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                audience=issuer.audience,
                issuer=issuer.url,
                leeway=LEEWAY,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("EXPIRED_TOKEN", "the token has expired; ask the issuer for a new one") from None
        except jwt.PyJWTError as error:
            raise Unauthenticated("BAD_TOKEN", f"the token isn't good here: {error}") from None
        tenant, roles = claims.get(issuer.tenant_claim), claims.get(issuer.roles_claim, ())
        if not isinstance(tenant, str) or not tenant:
            raise Unauthenticated("NO_TENANT", f"the token's claim {issuer.tenant_claim!r} names no tenant")
        if isinstance(roles, str):
            roles = roles.split()
        if not isinstance(roles, (list, tuple)):
            raise Unauthenticated("BAD_ROLES", f"the token's claim {issuer.roles_claim!r} is no list of roles")
        subject = str(claims["sub"])
        try:
            (tenant + subject).encode()  # JSON may hold a lone surrogate, which no log or header can
        except UnicodeEncodeError:
            raise Unauthenticated("BAD_TOKEN", "the token isn't good here: half a character in a name") from None
        return Claims(subject, tenant, tuple(map(str, roles)))

    async def _key_named(self, name: str) -> jwt.PyJWK:
        if due := self._refresh_due(name):
            self._tried = self._clock()
            self._reading = asyncio.create_task(self._read_keys())
        if self._reading and (due or name not in self._keys):
            # The fetch is a task of its own: a caller that is cancelled doesn't cancel it for the others.
            await asyncio.wait([self._reading], timeout=PATIENCE if name in self._keys else None)
        if found := self._keys.get(name):
            return found
        if not self._keys:
            raise Unavailable("NO_ISSUER", f"the keys of {self._issuer.url} can't be had now", retry_after=READ_AGAIN)
        raise jwt.InvalidTokenError(f"{self._issuer.url} has no key {name!r}")

    def _refresh_due(self, name: str) -> bool:
        """Whether to fetch the keys again."""
        if self._reading and not self._reading.done():
            return False
        now = self._clock()
        due = name not in self._keys or now - self._read > KEEP
        return due and now - self._tried > READ_AGAIN

    async def _read_keys(self) -> None:
        try:
            self._keys = await asyncio.to_thread(self._issuer.read)
            self._read = self._clock()
        except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
            log.error("the issuer's keys can't be read", issuer=self._issuer.url, reason=repr(error))


def _check_unforged(url: str) -> None:
    """Raise ValueError unless the URL is https or on this machine, where nobody can alter the content."""
    parts = urlsplit(url)
    here = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")
    if not (parts.scheme == "https" or here):
        raise ValueError(f"{url}: keys are read over https, or from a file (BACKPACK_JWT_KEYS)")


class _Unforged(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *moved: Any) -> urllib.request.Request | None:
        _check_unforged(moved[-1])
        return super().redirect_request(*moved)


def _fetch_url(url: str) -> Any:
    way = proxies.ProxyElsewhere()
    try:
        with urllib.request.build_opener(_Unforged, way).open(url, timeout=5) as answer:
            return strict_json.parse(answer.read(2**20))
    except OSError as error:
        if way.used is None:
            raise
        raise OSError(f"{url} through {way.used}: {error}") from None


def _parse_jwk(values: dict[str, Any]) -> jwt.PyJWK | None:
    """Parse a key of a set; None for a type that we don't accept."""
    if values.get("kty") == "oct":
        return None
    try:
        return jwt.PyJWK(values)
    except jwt.PyJWTError:
        return None
