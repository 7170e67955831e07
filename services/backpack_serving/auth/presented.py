"""What a call presents to say who is calling: a bearer token, or a verified client certificate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from backpack_serving.errors import Unauthenticated


class Call(Protocol):
    """What is needed of grpc's context."""

    def invocation_metadata(self) -> Any: ...
    def auth_context(self) -> Mapping[str, Any]: ...


def bearer(call: Call) -> str | None:
    """The token of `authorization: Bearer …`, None without one. Raises Unauthenticated if it is something else."""
    value = dict(call.invocation_metadata() or ()).get("authorization")
    if value is None:
        return None
    scheme, _, token = str(value).partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("NO_CREDENTIAL", "the metadata `authorization` must be `Bearer <key>`")
    return token.strip()


def certificate_names(call: Call) -> tuple[str, ...]:
    """The alternative names of the client's certificate, which was verified; none without one."""
    return tuple(name.decode() for name in call.auth_context().get("x509_subject_alternative_name", ()))
