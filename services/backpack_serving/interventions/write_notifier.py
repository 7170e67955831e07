"""Wakes tasks when the store was written to."""

from __future__ import annotations

import asyncio


class WriteNotifier:
    """Wakes every task that waits for the next write. `notify` may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._next = asyncio.Event()

    def notify(self) -> None:
        self._loop.call_soon_threadsafe(self.notify_now)

    def next_write(self) -> asyncio.Event:
        """Set by the next write. Take it before reading the store, wait for it afterwards."""
        return self._next

    def notify_now(self) -> None:
        """The same from the event loop itself, without delay."""
        done, self._next = self._next, asyncio.Event()
        done.set()
