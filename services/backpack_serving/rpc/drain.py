"""What a drain has ended, told to what was ended."""

from __future__ import annotations

import asyncio
from collections.abc import Set
from contextvars import ContextVar
from typing import Any

from backpack_serving.errors import ServiceError, Unavailable

ended: ContextVar[Set[asyncio.Task[Any]]] = ContextVar("ended", default=frozenset())
"""The calls that a drain has ended, of the server that runs this one."""


def drained() -> bool:
    """Whether the call that is cancelled here is one that our own drain ends, and not who called."""
    return asyncio.current_task() in ended.get()


def draining() -> ServiceError:
    """What is told to who calls a server that stops."""
    return Unavailable("DRAINING", "this server is stopping; another one will answer", retry_after=0.1)
