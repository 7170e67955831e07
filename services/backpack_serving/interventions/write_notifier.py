"""Wakes tasks after a write of the store."""

from __future__ import annotations

import asyncio


class WriteNotifier:
    """Wakes all tasks that wait for the next write. `notify` may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._next = asyncio.Event()

    def notify(self) -> None:
        self._loop.call_soon_threadsafe(self.notify_now)

    def next_write(self) -> asyncio.Event:
        """An event that the next write sets. Take it before reading the store, and wait for it afterwards."""
        return self._next

    def notify_now(self) -> None:
        """Notify at once, from the event loop itself."""
        done, self._next = self._next, asyncio.Event()
        done.set()
