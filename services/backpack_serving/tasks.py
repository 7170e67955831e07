"""Cancelling tasks for certain, shielding work from cancellation, waiting with a limit, work in slices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until they have ended, and forget what they raise.

    Once isn't enough: a cancellation that comes together with a result is lost in `asyncio.wait_for` of Python
    3.11, and in gRPC if the result is an error.
    """
    while waiting := [task for task in tasks if not task.done()]:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=1)
    await asyncio.gather(*tasks, return_exceptions=True)


async def first(*waits: Coroutine[Any, Any, Any]) -> None:
    """Wait until one of these has ended, and end the others. Raises what it raised."""
    running = [asyncio.create_task(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await end(*running)


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run this to its end, also if whoever waits for it is cancelled: the cancellation is raised afterwards."""
    running, cancelled = asyncio.ensure_future(work), None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return running.result()
    running.exception()  # it was looked at: nobody is warned that it wasn't
    raise cancelled


async def in_slices(work: Callable[[S], T], items: Iterable[S], size: int = 100) -> list[T]:
    """The results of some work on each item, so many in one turn of the loop."""
    results = []
    for number, item in enumerate(items, 1):
        results.append(work(item))
        if number % size == 0:
            await asyncio.sleep(0)
    return results


async def wait_at_most(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, `seconds` at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
