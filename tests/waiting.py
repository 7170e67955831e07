"""Waiting for what comes by itself. On a busy machine that may take long: only what never comes fails a test.

Patience is counted in pauses, not by a clock: a machine may be suspended meanwhile.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

from backpack_serving import rpc
from backpack_serving.errors import ServiceError

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds."""

PAUSE = 0.02


async def eventually(
    check: Callable[[], T | Awaitable[T]],
    what: str = "",
    seconds: float = PATIENCE,
    passing: Collection[str] | None = None,
) -> T:
    """The first true answer of a function, which may be a coroutine's.

    A refusal meanwhile is no answer; if `passing` is given, one with another code is raised.
    """
    last: ServiceError | None = None
    for _ in range(int(seconds / PAUSE)):
        try:
            with rpc.errors():
                answer = check()
                found: T = await answer if inspect.isawaitable(answer) else answer
            if found:
                return found
        except ServiceError as error:
            if passing is not None and error.code not in passing:
                raise
            last = error
        await asyncio.sleep(PAUSE)
    raise AssertionError(f"not within {seconds:g} s: {what or check}; the last refusal: {last!r}")


def wait_until(check: Callable[[], T], what: str = "", seconds: float = PATIENCE) -> T:
    """The same without an event loop: what raises in `check` is raised."""
    for _ in range(int(seconds / PAUSE)):
        if found := check():
            return found
        time.sleep(PAUSE)
    raise AssertionError(f"not within {seconds:g} s: {what or check}")
