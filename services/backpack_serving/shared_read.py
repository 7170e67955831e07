"""One read for all who ask for it at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SharedRead(Generic[T]):
    """Each caller gets the result of a read that began after it had asked, so it is never older than a read of its own.

    One read runs at a time; those who ask meanwhile share the next one.
    """

    def __init__(self, read: Callable[[], Awaitable[T]]) -> None:
        self._read = read
        self._running: asyncio.Task[T] | None = None
        self._next: asyncio.Task[T] | None = None

    @property
    def idle(self) -> bool:
        return self._next is None and (self._running is None or self._running.done())

    async def get(self) -> T:
        """Raises what the read raises. A caller that goes away doesn't end the others' read."""
        if self._next is None:
            self._next = asyncio.create_task(self._run_read(self._running))
            self._next.add_done_callback(_retrieve)
        return await asyncio.shield(self._next)

    async def _run_read(self, before: asyncio.Task[T] | None) -> T:
        if before is not None and not before.done():
            await asyncio.wait([before])
        self._running, self._next = self._next, None  # whoever asks from now on waits for another one
        return await self._read()


def _retrieve(task: asyncio.Task[T]) -> None:
    """Or asyncio logs an error that all who asked have left before."""
    if not task.cancelled():
        task.exception()
