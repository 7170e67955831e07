"""What travels beside a message: who calls, and for which request."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

import structlog

from backpack_serving.errors import Unauthenticated

REQUEST_ID = "x-request-id"
WHY = "backpack-why"
"""Metadata of a health check's answer: why something doesn't serve."""

_WORD = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class Context(Protocol):
    """What a servicer needs of grpc's context. `time_remaining` is in seconds, None without a deadline."""

    def invocation_metadata(self) -> Any: ...
    def time_remaining(self) -> float | None: ...
    def auth_context(self) -> Mapping[str, Any]: ...
    async def send_initial_metadata(self, initial_metadata: Any) -> None: ...


def metadata(context: Context) -> Mapping[str, str | bytes]:
    """The caller's metadata; of a repeated name, the last."""
    return dict(context.invocation_metadata() or ())


def identify(known: Mapping[str, str | bytes]) -> str:
    """The request's id: the caller's `x-request-id` if it is a plain word, else a new one."""
    given = known.get(REQUEST_ID, "")
    return given if isinstance(given, str) and _WORD.fullmatch(given) else uuid.uuid4().hex


def with_request_id() -> tuple[tuple[str, str], ...]:
    """The metadata that carries on the id of the request that is being answered."""
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    return ((REQUEST_ID, request_id),) if request_id else ()


def with_key(key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that carries an API key, or a token. Raises Unauthenticated if no metadata can."""
    key = (key or "").strip()  # of a file it may have the end of its line
    if not (key.isascii() and key.isprintable()):
        # Not repeated: the rest of it may be a secret.
        raise Unauthenticated("MALFORMED_KEY", "a key or token is one line of plain ASCII; copy it whole")
    return (("authorization", f"Bearer {key}"),) if key else ()
