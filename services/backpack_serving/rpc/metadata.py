"""Metadata of calls: credentials, request ids, reasons of health checks."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

import structlog

from backpack_serving.errors import Unauthenticated

REQUEST_ID = "x-request-id"
WHY = "backpack-why"
"""Metadata key in a health check's answer: why a service doesn't serve."""

_WORD = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class Context(Protocol):
    """What a servicer needs of grpc's context. `time_remaining` is in seconds, None without a deadline."""

    def invocation_metadata(self) -> Any: ...
    def time_remaining(self) -> float | None: ...
    def auth_context(self) -> Mapping[str, Any]: ...
    async def send_initial_metadata(self, initial_metadata: Any) -> None: ...


def metadata(context: Context) -> Mapping[str, str | bytes]:
    """The caller's metadata; the last value of a repeated key."""
    return dict(context.invocation_metadata() or ())


def identify(known: Mapping[str, str | bytes]) -> str:
    """The request's id: the caller's `x-request-id` if it is a plain word, else a new one."""
    given = known.get(REQUEST_ID, "")
    return given if isinstance(given, str) and _WORD.fullmatch(given) else uuid.uuid4().hex


def with_request_id() -> tuple[tuple[str, str], ...]:
    """Metadata that passes the current request's id on."""
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    return ((REQUEST_ID, request_id),) if request_id else ()


def with_key(key: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata with an API key or a token. Raises Unauthenticated if it isn't printable ASCII."""
    key = (key or "").strip()  # a key file ends with a line break
    if not (key.isascii() and key.isprintable()):
        # Not repeated: the rest of it may be a secret.
        raise Unauthenticated("MALFORMED_KEY", "a key or token is one line of plain ASCII; copy it whole")
    return (("authorization", f"Bearer {key}"),) if key else ()
