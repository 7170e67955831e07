"""Computes the denominators of topic scores beside the engine, when a topic is first needed."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress

import structlog
from backpack_lm.denominators import ProgressLog
from backpack_lm.overlay import SenseTable

from backpack_serving.errors import TOPICS_NOT_READY, Unavailable
from backpack_serving.starting import blocking

log = structlog.get_logger(__name__)

NICE = 19
"""Niceness of the thread; the engine's threads have priority."""

LONGEST_PAUSE = 60.0
"""Longest `retry_after` of a refusal, in seconds."""


class _Stopped(Exception):
    """Ends the computation when the replica stops."""


class Denominators:
    """The denominators of one table. One thread computes them for all waiters; a restart resumes where it stopped."""

    def __init__(self, table: SenseTable) -> None:
        self._table = table
        self._progress_log = ProgressLog()
        self._making: asyncio.Task[None] | None = None
        self._stopped = threading.Event()

    @property
    def ready(self) -> bool:
        return self._table.measured

    @property
    def computing(self) -> bool:
        """Whether the thread runs that computes them."""
        return self._making is not None and not self._making.done()

    async def wait(self) -> None:
        """Wait until they are computed. Raises the error of the computation, or Unavailable if the replica stops."""
        if self.ready:
            return
        if self._making is None or self._making.done():
            self._progress_log = ProgressLog()
            self._making = asyncio.create_task(blocking(self._measure))
            # Asking for the exception keeps asyncio from logging it, if nobody waits.
            self._making.add_done_callback(lambda made: made.cancelled() or made.exception())
        try:
            await asyncio.shield(self._making)  # cancelling one waiter must not cancel the others
        except _Stopped:
            message = "this replica stops before it has computed the denominators of topics; try again"
            raise Unavailable(TOPICS_NOT_READY, message, retry_after=1.0) from None

    def stop(self) -> None:
        """Stop the thread after its current block."""
        self._stopped.set()

    def refusal(self) -> Unavailable:
        """The error for a request whose deadline is too short to wait."""
        left = self._progress_log.seconds_left
        how_long = "" if left is None else f", about {left:.0f} s more"
        return Unavailable(
            TOPICS_NOT_READY,
            "topic scores aren't ready: this replica is computing their denominators (once per model)"
            f"{how_long}; try again later, or call with a longer deadline",
            retry_after=min(LONGEST_PAUSE, max(1.0, left or 1.0)),
        )

    # ---- in the thread

    def _measure(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        self._table.measure(self._progress)

    def _progress(self, done: int, of: int) -> None:
        if self._stopped.is_set():
            raise _Stopped
        self._progress_log(done, of)
