"""Tracks the readers (gateways and replicas), and which releases they hold. In memory: after a restart all readers
reconnect.

Several processes of the service may share a database. Each publishes the status of its own readers, every second and
after changes; a remote reader without an update for SILENCE seconds counts as disconnected.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from operator import itemgetter

from backpack_serving.interventions.records import ChannelRecord
from backpack_serving.references import CanaryTally, Position, ReaderKind, Refusal, ReleaseRef
from backpack_serving.sync.messages import SILENCE, Hello, ReaderReport
from backpack_serving.sync.server import SyncServer

FORGOTTEN = 60.0
"""Seconds after which a disconnected reader is dropped from the list."""


Place = tuple[bool, str, str]
"""Where a reader is in the list of all: replicas come first, each kind by name."""


class HoldState(StrEnum):
    """Whether a reader holds a release of a channel."""

    STAGED = "staged"
    ACKED = "acked"
    NACKED = "nacked"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class StatusReason:
    """Why a reader doesn't hold a release: a stable word, and the details."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ReleaseHolding:
    """One reader and one release of a channel. `why` is set unless the release is ACKED."""

    reader: str
    kind: ReaderKind
    incarnation: str
    release: ReleaseRef
    canary: bool
    state: HoldState
    refusal: Refusal | None
    position: Position
    connected: bool
    why: StatusReason | None = None


@dataclass(frozen=True, slots=True)
class AckCount:
    """Of the connected readers of one kind: how many there are, how many hold a change, how many refuse it.

    `final` counts those of the `nacked` whose refusal is final; the others try again and may hold the change yet.
    """

    total: int
    acked: int
    nacked: int
    final: int = 0

    def quorum(self) -> bool:
        return 2 * self.acked > self.total

    def all(self) -> bool:
        return 0 < self.total == self.acked


@dataclass(frozen=True, slots=True)
class RolloutProgress:
    """How many readers have applied one write, and who refuses it."""

    replicas: AckCount
    gateways: AckCount
    refusals: tuple[tuple[str, Refusal], ...]


@dataclass(frozen=True, slots=True)
class RemoteReader:
    """A reader that is connected to another process of the service, as that process published it."""

    hello: Hello
    refusals: dict[tuple[str, str], Refusal]
    digests: frozenset[str] = frozenset()  # too long to be published

    @property
    def acked(self) -> Position:
        return self.hello.position


@dataclass(slots=True)
class ReaderStatus:
    """One reader process: its newest stream, that stream's Hello, and when its last message came.

    `refused` is why the service ended its last stream; a report on a new stream clears it.
    """

    server: SyncServer | RemoteReader
    hello: Hello
    last_heard: float
    connected: bool = True
    report: ReaderReport = field(default_factory=ReaderReport)
    refused: StatusReason | None = None

    @property
    def place(self) -> Place:
        return self.hello.kind is ReaderKind.GATEWAY, self.hello.name, self.hello.incarnation

    def out_of_touch(self, silence: float) -> StatusReason | None:
        """Why the reader is disconnected or silent; None if it isn't."""
        if self.connected and silence <= SILENCE:
            return None
        heard = f"last heard {silence:.0f} s ago"
        if self.connected:
            return StatusReason("SILENT", f"its stream is half open: {heard}")
        if self.refused:
            return StatusReason(self.refused.reason, f"{self.refused.message} ({heard})")
        return StatusReason("DISCONNECTED", f"it has no stream to the intervention service: {heard}")

    @property
    def releases(self) -> int:
        """How many releases it has ready; from its Hello until the first report."""
        return self.report.releases or len(self.server.digests)


class ReaderTracker:
    """All readers, by incarnation."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._statuses: dict[str, ReaderStatus] = {}
        self._incarnations_by_stream: dict[SyncServer, set[str]] = {}
        """Those that the Hellos of each stream of this process named: usually one."""

    def record(self, server: SyncServer | RemoteReader, report: ReaderReport | None = None) -> bool:
        """Record a message of a stream; returns whether it says anything new of the reader. A newer stream of the same
        process replaces an older one.
        """
        hello = server.hello
        assert hello is not None, "nothing is heard before Hello"
        status = self._statuses.get(hello.incarnation)
        news = status is None or not status.connected or status.hello is not hello
        if status is None:
            self._drop_silent()  # or readers that come and go would pile up while nobody lists them
        if status is None or status.server is not server:
            before = status.refused if status else None
            self._statuses[hello.incarnation] = status = ReaderStatus(server, hello, self._clock(), refused=before)
        if isinstance(server, SyncServer):
            self._incarnations_by_stream.setdefault(server, set()).add(hello.incarnation)
        status.hello, status.last_heard, status.connected = hello, self._clock(), True
        if report:
            news |= report != status.report or status.refused is not None
            status.report, status.refused = report, None
        return news

    def record_remote(self, hello: Hello, report: ReaderReport) -> None:
        """Record a reader of another process of the service; it has applied everything up to `hello.position`."""
        status = self._statuses.get(hello.incarnation)
        if status is None or not status.connected or isinstance(status.server, RemoteReader):
            refusals = {refusal.key: refusal for refusal in hello.refusals}
            self.record(RemoteReader(hello, refusals), report)

    @property
    def known_incarnations(self) -> list[str]:
        """Of all readers that it knows of."""
        return list(self._statuses)

    def local_standing(self, incarnations: Iterable[str]) -> list[tuple[Hello, ReaderReport]]:
        """The status of those of some readers that have a stream of this process, for `record_remote` in the others."""
        found = []
        statuses = [status for name in incarnations if (status := self._statuses.get(name))]
        for status in statuses:
            if status.connected and isinstance(status.server, SyncServer):
                refusals = tuple(status.server.refusals.values())
                hello = replace(status.hello, position=status.server.acked, refusals=refusals, digests=frozenset())
                found.append((hello, ReaderReport(tallies=status.report.tallies, releases=status.releases)))
        return found

    def disconnect(self, server: SyncServer, why: StatusReason | None = None) -> None:
        """Record the end of a stream; `why`, if the service ended it."""
        for name in self._incarnations_by_stream.pop(server, ()):
            status = self._statuses.get(name)
            if status is not None and status.server is server:
                status.connected = False
                status.refused = why or status.refused

    def reject(self, hello: Hello, why: StatusReason) -> None:
        """Record a refused Hello: the reader has no stream, but is listed with the reason."""
        if hello.incarnation:
            self._drop_silent()
            nothing = RemoteReader(hello, {}, hello.digests)
            self._statuses[hello.incarnation] = ReaderStatus(
                nothing, hello, self._clock(), connected=False, refused=why
            )

    def readers(self, after: Place | None = None) -> list[tuple[ReaderStatus, float]]:
        """All recent readers, replicas first, with the seconds since their last message; only those after a place."""
        now = self._drop_silent()
        ordered = sorted(
            (s for s in self._statuses.values() if after is None or s.place > after), key=lambda status: status.place
        )
        return [(status, now - status.last_heard) for status in ordered]

    @property
    def can_judge(self) -> bool:
        """Whether a gateway and a replica are in touch, who together judge releases."""
        return {status.hello.kind for status, silence in self.readers() if not status.out_of_touch(silence)} == {
            *ReaderKind
        }

    def holds(
        self, channel: ChannelRecord, position: Position, readers: Iterable[tuple[ReaderStatus, float]]
    ) -> Iterator[ReleaseHolding]:
        """Whether each of some `readers()` holds a channel's releases, given the store's position."""
        moved = Position(position.epoch, channel.moved)
        releases = [(release, release != channel.state.stable) for release in channel.state.serving]
        for status, silence in readers:
            server, hello = status.server, status.hello
            away = status.out_of_touch(silence)
            behind = StatusReason("BEHIND", f"it is at {server.acked}, and the channel was moved at {moved}")
            for release, canary in releases:
                refusal = server.refusals.get((channel.tenant, channel.channel))
                if refusal is None or refusal.digest != release.digest:
                    refusal = server.refusals.get((channel.tenant, ""))
                if refusal is not None and refusal.digest != release.digest:
                    refusal = None
                why: StatusReason | None
                if away:
                    state, why = HoldState.STALE, away
                elif refusal:
                    state, why = HoldState.NACKED, StatusReason(refusal.reason, refusal.message)
                elif server.acked >= moved:
                    state, why = HoldState.ACKED, None
                else:
                    staged = release.digest in server.digests
                    state, why = HoldState.STAGED if staged else HoldState.STALE, status.refused or behind
                yield ReleaseHolding(
                    hello.name,
                    hello.kind,
                    hello.incarnation,
                    release,
                    canary,
                    state,
                    refusal,
                    server.acked,
                    away is None,
                    why,
                )

    def rollout(self, channel: ChannelRecord, position: Position) -> RolloutProgress:
        """How many connected readers have applied the write at this position, which moved the channel."""
        self._drop_silent()
        refusals: dict[ReaderKind, list[tuple[str, Refusal]]] = {kind: [] for kind in ReaderKind}
        total, reached = Counter[ReaderKind](), Counter[ReaderKind]()
        for status in self._statuses.values():
            if not status.connected:
                continue
            kind = status.hello.kind
            total[kind] += 1
            if status.server.acked < position:
                continue
            reached[kind] += 1
            if refusal := status.server.refusals.get((channel.tenant, channel.channel)):
                refusals[kind].append((status.hello.name, refusal))
        counts = {
            kind: AckCount(total[kind], reached[kind] - len(found), len(found), sum(r.final for _, r in found))
            for kind, found in refusals.items()
        }
        named = sorted(refusals[ReaderKind.REPLICA], key=itemgetter(0)) + sorted(
            refusals[ReaderKind.GATEWAY], key=itemgetter(0)
        )
        return RolloutProgress(counts[ReaderKind.REPLICA], counts[ReaderKind.GATEWAY], tuple(named))

    def tally(self, tenant: str, channel: str, digest: str) -> CanaryTally:
        """The sum of the connected gateways' tallies for a release of a channel.

        Tallies of disconnected gateways are left out: they were judged when they were reported, and since such a
        gateway can't reset them, they would count against every later canary of the release.
        """
        now = self._drop_silent()
        found = [
            tally
            for status in self._statuses.values()
            if status.connected and now - status.last_heard <= SILENCE
            for tally in status.report.tallies
            if (tally.tenant, tally.channel, tally.digest) == (tenant, channel, digest)
        ]
        return CanaryTally(
            tenant,
            channel,
            digest,
            sum(t.requests for t in found),
            sum(t.errors for t in found),
            sum(t.non_finite for t in found),
        )

    def _drop_silent(self) -> float:
        """Drop readers that were silent for too long; returns the current time."""
        now = self._clock()
        for status in self._statuses.values():
            if isinstance(status.server, RemoteReader) and now - status.last_heard > SILENCE:
                status.connected = False
        self._statuses = {
            name: status
            for name, status in self._statuses.items()
            if status.connected or now - status.last_heard < FORGOTTEN
        }
        return now
