"""The reading end, in gateways and replicas. No clock, no transport, no disk: time and messages are given.

What arrives is staged by the owner (a replica fetches, verifies and compiles; a gateway has nothing to do); then
it is known, and as soon as it is on disk it holds: one immutable view is put in the place of the one before. What
can't be staged is refused by name and parked: its channel stays at what it was, everything else moves on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from backpack_serving.references import CanaryTally, Position, ReaderKind, Refusal
from backpack_serving.sync.messages import (
    Ack,
    Bookmark,
    Delta,
    FromReader,
    Hello,
    Nack,
    ReaderReport,
    ResyncRequired,
    Snapshot,
    ToReader,
)
from backpack_serving.sync.state import Stageable, StateEntry, StateView, UnknownEntry


@dataclass(frozen=True, slots=True)
class PendingDelta:
    """What arrived and isn't applied yet. `work` is what has to be staged for it."""

    nonce: int
    position: Position
    changes: tuple[StateEntry, ...]
    work: tuple[Stageable, ...]

    def without(self, refusals: Mapping[tuple[str, str], Refusal]) -> list[StateEntry]:
        """The changes without those of channels that are refused."""
        return [c for c in self.changes if not (isinstance(c, Stageable) and c.key in refusals)]


@dataclass(frozen=True, slots=True)
class _RefusedEntry:
    change: Stageable | UnknownEntry
    refusal: Refusal


class SyncClient:
    """What one process knows: `pending` waits for its staging, `known` for the disk, and `view` is what holds.

    An answer that is given to the service says that all of `known` holds: send it when `hold` was called.
    """

    def __init__(
        self, kind: ReaderKind, incarnation: str, name: str, fingerprint: str, view: StateView = StateView()
    ) -> None:
        self.kind, self.incarnation, self.name, self.fingerprint = kind, incarnation, name, fingerprint
        self.view = self.known = view
        self.known_at: float | None = None
        """When nothing was missing from what is known."""
        self.pending: PendingDelta | None = None
        self.resident: frozenset[str] = frozenset()  # digests that are ready to be served; the owner says
        self.trouble = ""  # why there is no stream to the service; who opens them says
        self._parked: dict[tuple[str, str], _RefusedEntry] = {}
        self._view_at: float | None = None
        self.needs_snapshot = True  # after a start: what is parked isn't remembered, so everything is asked for

    def hello(self) -> Hello:
        """The first message of a stream. What an earlier stream left unapplied is dropped: it comes again."""
        self.pending = None
        return Hello(
            self.kind,
            self.incarnation,
            self.name,
            self.fingerprint,
            self.known.position,
            self.needs_snapshot,
            self.resident,
            self.refusals,
        )

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(parked.refusal for parked in self._parked.values())

    @property
    def retryable(self) -> tuple[Stageable, ...]:
        """What was refused for a reason that may have passed."""
        changes = (parked.change for parked in self._parked.values() if not parked.refusal.final)
        return tuple(change for change in changes if not isinstance(change, UnknownEntry))

    def age(self, now: float) -> float:
        """Seconds since nothing was missing for certain from what holds; infinite if that never was."""
        return float("inf") if self._view_at is None else max(0.0, now - self._view_at)

    def restore(self, view: StateView, at: float) -> None:
        """Take up what an earlier life had on disk, and when nothing was missing from it."""
        self.known, self.known_at = view, at
        self.hold(view, at)

    def hold(self, view: StateView, at: float | None) -> None:
        """What was known lately is on disk: let it hold. `at` is the `known_at` that it had."""
        self.view, self._view_at = view, at

    def receive(self, message: ToReader, now: float) -> tuple[FromReader, ...]:
        """Take a message in; what to answer at once. Look at `pending` afterwards."""
        match message:
            case Bookmark():
                self._apply_bookmark(message.position, now)
            case ResyncRequired():
                return (self.hello(),)
            case Snapshot():
                return self._receive_changes(message.nonce, message.position, message.changes)
            case Delta():
                base, at = message.base, self.known.position
                if self.needs_snapshot or base.epoch != at.epoch or base > at:
                    self.needs_snapshot = True  # something between is missing
                    return (self.hello(),)
                return self._receive_changes(message.nonce, message.position, message.changes)
        return ()

    def settle(self, nonce: int, refused: Iterable[Refusal], now: float) -> Ack | Nack | None:
        """The pending changes are staged, but for what was refused: they are known now.

        None if they aren't pending any more: the stream they came on is gone.
        """
        pending = self.pending
        if pending is None or pending.nonce != nonce:
            return None
        refusals = self._refusals_of(pending, refused)
        for change in pending.changes:
            if isinstance(change, Stageable | UnknownEntry):
                self._parked.pop(change.key, None)
                if refusal := refusals.get(change.key):
                    self._parked[change.key] = _RefusedEntry(change, refusal)
        self.known = self.known.changed(pending.position, pending.without(refusals))  # all of it or nothing
        self.pending, self.needs_snapshot, self.known_at = None, False, now
        return Nack(nonce, tuple(refusals.values())) if refusals else Ack(nonce)

    def retried(self, change: Stageable, refusal: Refusal | None) -> None:
        """What came of staging a refused change again. Nothing happens if it has been overtaken."""
        parked = self._parked.get(change.key)
        if parked is None or parked.change != change:
            return
        if refusal:
            self._parked[change.key] = _RefusedEntry(change, refusal)
            return
        del self._parked[change.key]
        self.known = self.known.changed(self.known.position, [change])

    def report(self, tallies: tuple[CanaryTally, ...] = (), releases: int = 0) -> ReaderReport:
        return ReaderReport(self.refusals, tallies, releases)

    def _receive_changes(
        self, nonce: int, position: Position, changes: tuple[StateEntry, ...]
    ) -> tuple[FromReader, ...]:
        at = self.known.position
        if position < at or (position == at and not self.needs_snapshot):
            return (Ack(nonce),)  # it is known already, or late from a stream that is gone: nothing goes back
        if self.pending and self.pending.nonce != nonce:
            return (self.hello(),)  # there is one at a time: one of the two is a stray, so begin anew
        work = tuple(c for c in changes if isinstance(c, Stageable) and self._known_refusal(c) is None)
        self.pending = PendingDelta(nonce, position, changes, work)
        return ()

    def _refusals_of(self, pending: PendingDelta, refused: Iterable[Refusal]) -> dict[tuple[str, str], Refusal]:
        """What of the pending changes is refused: now, as before without trying, or for being unknown."""
        refusals = {refusal.key: refusal for refusal in refused}
        for change in pending.changes:
            if isinstance(change, UnknownEntry):
                text = f"unknown kind of change: {change.kind}; upgrade this {self.kind}"
                refusals[change.key] = Refusal(*change.key, "", "UNKNOWN_CHANGE", text)
            elif isinstance(change, Stageable) and (before := self._known_refusal(change)):
                refusals[change.key] = before
        return refusals

    def _known_refusal(self, change: Stageable) -> Refusal | None:
        """Why this change can't be taken, if that is known: the same release of the same channel was refused."""
        parked = self._parked.get(change.key)
        if parked and parked.refusal.final and parked.refusal.digest in {r.digest for r in change.serving}:
            return parked.refusal
        return None

    def _apply_bookmark(self, position: Position, now: float) -> None:
        at = self.known.position
        if self.pending is None and position.epoch == at.epoch and position >= at:
            if position > at:
                self.known = replace(self.known, position=position)
            self.known_at = now
            if self.known is self.view:
                self._view_at = now
