"""The end of the store's history in memory: each write is read once, however many readers follow it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field

from backpack_serving.errors import ServiceError
from backpack_serving.interventions.event_history import EventHistory
from backpack_serving.references import Position
from backpack_serving.shared_read import SharedRead
from backpack_serving.sync.server import HistoryPage
from backpack_serving.sync.state import StateEntry

KEPT_WRITES, KEPT_ENTRIES = 1000, 50_000
"""The last so many writes stay in memory, and of these as many as together have so many entries."""

AGAIN_SECONDS = 1.0
"""After a read that failed, and if no write is notified: a notification may get lost."""


@dataclass(frozen=True, slots=True)
class _Tail:
    """The writes from revision `after` + 1 to `head`. Replaced as a whole: threads read it while the loop moves on."""

    head: Position
    after: int
    writes: tuple[tuple[StateEntry, ...], ...] = ()
    pages: dict[int, HistoryPage] = field(default_factory=dict, compare=False)

    def covers(self, revision: int) -> bool:
        return self.after <= revision <= self.head.revision

    def continues(self, position: Position) -> bool:
        """Whether what follows this position is here."""
        return position.epoch == self.head.epoch and self.after <= position.revision

    def page(self, revision: int, most: int) -> HistoryPage:
        """The page after a revision; all readers that are there get the same one."""
        if (found := self.pages.get(revision)) is None:
            writes = self.writes[revision - self.after :][:most]
            upto = Position(self.head.epoch, revision + len(writes))
            entries = tuple(entry for write in writes for entry in write)
            found = self.pages[revision] = HistoryPage(self.head, upto, entries)
        return found

    def moved(self, head: Position, writes: list[tuple[StateEntry, ...]]) -> _Tail:
        """The tail after more writes; of the oldest it forgets what is too much."""
        kept = [*self.writes, *writes]
        first, entries = max(0, len(kept) - KEPT_WRITES), sum(map(len, kept))
        entries -= sum(map(len, kept[:first]))
        while entries > KEPT_ENTRIES:
            entries -= len(kept[first])
            first += 1
        return _Tail(head, self.after + first, tuple(kept[first:]))


class HistoryTail:
    """An `EventHistory` for all streams of a process; implements `backpack_serving.sync.server.History`.

    `refresh` reads what was written since. What isn't in memory (an old position, the whole state) is read from the
    store, which takes a thread; a whole state is kept until the tail doesn't reach back to it.
    """

    def __init__(self, history: EventHistory, executor: Executor, on_news: Callable[[], None] = lambda: None) -> None:
        self._history, self._executor, self.on_news = history, executor, on_news
        self._tail: _Tail | None = None
        self._whole: HistoryPage | None = None
        self._reading_whole = threading.Lock()
        self._read_at: float | None = None  # when the last read began that has ended, and well
        self._shared: SharedRead[None] = SharedRead(self._read_tail)

    @property
    def fingerprint(self) -> str:
        return self._history.fingerprint

    @property
    def head(self) -> Position:
        """The store's position when it was last read."""
        return self._tail.head if self._tail else self._history.head

    def at_hand(self, revision: int) -> bool:
        return self._tail is not None and self._tail.covers(revision)

    def since(self, revision: int) -> HistoryPage | None:
        tail = self._tail
        return tail.page(revision, KEPT_WRITES) if tail and tail.covers(revision) else self._history.since(revision)

    def snapshot(self, at_least: Position) -> HistoryPage:
        with self._reading_whole:  # a thousand readers may ask at once
            whole, tail = self._whole, self._tail
            if whole is None or tail is None or whole.position < at_least or not tail.continues(whole.position):
                whole = self._whole = self._history.snapshot()
            return whole

    async def refresh(self, within: float = 0.0) -> None:
        """Read what was written, unless a read that began within so many seconds has done it.

        Raises Unavailable if the store can't be read.
        """
        if self._read_at is None or time.monotonic() - self._read_at > within:
            await self._shared.get()

    async def follow(self, next_write: Callable[[], asyncio.Event]) -> None:
        """Read each write once it is notified, for ever. `next_write` returns an event that the next one sets."""
        while True:
            written = next_write()
            with suppress(ServiceError):  # streams notice it when they refresh
                await self.refresh()
            with suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_SECONDS):
                    await written.wait()

    async def _read_tail(self) -> None:
        loop, began = asyncio.get_running_loop(), time.monotonic()
        self._read_at = None
        await self._read_all(loop)
        self._read_at = began

    async def _read_all(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            tail = self._tail
            if tail is None:
                head = await loop.run_in_executor(self._executor, lambda: self._history.head)
                self._tail = _Tail(head, head.revision)
                return
            head, writes = await loop.run_in_executor(self._executor, self._history.writes_after, tail.head.revision)
            if writes is None or head.epoch != tail.head.epoch or head < tail.head:
                self._tail, self._whole = _Tail(head, head.revision), None
            elif writes:
                upto = tail.head.revision + len(writes)
                self._tail = tail.moved(Position(head.epoch, upto), writes)
            else:
                return
            self.on_news()
            if self._tail.head == head:
                return
