"""The client of the sync protocol, in gateways and replicas: a state machine without clock, transport or disk.

A change goes through three steps. The delegate stages it (a replica fetches, verifies and compiles; a gateway does
nothing); `apply` puts it into `state`; once the caller has written that to disk, `commit` makes it the `view` that
requests see. A change that can't be staged is refused by name: its channel stays where it was, the others move on.
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
    """Changes that were received and are not applied yet. `work` is what has to be staged first."""

    nonce: int
    position: Position
    changes: tuple[StateEntry, ...]
    work: tuple[Stageable, ...]

    def without(self, refusals: Mapping[tuple[str, str], Refusal]) -> list[StateEntry]:
        """The changes whose channels aren't refused."""
        return [c for c in self.changes if not (isinstance(c, Stageable) and c.key in refusals)]


@dataclass(frozen=True, slots=True)
class _RefusedEntry:
    change: Stageable | UnknownEntry
    refusal: Refusal


_Refused = Mapping[tuple[str, str], _RefusedEntry]


@dataclass(frozen=True, slots=True)
class PreparedDelta:
    """What a pending delta makes of a state and of what is refused."""

    pending: PendingDelta
    before: tuple[StateView, _Refused]
    state: StateView
    refused: _Refused
    answer: Ack | Nack

    def follows(self, state: StateView, refused: _Refused) -> bool:
        """Whether it was made of these very objects."""
        return self.before[0] is state and self.before[1] is refused


class SyncClient:
    """The state of one process: `pending` waits for staging, `state` for the disk, and `view` is in effect.

    An answer acknowledges all of `state`: send it after `commit`.
    """

    def __init__(
        self, kind: ReaderKind, incarnation: str, name: str, fingerprint: str, view: StateView = StateView()
    ) -> None:
        self.kind, self.incarnation, self.name, self.fingerprint = kind, incarnation, name, fingerprint
        self.view = self.state = view
        self.state_at: float | None = None
        """When `state` was last known to be complete."""
        self.pending: PendingDelta | None = None
        self.resident: frozenset[str] = frozenset()  # digests that are ready to be served; the transport sets it
        self.last_error = ""  # why there is no stream to the service; the transport sets it
        self._refused: _Refused = {}  # replaced as a whole, like `state`: `prepare` may be reading it
        self._view_at: float | None = None
        self.needs_snapshot = True  # refusals don't survive a restart, so ask for everything

    def hello(self) -> Hello:
        """The first message of a stream. Drops pending changes of an earlier stream: the service sends them again."""
        self.pending = None
        return Hello(
            self.kind,
            self.incarnation,
            self.name,
            self.fingerprint,
            self.state.position,
            self.needs_snapshot,
            self.resident,
            self.refusals,
        )

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(entry.refusal for entry in self._refused.values())

    @property
    def retryable(self) -> tuple[Stageable, ...]:
        """Refused changes whose reason may have passed."""
        changes = (entry.change for entry in self._refused.values() if not entry.refusal.final)
        return tuple(change for change in changes if not isinstance(change, UnknownEntry))

    def age(self, now: float) -> float:
        """Seconds since `view` was last known to be complete; infinite if it never was."""
        return float("inf") if self._view_at is None else max(0.0, now - self._view_at)

    def restore(self, view: StateView, at: float) -> None:
        """Start from the view on disk, and the time when it was last known to be complete."""
        self.state, self.state_at = view, at
        self.commit(view, at)

    def commit(self, view: StateView, at: float | None) -> None:
        """Put a state that is on disk into effect. `at` is its `state_at`."""
        self.view, self._view_at = view, at

    def receive(self, message: ToReader, now: float) -> tuple[FromReader, ...]:
        """Process a message; returns immediate answers. Check `pending` afterwards."""
        match message:
            case Bookmark():
                self._apply_bookmark(message.position, now)
            case ResyncRequired():
                return (self.hello(),)
            case Snapshot():
                return self._receive_changes(message.nonce, message.position, message.changes)
            case Delta():
                base, at = message.base, self.state.position
                if self.needs_snapshot or base.epoch != at.epoch or base > at:
                    self.needs_snapshot = True  # a delta is missing in between
                    return (self.hello(),)
                return self._receive_changes(message.nonce, message.position, message.changes)
        return ()

    def prepare(self, nonce: int, refused: Iterable[Refusal]) -> PreparedDelta | None:
        """The work of `apply`, and nothing of its effect: a thread may do it, for a delta with many changes.

        Returns None if the changes aren't pending.
        """
        pending, state, known = self.pending, self.state, self._refused
        if pending is None or pending.nonce != nonce:
            return None
        refusals = _refusals_of(pending, refused, known, self.kind)
        remaining = dict(known)
        for change in pending.changes:
            if isinstance(change, Stageable | UnknownEntry):
                remaining.pop(change.key, None)
                if refusal := refusals.get(change.key):
                    remaining[change.key] = _RefusedEntry(change, refusal)
        answer = Nack(nonce, tuple(refusals.values())) if refusals else Ack(nonce)
        after = state.changed(pending.position, pending.without(refusals))
        return PreparedDelta(pending, (state, known), after, remaining, answer)

    def apply(
        self, nonce: int, refused: Iterable[Refusal], now: float, prepared: PreparedDelta | None = None
    ) -> Ack | Nack | None:
        """Apply the staged changes, except those in `refused`; returns the answer to the service.

        `prepared` counts if nothing has changed since. Returns None if the changes aren't pending any more, because
        their stream is gone.
        """
        made = prepared
        if made is None or made.pending is not self.pending or not made.follows(self.state, self._refused):
            made = self.prepare(nonce, refused)
        if made is None:
            return None
        self._refused, self.state = made.refused, made.state  # all of it or nothing
        self.pending, self.needs_snapshot, self.state_at = None, False, now
        return made.answer

    def apply_retry(self, change: Stageable, refusal: Refusal | None) -> None:
        """Apply a refused change that was staged again, or store its new refusal. Ignores one that was superseded."""
        entry = self._refused.get(change.key)
        if entry is None or entry.change != change:
            return
        if refusal:
            self._refused = {**self._refused, change.key: _RefusedEntry(change, refusal)}
            return
        self._refused = {key: other for key, other in self._refused.items() if key != change.key}
        self.state = self.state.changed(self.state.position, [change])

    def report(self, tallies: tuple[CanaryTally, ...] = (), releases: int = 0) -> ReaderReport:
        return ReaderReport(self.refusals, tallies, releases)

    def _receive_changes(
        self, nonce: int, position: Position, changes: tuple[StateEntry, ...]
    ) -> tuple[FromReader, ...]:
        at = self.state.position
        if position < at or (position == at and not self.needs_snapshot):
            return (Ack(nonce),)  # a duplicate, or late from a closed stream: never go back
        if self.pending and self.pending.nonce != nonce:
            return (self.hello(),)  # only one may be pending: one of the two is a stray, so resync
        staged = [change for change in changes if isinstance(change, Stageable)]
        known = self._refused
        work = tuple(change for change in staged if _earlier_refusal(change, known) is None) if known else tuple(staged)
        self.pending = PendingDelta(nonce, position, changes, work)
        return ()

    def _apply_bookmark(self, position: Position, now: float) -> None:
        at = self.state.position
        if self.pending is None and position.epoch == at.epoch and position >= at:
            if position > at:
                self.state = replace(self.state, position=position)
            self.state_at = now
            if self.state is self.view:
                self._view_at = now


def _refusals_of(
    pending: PendingDelta, refused: Iterable[Refusal], known: _Refused, kind: ReaderKind
) -> dict[tuple[str, str], Refusal]:
    """All refusals of a delta: those given, those known from before, and those of unknown kinds of change."""
    refusals = {refusal.key: refusal for refusal in refused}
    for change in pending.changes:
        if isinstance(change, UnknownEntry):
            text = f"unknown kind of change: {change.kind}; upgrade this {kind}"
            refusals[change.key] = Refusal(*change.key, "", "UNKNOWN_CHANGE", text)
        elif known and isinstance(change, Stageable) and (before := _earlier_refusal(change, known)):
            refusals[change.key] = before
    return refusals


def _earlier_refusal(change: Stageable, known: _Refused) -> Refusal | None:
    """The final refusal of this release in this channel, if there was one: it isn't tried again."""
    entry = known.get(change.key)
    if entry and entry.refusal.final and entry.refusal.digest in {r.digest for r in change.serving}:
        return entry.refusal
    return None
