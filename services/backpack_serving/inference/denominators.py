"""The denominators of topic scores, computed beside the engine when a topic is first wanted."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress

import structlog
from backpack_lm.denominators import Told
from backpack_lm.overlay import SenseTable

from backpack_serving.errors import TOPICS_NOT_READY, Unavailable

log = structlog.get_logger(__name__)

NICE = 19
"""The engine's threads go first."""

LONGEST_PAUSE = 60.0
"""Seconds, at most, after which whoever was refused is told to try again."""


class _Stopped(Exception):
    """The replica ends."""


class Denominators:
    """Those of one table. All who want them wait for one thread; if that is stopped, the next start goes on."""

    def __init__(self, table: SenseTable) -> None:
        self._table = table
        self._told = Told()
        self._making: asyncio.Future[None] | None = None
        self._stopped = threading.Event()

    @property
    def ready(self) -> bool:
        return self._table.measured

    @property
    def computing(self) -> bool:
        """Whether the thread runs that computes them."""
        return self._making is not None and not self._making.done()

    async def wait(self) -> None:
        """Until they are there. Raises what computing them raised, Unavailable if the replica ends before."""
        if self.ready:
            return
        if self._making is None or self._making.done():
            self._making = asyncio.get_running_loop().create_future()
            self._making.add_done_callback(lambda made: made.exception())  # or asyncio logs it, if nobody waits
            self._told = Told()
            arguments = asyncio.get_running_loop(), self._making
            # A thread of its own, and a daemon: the end of the process doesn't wait for it.
            threading.Thread(target=self._measure, args=arguments, name="denominators", daemon=True).start()
        try:
            await asyncio.shield(self._making)  # one who leaves must not cancel what others wait for
        except _Stopped:
            message = "this replica ends before it has computed what topics need; try again"
            raise Unavailable(TOPICS_NOT_READY, message, retry_after=1.0) from None

    def stop(self) -> None:
        """End the thread after the block that it computes."""
        self._stopped.set()

    def refusal(self) -> Unavailable:
        """What is told whoever can't wait any longer."""
        left = self._told.seconds_left
        how_long = "" if left is None else f", about {left:.0f} s more"
        return Unavailable(
            TOPICS_NOT_READY,
            "this replica computes what topics need, once for its model"
            f"{how_long}; try again then, or wait with a longer deadline",
            retry_after=min(LONGEST_PAUSE, max(1.0, left or 1.0)),
        )

    # ---- in the thread

    def _measure(self, loop: asyncio.AbstractEventLoop, making: asyncio.Future[None]) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        failure: Exception | None = None
        try:
            self._table.measure(self._progress)
        except Exception as error:
            failure = error
        with suppress(RuntimeError):  # the loop is gone
            loop.call_soon_threadsafe(_settle, making, failure)

    def _progress(self, done: int, of: int) -> None:
        if self._stopped.is_set():
            raise _Stopped
        self._told(done, of)


def _settle(making: asyncio.Future[None], failure: Exception | None) -> None:
    if making.done():
        return
    if failure:
        making.set_exception(failure)
    else:
        making.set_result(None)
