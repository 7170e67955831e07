"""The reading end, in gateways and replicas. No clock, no transport, no thread: time and messages are given.

What arrives is staged by the owner (a replica fetches, verifies and compiles; a gateway has nothing to do), then
one immutable view is put in the place of the one before. What can't be staged is refused by name and parked: its
channel stays at what it was, everything else moves on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from backpack_serving.sync.known import (
    Kind,
    Known,
    Position,
    Steering,
    Unknown,
    View,
)
from backpack_serving.sync.messages import (
    Ack,
    Bookmark,
    Delta,
    FromReader,
    Hello,
    Nack,
    Refusal,
    Report,
    ResyncRequired,
    Snapshot,
    Tally,
    ToReader,
)


@dataclass(frozen=True, slots=True)
class Pending:
    """What arrived and isn't applied yet. `work` is what has to be staged for it."""

    nonce: int
    position: Position
    changes: tuple[Known, ...]
    work: tuple[Steering, ...]


@dataclass(frozen=True, slots=True)
class _Parked:
    change: Steering | Unknown
    refusal: Refusal


class Reader:
    """What one process knows. `view` is what holds; `pending` waits for its staging."""

    def __init__(self, kind: Kind, incarnation: str, name: str, fingerprint: str, view: View = View()) -> None:
        self.kind, self.incarnation, self.name, self.fingerprint = kind, incarnation, name, fingerprint
        self.view = view
        self.pending: Pending | None = None
        self.resident: frozenset[str] = frozenset()  # digests that are ready to be served; the owner says
        self._parked: dict[tuple[str, str], _Parked] = {}
        self._heard: float | None = None
        self._whole = True  # after a start: what is parked isn't remembered, so everything is asked for

    def hello(self) -> Hello:
        """The first message of a stream. What an earlier stream left unapplied is dropped: it comes again."""
        self.pending = None
        return Hello(
            self.kind,
            self.incarnation,
            self.name,
            self.fingerprint,
            self.view.position,
            self._whole,
            self.resident,
            self.refusals,
        )

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(parked.refusal for parked in self._parked.values())

    @property
    def retryable(self) -> tuple[Steering, ...]:
        """What was refused for a reason that may have passed."""
        changes = (parked.change for parked in self._parked.values() if not parked.refusal.final)
        return tuple(change for change in changes if not isinstance(change, Unknown))

    def age(self, now: float) -> float:
        """Seconds since nothing was missing for certain; infinite if that never was."""
        return float("inf") if self._heard is None else max(0.0, now - self._heard)

    def heard_at(self, when: float) -> None:
        """Nothing was missing then: what a cache on disk knows of an earlier life."""
        self._heard = when

    def receive(self, message: ToReader, now: float) -> tuple[FromReader, ...]:
        """Take a message in; what to answer at once. Look at `pending` afterwards."""
        match message:
            case Bookmark():
                self._mark(message.position, now)
            case ResyncRequired():
                return (self.hello(),)
            case Snapshot():
                return self._take(message.nonce, message.position, message.changes)
            case Delta():
                base, at = message.base, self.view.position
                if self._whole or base.epoch != at.epoch or base > at:
                    self._whole = True  # something between is missing
                    return (self.hello(),)
                return self._take(message.nonce, message.position, message.changes)
        return ()

    def settled(self, nonce: int, refused: Iterable[Refusal]) -> View | None:
        """The view that `settle` would make hold; None if these changes aren't pending any more."""
        pending = self.pending
        if pending is None or pending.nonce != nonce:
            return None
        refusals = self._refusals(pending, refused)
        return self.view.changed(pending.position, _but(pending.changes, refusals))

    def settle(self, nonce: int, refused: Iterable[Refusal], now: float) -> Ack | Nack | None:
        """The pending changes are staged, but for what was refused: let them hold.

        None if they aren't pending any more: the stream they came on is gone.
        """
        pending = self.pending
        if pending is None or pending.nonce != nonce:
            return None
        refusals = self._refusals(pending, refused)
        for change in pending.changes:
            if isinstance(change, Steering | Unknown):
                key = ("", change.kind) if isinstance(change, Unknown) else change.key
                self._parked.pop(key, None)
                if refusal := refusals.get(key):
                    self._parked[key] = _Parked(change, refusal)
        self.view = self.view.changed(pending.position, _but(pending.changes, refusals))  # all of it or nothing
        self.pending, self._whole, self._heard = None, False, now
        return Nack(nonce, tuple(refusals.values())) if refusals else Ack(nonce)

    def retried(self, change: Steering, refusal: Refusal | None) -> None:
        """What came of staging a refused change again. Nothing happens if it has been overtaken."""
        parked = self._parked.get(change.key)
        if parked is None or parked.change != change:
            return
        if refusal:
            self._parked[change.key] = _Parked(change, refusal)
            return
        del self._parked[change.key]
        self.view = self.view.changed(self.view.position, [change])

    def report(self, tallies: tuple[Tally, ...] = ()) -> Report:
        return Report(self.refusals, tallies)

    def _take(self, nonce: int, position: Position, changes: tuple[Known, ...]) -> tuple[FromReader, ...]:
        if position < self.view.position or (position == self.view.position and not self._whole):
            return (
                Ack(nonce),
            )  # it is in the view already, or late from a stream that is gone: nothing goes back
        if self.pending and self.pending.nonce != nonce:
            return (self.hello(),)  # there is one at a time: one of the two is a stray, so begin anew
        work = tuple(c for c in changes if isinstance(c, Steering) and self._refused(c) is None)
        self.pending = Pending(nonce, position, changes, work)
        return ()

    def _refusals(self, pending: Pending, refused: Iterable[Refusal]) -> dict[tuple[str, str], Refusal]:
        """What of the pending changes is refused: now, as before without trying, or for being unknown."""
        refusals = {refusal.key: refusal for refusal in refused}
        for change in pending.changes:
            if isinstance(change, Unknown):
                text = f"unknown kind of change: {change.kind}; upgrade this {self.kind}"
                refusals["", change.kind] = Refusal("", change.kind, "", "UNKNOWN_CHANGE", text)
            elif isinstance(change, Steering) and (before := self._refused(change)):
                refusals[change.key] = before
        return refusals

    def _refused(self, change: Steering) -> Refusal | None:
        """Why this change can't be taken, if that is known: the same release of the same channel was refused."""
        parked = self._parked.get(change.key)
        if parked and parked.refusal.final and parked.refusal.digest in {r.digest for r in change.serving}:
            return parked.refusal
        return None

    def _mark(self, position: Position, now: float) -> None:
        at = self.view.position
        if self.pending is None and position.epoch == at.epoch and position >= at:
            if position > at:
                self.view = replace(self.view, position=position)
            self._heard = now


def _but(changes: Iterable[Known], refusals: Mapping[tuple[str, str], Refusal]) -> list[Known]:
    """The changes without those of channels that are refused."""
    return [c for c in changes if not (isinstance(c, Steering) and c.key in refusals)]
