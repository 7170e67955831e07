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


@dataclass(frozen=True, slots=True)
class _RefusedEntry:
    change: Stageable | UnknownEntry
    refusal: Refusal


class SyncClient:
    """What one process knows: `pending` waits for its staging, `state` for the disk, and `view` is what holds.

    An answer that is given to the service says that all of `state` holds: send it when `commit` was called.
    """

    def __init__(
        self, kind: ReaderKind, incarnation: str, name: str, fingerprint: str, view: StateView = StateView()
    ) -> None:
        self.kind, self.incarnation, self.name, self.fingerprint = kind, incarnation, name, fingerprint
        self.view = self.state = view
        self.state_at: float | None = None
        """When nothing was missing from what is known."""
        self.pending: PendingDelta | None = None
        self.resident: frozenset[str] = frozenset()  # digests that are ready to be served; the owner says
        self.last_error = ""  # why there is no stream to the service; who opens them says
        self._refused: dict[tuple[str, str], _RefusedEntry] = {}
        self._view_at: float | None = None
        self._needs_snapshot = True  # after a start: what is parked isn't remembered, so everything is asked for

    def hello(self) -> Hello:
        """The first message of a stream. What an earlier stream left unapplied is dropped: it comes again."""
        self.pending = None
        return Hello(
            self.kind,
            self.incarnation,
            self.name,
            self.fingerprint,
            self.state.position,
            self._needs_snapshot,
            self.resident,
            self.refusals,
        )

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(entry.refusal for entry in self._refused.values())

    @property
    def retryable(self) -> tuple[Stageable, ...]:
        """What was refused for a reason that may have passed."""
        changes = (entry.change for entry in self._refused.values() if not entry.refusal.final)
        return tuple(change for change in changes if not isinstance(change, UnknownEntry))

    def age(self, now: float) -> float:
        """Seconds since nothing was missing for certain from what holds; infinite if that never was."""
        return float("inf") if self._view_at is None else max(0.0, now - self._view_at)

    def restore(self, view: StateView, at: float) -> None:
        """Take up what an earlier life had on disk, and when nothing was missing from it."""
        self.state, self.state_at = view, at
        self.commit(view, at)

    def commit(self, view: StateView, at: float | None) -> None:
        """What was known lately is on disk: let it hold. `at` is the `state_at` that it had."""
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
                base, at = message.base, self.state.position
                if self._needs_snapshot or base.epoch != at.epoch or base > at:
                    self._needs_snapshot = True  # something between is missing
                    return (self.hello(),)
                return self._receive_changes(message.nonce, message.position, message.changes)
        return ()

    def apply(self, nonce: int, refused: Iterable[Refusal], now: float) -> Ack | Nack | None:
        """The pending changes are staged, but for what was refused: they are known now.

        None if they aren't pending any more: the stream they came on is gone.
        """
        pending = self.pending
        if pending is None or pending.nonce != nonce:
            return None
        refusals = self._refusals_of(pending, refused)
        for change in pending.changes:
            if isinstance(change, Stageable | UnknownEntry):
                self._refused.pop(change.key, None)
                if refusal := refusals.get(change.key):
                    self._refused[change.key] = _RefusedEntry(change, refusal)
        self.state = self.state.changed(
            pending.position, _without_refused(pending.changes, refusals)
        )  # all of it or nothing
        self.pending, self._needs_snapshot, self.state_at = None, False, now
        return Nack(nonce, tuple(refusals.values())) if refusals else Ack(nonce)

    def apply_retry(self, change: Stageable, refusal: Refusal | None) -> None:
        """What came of staging a refused change again. Nothing happens if it has been overtaken."""
        entry = self._refused.get(change.key)
        if entry is None or entry.change != change:
            return
        if refusal:
            self._refused[change.key] = _RefusedEntry(change, refusal)
            return
        del self._refused[change.key]
        self.state = self.state.changed(self.state.position, [change])

    def report(self, tallies: tuple[CanaryTally, ...] = (), releases: int = 0) -> ReaderReport:
        return ReaderReport(self.refusals, tallies, releases)

    def _receive_changes(
        self, nonce: int, position: Position, changes: tuple[StateEntry, ...]
    ) -> tuple[FromReader, ...]:
        at = self.state.position
        if position < at or (position == at and not self._needs_snapshot):
            return (Ack(nonce),)  # it is known already, or late from a stream that is gone: nothing goes back
        if self.pending and self.pending.nonce != nonce:
            return (self.hello(),)  # there is one at a time: one of the two is a stray, so begin anew
        work = tuple(c for c in changes if isinstance(c, Stageable) and self._earlier_refusal(c) is None)
        self.pending = PendingDelta(nonce, position, changes, work)
        return ()

    def _refusals_of(self, pending: PendingDelta, refused: Iterable[Refusal]) -> dict[tuple[str, str], Refusal]:
        """What of the pending changes is refused: now, as before without trying, or for being unknown."""
        refusals = {refusal.key: refusal for refusal in refused}
        for change in pending.changes:
            if isinstance(change, UnknownEntry):
                text = f"unknown kind of change: {change.kind}; upgrade this {self.kind}"
                refusals[change.key] = Refusal(*change.key, "", "UNKNOWN_CHANGE", text)
            elif isinstance(change, Stageable) and (before := self._earlier_refusal(change)):
                refusals[change.key] = before
        return refusals

    def _earlier_refusal(self, change: Stageable) -> Refusal | None:
        """Why this change can't be taken, if that is known: the same release of the same channel was refused."""
        entry = self._refused.get(change.key)
        if entry and entry.refusal.final and entry.refusal.digest in {r.digest for r in change.serving}:
            return entry.refusal
        return None

    def _apply_bookmark(self, position: Position, now: float) -> None:
        at = self.state.position
        if self.pending is None and position.epoch == at.epoch and position >= at:
            if position > at:
                self.state = replace(self.state, position=position)
            self.state_at = now
            if self.state is self.view:
                self._view_at = now


def _without_refused(changes: Iterable[StateEntry], refusals: Mapping[tuple[str, str], Refusal]) -> list[StateEntry]:
    """The changes without those of channels that are refused."""
    return [c for c in changes if not (isinstance(c, Stageable) and c.key in refusals)]
