"""The server of the sync protocol, for one stream: a state machine without clock, transport or thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from backpack_serving.errors import InvalidRequest, PreconditionFailed, Unavailable
from backpack_serving.references import Position, ReaderKind, Refusal
from backpack_serving.sync.messages import (
    BOOKMARK_SECONDS,
    SILENCE,
    Ack,
    Bookmark,
    Delta,
    FromReader,
    Hello,
    Nack,
    ResyncRequired,
    Snapshot,
    ToReader,
)
from backpack_serving.sync.state import Stageable, StateEntry

LONGEST_NAME = 512
"""Characters of a reader's name and of its incarnation: room for any host name with a port."""


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """Part of the store's history: the changes up to `position`, and the store's own position (`head`)."""

    head: Position
    position: Position
    changes: tuple[StateEntry, ...]


class History(Protocol):
    """The store's history, as changes for readers."""

    @property
    def fingerprint(self) -> str: ...

    def snapshot(self) -> HistoryPage:
        """The whole state."""

    def since(self, revision: int) -> HistoryPage | None:
        """A page of changes after a revision, oldest first; None if they were compacted."""


@dataclass(frozen=True, slots=True)
class InFlightDelta:
    """A delta that was sent and isn't acknowledged yet."""

    nonce: int
    position: Position
    changes: tuple[StateEntry, ...]


class SyncServer:
    """One stream to a reader. `acked` is the position up to which the reader has acknowledged everything.

    No two streams of any process share a nonce, so an answer to another stream is never counted here.
    """

    def __init__(self, history: History, nonces: Iterator[int]) -> None:
        self.history, self._nonces = history, nonces
        self.in_flight: InFlightDelta | None = None
        self._bookmark_due = self._last_received = 0.0
        self._just_opened = False
        self.hello: Hello | None = None
        self.last_hello: Hello | None = None  # the newest Hello, accepted or not
        self.acked = Position()
        self.refusals: dict[tuple[str, str], Refusal] = {}
        self.digests: set[str] = set()

    def receive(self, message: FromReader, now: float) -> None:
        """Process a message of the reader.

        Raises PreconditionFailed for a reader of another model, InvalidRequest for one without an incarnation, or
        whose name or incarnation is too long.
        """
        self._last_received = now
        match message:
            case Hello():
                _check_names(message)  # before it is kept: a reader that is refused is listed by its name
                self.last_hello = message
                self._receive_hello(message)
            case Ack():
                self._receive_ack(message.nonce, ())
            case Nack():
                self._receive_ack(message.nonce, message.refusals)
            case _:
                self.refusals = {refusal.key: refusal for refusal in message.refusals}

    def pump(self, now: float) -> list[ToReader]:
        """The messages to send now. Call it after each write of the store, after each message, and at `due`.

        Raises PreconditionFailed if the store is behind the reader, Unavailable if the reader was silent for so long
        that the stream must be half open.
        """
        if self.hello is None:
            return []
        if now - self._last_received > SILENCE:
            raise Unavailable("READER_SILENT", f"nothing was heard for {SILENCE:g} s; open a new stream")
        due = now >= self._bookmark_due
        out = self._advance(self.hello) if self.in_flight is None else []
        if out or due:
            self._bookmark_due = now + BOOKMARK_SECONDS
        return out or ([Bookmark(self.acked)] if due else [])

    @property
    def due(self) -> float:
        """When the next bookmark must be sent."""
        return self._bookmark_due

    def _receive_hello(self, hello: Hello) -> None:
        theirs, ours = hello.fingerprint, self.history.fingerprint
        if theirs != ours:
            message = f"you serve model {theirs[:12]}…, the patches here are for {ours[:12]}…"
            raise PreconditionFailed("WRONG_MODEL", message)
        if not hello.incarnation:
            raise InvalidRequest.at("hello.incarnation", "EMPTY", "draw one when the process starts")
        self.hello, self.in_flight, self._just_opened = hello, None, True
        self.acked = hello.position
        self.refusals = {refusal.key: refusal for refusal in hello.refusals}
        self.digests = set(hello.digests)

    def _receive_ack(self, nonce: int, refused: Iterable[Refusal]) -> None:
        """Mark a delta as applied, except what was refused. Refused changes aren't sent again."""
        in_flight = self.in_flight
        if in_flight is None or nonce != in_flight.nonce:
            return  # for a delta from before the latest Hello
        self.in_flight, self.acked = None, in_flight.position
        refusals = {refusal.key: refusal for refusal in refused}
        for change in in_flight.changes:
            if isinstance(change, Stageable):
                self.refusals.pop(change.key, None)
                if change.key not in refusals:
                    self.digests.update(release.digest for release in change.serving)
        self.refusals.update(refusals)

    def _advance(self, hello: Hello) -> list[ToReader]:
        just_opened, self._just_opened = self._just_opened, False
        page = self.history.since(self.acked.revision)
        head = self.history.snapshot().head if page is None else page.head
        if head < self.acked:
            raise PreconditionFailed(
                "STORE_WENT_BACK",
                f"the store is at {head}, but {hello.name} has applied {self.acked}: a backup was restored "
                "without a new epoch, or this is another store. Raise the epoch; for another store, remove what "
                "the reader has in its known-good folder",
            )
        if page is None or head.epoch != self.acked.epoch or (just_opened and hello.whole):
            if not just_opened:
                self.hello = None
                return [ResyncRequired(f"the store is in epoch {head.epoch}, you are at {self.acked}")]
            page = self.history.snapshot()
            changes = _changes_for(hello.kind, page.changes)
            self.in_flight = InFlightDelta(next(self._nonces), page.position, changes)
            return [Snapshot(self.in_flight.nonce, page.position, changes)]
        if page.position <= self.acked:
            return []
        if not (changes := _changes_for(hello.kind, page.changes)):
            self.acked = page.position
            return [Bookmark(self.acked)]
        self.in_flight = InFlightDelta(next(self._nonces), page.position, changes)
        return [Delta(self.in_flight.nonce, self.acked, page.position, changes)]


def _check_names(hello: Hello) -> None:
    """Raises InvalidRequest. Each name is kept, listed, and published to the other processes of the service."""
    for field, text in (("name", hello.name), ("incarnation", hello.incarnation)):
        if len(text) > LONGEST_NAME:
            message = f"{text[:40]!r}… has {len(text)} characters; at most {LONGEST_NAME}"
            raise InvalidRequest.at(f"hello.{field}", "TOO_LONG", message)


def _changes_for(kind: ReaderKind, changes: Iterable[StateEntry]) -> tuple[StateEntry, ...]:
    """The changes that a reader of this kind needs; only the last one of each key."""
    latest: dict[object, StateEntry] = {}
    for change in changes:
        if kind is ReaderKind.GATEWAY or isinstance(change, Stageable):
            latest[type(change), change.key] = change
    return tuple(latest.values())
