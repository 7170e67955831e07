"""SIGINT and SIGTERM of a process that starts, then serves: neither waits for what may never come."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Coroutine
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn, TypeVar

import structlog

T = TypeVar("T")

log = structlog.get_logger(__name__)

UNDOING = 3.0
"""Seconds that a start which was cancelled has to undo what it did; then the process ends all the same."""

_SHOW_CURSOR = b"\x1b[?25h"


class Stopped(Exception):
    """A signal ended the start."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} before it served")
        self.number = number

    def leave(self) -> NoReturn:
        """End the process as who was stopped by the signal does: with 128 and its number.

        Nothing is waited for: a thread may hang in a model that loads, or in a database that doesn't answer.
        """
        log.warning(str(self))
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        _leave(self.number)


class Stop:
    """Takes both signals from now on. While something starts, the first cancels it and a second ends the process
    at once; afterwards each sets `asked`.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._starting: asyncio.Task[Any] | None = None
        self._taken = 0
        # Not the loop's handlers: these run while the loop has no turn, too, as when torch is being loaded.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)

    async def start(self, work: Coroutine[Any, Any, T]) -> T:
        """What it returns. Raises Stopped if a signal comes first, else what it raises."""
        started: asyncio.Task[T] = asyncio.create_task(work)
        self._starting = started
        try:
            await asyncio.wait({started})
        finally:
            self._starting = None
        if not self._taken:
            return started.result()
        if not started.cancelled() and started.exception() is None:
            self.asked.set()  # it was there already: it is ended as what serves
            return started.result()
        raise Stopped(self._taken)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self._starting is None:
            self._loop.call_soon_threadsafe(self.asked.set)
            return
        if self._taken:
            _leave(number)
        self._taken = number
        late = threading.Thread(target=self._leave_late, args=(number,), daemon=True)
        late.start()
        self._loop.call_soon_threadsafe(self._starting.cancel)

    def _leave_late(self, number: int) -> None:
        threading.Event().wait(UNDOING)
        if not self.asked.is_set():
            _leave(number)


def end_as_first_process() -> None:
    """Let SIGTERM end this process also where it is the first of a container, whose default is to ignore it."""
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: _leave(number))


def _leave(number: int) -> NoReturn:
    if os.isatty(1):
        os.write(1, _SHOW_CURSOR)  # which a spinner hides
    os._exit(128 + number)
