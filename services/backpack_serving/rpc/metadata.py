"""What travels beside a message: who calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from backpack_serving.errors import Unauthenticated


class Context(Protocol):
    """What a servicer needs of grpc's context. `time_remaining` is in seconds, None without a deadline."""

    def invocation_metadata(self) -> Any: ...
    def time_remaining(self) -> float | None: ...
    def auth_context(self) -> Mapping[str, Any]: ...
    async def send_initial_metadata(self, initial_metadata: Any) -> None: ...


def metadata(context: Context) -> Mapping[str, str | bytes]:
    """The caller's metadata; of a repeated name, the last."""
    return dict(context.invocation_metadata() or ())


def bearer(context: Context) -> str:
    """The token of `authorization: Bearer …`. Raises Unauthenticated if there is none."""
    value = metadata(context).get("authorization", "")
    scheme, _, token = str(value).partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("NO_CREDENTIAL", "no API key; send the metadata `authorization: Bearer <key>`")
    return token.strip()


def with_key(key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that carries an API key."""
    return (("authorization", f"Bearer {key}"),) if key else ()
