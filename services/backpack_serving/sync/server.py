"""The server of the sync protocol, for one stream: a state machine without clock, transport or thread."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
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


class ReaderChanges:
    """The changes of a page that readers of one kind need: only the last one of each key.

    What follows from them is computed once, however many readers are sent them.
    """

    def __init__(self, kind: ReaderKind, changes: Iterable[StateEntry]) -> None:
        latest: dict[object, StateEntry] = {}
        for change in changes:
            if kind is ReaderKind.GATEWAY or isinstance(change, Stageable):
                latest[type(change), change.key] = change
        self.changes = tuple(latest.values())

    @cached_property
    def _staged(self) -> dict[tuple[str, str], Stageable]:
        return {change.key: change for change in self.changes if isinstance(change, Stageable)}

    @cached_property
    def _served_digests(self) -> frozenset[str]:
        return frozenset(release.digest for change in self._staged.values() for release in change.serving)

    def index(self) -> ReaderChanges:
        """Find out now what `mentions` and `digests` look up: of a whole state that is no work for an event loop."""
        assert self._served_digests is not None
        return self

    def mentions(self, key: tuple[str, str]) -> bool:
        """Whether one of the changes is of this channel, or of this tenant's newest release."""
        return key in self._staged

    def digests(self, refused: Container[tuple[str, str]] = ()) -> Iterable[str]:
        """Digests of the releases that are served once the changes are applied, except those of refused channels."""
        if not refused:
            return self._served_digests
        applied = (change for key, change in self._staged.items() if key not in refused)
        return (release.digest for change in applied for release in change.serving)


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """Part of the store's history: the changes up to `position`, and the store's own position (`head`)."""

    head: Position
    position: Position
    changes: tuple[StateEntry, ...]
    _of: dict[ReaderKind, ReaderChanges] = field(default_factory=dict, compare=False, repr=False)

    def of(self, kind: ReaderKind) -> ReaderChanges:
        """The changes for readers of one kind. All who share the page share them."""
        if (found := self._of.get(kind)) is None:
            found = self._of[kind] = ReaderChanges(kind, self.changes)
        return found


class History(Protocol):
    """The store's history, as changes for readers."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def head(self) -> Position:
        """The store's position."""

    def at_hand(self, revision: int) -> bool:
        """Whether `head` and `since` this revision are answered from memory, without waiting for the store."""

    def snapshot(self, at_least: Position) -> HistoryPage:
        """The whole state, at this position or a later one."""

    def since(self, revision: int) -> HistoryPage | None:
        """A page of changes after a revision, oldest first; None if they were compacted."""


@dataclass(frozen=True, slots=True)
class InFlightDelta:
    """A delta that was sent and isn't acknowledged yet."""

    nonce: int
    position: Position
    content: ReaderChanges


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

    def hasten_bookmark(self) -> None:
        """The next `pump` sends a bookmark, if nothing else."""
        self._bookmark_due = 0.0

    @property
    def opening(self) -> bool:
        """Whether the next `pump` answers a Hello."""
        return self._just_opened

    @property
    def at_hand(self) -> bool:
        """Whether `pump` only looks at what is in memory, so that it may run on an event loop."""
        if self.hello is None or self.in_flight is not None:
            return True
        return not self._just_opened and (self._epoch_is_over or self.history.at_hand(self.acked.revision))

    @property
    def _epoch_is_over(self) -> bool:
        return self.history.head.epoch > self.acked.epoch

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
        self.digests = set(hello.digests)
        # They are many, and kept once.
        self.hello = self.last_hello = replace(hello, digests=frozenset())
        self.in_flight, self._just_opened = None, True
        self.acked = hello.position
        self.refusals = {refusal.key: refusal for refusal in hello.refusals}

    def _receive_ack(self, nonce: int, refused: Iterable[Refusal]) -> None:
        """Mark a delta as applied, except what was refused. Refused changes aren't sent again."""
        in_flight = self.in_flight
        if in_flight is None or nonce != in_flight.nonce:
            return  # for a delta from before the latest Hello
        self.in_flight, self.acked = None, in_flight.position
        refusals, content = {refusal.key: refusal for refusal in refused}, in_flight.content
        self.refusals = {key: old for key, old in self.refusals.items() if not content.mentions(key)} | refusals
        self.digests.update(content.digests(refusals))

    def _advance(self, hello: Hello) -> list[ToReader]:
        just_opened, self._just_opened = self._just_opened, False
        page = None if self._epoch_is_over else self.history.since(self.acked.revision)
        head = self.history.head if page is None else page.head
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
            page = self.history.snapshot(self.acked if head.epoch == self.acked.epoch else Position(head.epoch, 0))
            content = page.of(hello.kind).index()
            self.in_flight = InFlightDelta(next(self._nonces), page.position, content)
            return [Snapshot(self.in_flight.nonce, page.position, content.changes)]
        if page.position <= self.acked:
            return []
        if not (content := page.of(hello.kind)).changes:
            self.acked = page.position
            return [Bookmark(self.acked)]
        self.in_flight = InFlightDelta(next(self._nonces), page.position, content)
        return [Delta(self.in_flight.nonce, self.acked, page.position, content.changes)]


def _check_names(hello: Hello) -> None:
    """Raises InvalidRequest. Each name is kept, listed, and published to the other processes of the service."""
    for name, text in (("name", hello.name), ("incarnation", hello.incarnation)):
        if len(text) > LONGEST_NAME:
            message = f"{text[:40]!r}… has {len(text)} characters; at most {LONGEST_NAME}"
            raise InvalidRequest.at(f"hello.{name}", "TOO_LONG", message)
