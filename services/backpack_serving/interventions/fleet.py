"""Who follows the service, and who holds which release. In memory: after a restart all readers say Hello again.

Several processes of the service may share a database. Each tells the others where its own readers stand, each
second and when that changes; who isn't told of for SILENCE seconds isn't connected any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

from backpack_serving.interventions.records import ChannelRecord, Position
from backpack_serving.references import CanaryTally, ReaderKind, Refusal, ReleaseRef
from backpack_serving.sync.messages import SILENCE, Hello, ReaderReport
from backpack_serving.sync.server import SyncServer

FORGOTTEN = 60.0
"""Seconds after which a reader that is gone isn't listed any more."""


class HoldState(StrEnum):
    """How a reader stands to a release of a channel."""

    STAGED = "staged"
    ACKED = "acked"
    NACKED = "nacked"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Why:
    """Why a reader doesn't hold what it should: a stable word, and the details."""

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
    why: Why | None = None


@dataclass(frozen=True, slots=True)
class AckCount:
    """Of the readers of one kind that are connected: how many there are, and how many hold a change."""

    total: int
    acked: int
    nacked: int

    def quorum(self) -> bool:
        return 2 * self.acked > self.total

    def all(self) -> bool:
        return 0 < self.total == self.acked


@dataclass(frozen=True, slots=True)
class RolloutProgress:
    """How far one write has come."""

    replicas: AckCount
    gateways: AckCount
    refusals: tuple[tuple[str, Refusal], ...]


@dataclass(frozen=True, slots=True)
class RemoteReader:
    """A reader's stream to another process of the service, as that one told lately."""

    hello: Hello
    acked: Position
    refusals: dict[tuple[str, str], Refusal]
    digests: frozenset[str] = frozenset()  # too long to be told


@dataclass(slots=True)
class ReaderStatus:
    """One reader process: its newest stream, what it said Hello with there, and when it was heard last.

    `refused` is why the service ended its last stream, if it did, until a stream lives again.
    """

    server: SyncServer | RemoteReader
    hello: Hello
    last_heard: float
    connected: bool = True
    report: ReaderReport = field(default_factory=ReaderReport)
    refused: Why | None = None

    def out_of_touch(self, silence: float) -> Why | None:
        """Why it isn't in touch; None if it is."""
        if self.connected and silence <= SILENCE:
            return None
        heard = f"last heard {silence:.0f} s ago"
        if self.connected:
            return Why("SILENT", f"its stream is open, but half so: {heard}")
        if self.refused:
            return Why(self.refused.reason, f"{self.refused.message} ({heard})")
        return Why("DISCONNECTED", f"it has no stream to the intervention service: {heard}")

    @property
    def releases(self) -> int:
        """How many it has ready; as its stream's Hello said until it reports."""
        return self.report.releases or len(self.server.digests)


class ReaderTracker:
    """All readers, by incarnation."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._statuses: dict[str, ReaderStatus] = {}

    def record(self, server: SyncServer | RemoteReader, report: ReaderReport | None = None) -> None:
        """A stream has said something. A newer stream of the same process takes the place of an older one."""
        hello = server.hello
        assert hello is not None, "nothing is heard before Hello"
        status = self._statuses.get(hello.incarnation)
        if status is None:
            self._drop_silent()  # or those that come and go would pile up while nobody asks for readers
        if status is None or status.server is not server:
            before = status.refused if status else None
            self._statuses[hello.incarnation] = status = ReaderStatus(server, hello, self._clock(), refused=before)
        status.hello, status.last_heard, status.connected = hello, self._clock(), True
        if report:
            status.report, status.refused = report, None

    def record_remote(self, hello: Hello, report: ReaderReport) -> None:
        """Another process of the service tells where a reader stands: it holds all up to `hello.position`."""
        status = self._statuses.get(hello.incarnation)
        if status is None or not status.connected or isinstance(status.server, RemoteReader):
            refusals = {refusal.key: refusal for refusal in hello.refusals}
            self.record(RemoteReader(hello, hello.position, refusals), report)

    def local_standing(self) -> list[tuple[Hello, ReaderReport]]:
        """Where this process's own readers stand, as the others take it in with `record_remote`."""
        found = []
        for status in self._statuses.values():
            if status.connected and isinstance(status.server, SyncServer):
                refusals = tuple(status.server.refusals.values())
                hello = replace(status.hello, position=status.server.acked, refusals=refusals, digests=frozenset())
                found.append((hello, ReaderReport(tallies=status.report.tallies, releases=status.releases)))
        return found

    def disconnect(self, server: SyncServer, why: Why | None = None) -> None:
        """A stream has ended; `why`, if the service ended it."""
        for status in self._statuses.values():
            if status.server is server:
                status.connected = False
                status.refused = why or status.refused

    def reject(self, hello: Hello, why: Why) -> None:
        """A reader's Hello was refused: it has no stream, and is listed all the same."""
        if hello.incarnation:
            self._drop_silent()
            nothing = RemoteReader(hello, hello.position, {}, hello.digests)
            self._statuses[hello.incarnation] = ReaderStatus(
                nothing, hello, self._clock(), connected=False, refused=why
            )

    def readers(self) -> list[tuple[ReaderStatus, float]]:
        """Those seen lately, replicas first, with the seconds since they were heard."""
        now = self._drop_silent()
        ordered = sorted(self._statuses.values(), key=lambda s: (s.hello.kind is ReaderKind.GATEWAY, s.hello.name))
        return [(status, now - status.last_heard) for status in ordered]

    def holds(self, channel: ChannelRecord, position: Position) -> Iterator[ReleaseHolding]:
        """How every reader stands to a channel's releases, given where the store stands."""
        moved = Position(position.epoch, channel.moved)
        releases = [(release, release != channel.state.stable) for release in channel.state.serving]
        for status, silence in self.readers():
            server, hello = status.server, status.hello
            away = status.out_of_touch(silence)
            behind = Why("BEHIND", f"it is at {server.acked}, and the channel was moved at {moved}")
            for release, canary in releases:
                refusal = server.refusals.get((channel.tenant, channel.channel))
                if refusal is None or refusal.digest != release.digest:
                    refusal = server.refusals.get((channel.tenant, ""))
                if refusal is not None and refusal.digest != release.digest:
                    refusal = None
                why: Why | None
                if away:
                    state, why = HoldState.STALE, away
                elif refusal:
                    state, why = HoldState.NACKED, Why(refusal.reason, refusal.message)
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
        """How many of the connected readers have taken the write at this position, which moved the channel."""
        refusals, counts = [], {}
        for kind in ReaderKind:
            connected = [s for s, _ in self.readers() if s.connected and s.hello.kind is kind]
            acked = nacked = 0
            for status in connected:
                if status.server.acked < position:
                    continue
                if refusal := status.server.refusals.get((channel.tenant, channel.channel)):
                    nacked += 1
                    refusals.append((status.hello.name, refusal))
                else:
                    acked += 1
            counts[kind] = AckCount(len(connected), acked, nacked)
        return RolloutProgress(counts[ReaderKind.REPLICA], counts[ReaderKind.GATEWAY], tuple(refusals))

    def tally(self, tenant: str, channel: str, digest: str) -> CanaryTally:
        """What the gateways that are connected counted under a release of a channel, together.

        Not what one counted that is gone: that was judged when it was reported, and would count against every
        later canary of the release, because only a gateway that lives forgets what it counted when a canary ends.
        """
        found = [
            tally
            for status, silence in self.readers()
            if status.connected and silence <= SILENCE
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
        """Let go of those that were silent for too long; the time."""
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
