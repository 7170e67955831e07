"""Drain: lets a cancelled call find out whether its own server's drain cancelled it."""

from __future__ import annotations

import asyncio
from collections.abc import Set
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from backpack_serving.errors import ServiceError, Unavailable

ended: ContextVar[Set[asyncio.Task[Any]]] = ContextVar("ended", default=frozenset())
"""Calls that a drain has cancelled, of the server that runs this call."""


def drained() -> bool:
    """Whether the current call was cancelled by our own drain, not by its caller."""
    return asyncio.current_task() in ended.get()


def draining() -> ServiceError:
    """The error of calls to a server that is stopping."""
    return Unavailable("DRAINING", "this server is stopping; another one will answer", retry_after=0.1)


async def wait_at_most(idle: asyncio.Event, seconds: float) -> None:
    """Wait until nothing runs, for at most so many seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await idle.wait()
