"""Waits until enough readers hold a change, and ends canaries that go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import structlog
from backpack_lm.counted import counted

from backpack_serving import tasks
from backpack_serving.auth.keys import Principal
from backpack_serving.errors import ServiceError
from backpack_serving.interventions.fleet import ReaderTracker, RolloutProgress, StatusReason
from backpack_serving.interventions.records import ChannelRecord
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.write_notifier import WriteNotifier
from backpack_serving.references import CanaryTally, Position, Refusal
from backpack_serving.sync.messages import FromReader, Hello, Nack, ReaderReport
from backpack_serving.sync.server import SyncServer

log = structlog.get_logger(__name__)

PUBLISH_SECONDS, GATHER_SECONDS = 1.0, 0.05
"""Seconds between two publications without a change, and for how long changes are batched into one."""

PUBLISHED_AT_ONCE = 100
"""Readers of one publication: streams wait while they are gathered."""

SILENT_SECONDS = 1.0
"""Most seconds until a call that waits for readers looks again, though it has heard of none."""

COUNT_SECONDS = 0.01
"""Least seconds between two counts of the readers for one call that waits for them."""


LOOK_SECONDS = 0.1
"""Seconds between two looks whether a release was judged: another process of the service may have been told."""


class Level(StrEnum):
    """How many of the connected replicas, and of the gateways, must hold a change before its answer is sent."""

    NONE = "none"
    QUORUM = "quorum"
    ALL = "all"

    def reached(self, rollout: RolloutProgress) -> bool:
        counts = rollout.replicas, rollout.gateways
        match self:
            case Level.NONE:
                return True
            case Level.QUORUM:
                return all(count.quorum() for count in counts)
            case Level.ALL:
                return all(count.all() for count in counts)

    def out_of_reach(self, rollout: RolloutProgress) -> bool:
        """Whether final refusals have made this level impossible. What is refused for now is tried again."""
        counts = rollout.replicas, rollout.gateways
        if self is Level.ALL:
            return any(count.final for count in counts)
        return any(count.final and 2 * count.final >= count.total for count in counts)


@dataclass(frozen=True, slots=True)
class ErrorGate:
    """Ends a canary after at least `requests` requests if more than `permille` in a thousand of them failed."""

    requests: int = 20
    permille: int = 50

    def verdict(self, tally: CanaryTally) -> str:
        """Why the canary must end; empty if it may go on."""
        if tally.non_finite:
            return f"NON_FINITE: {counted(tally.non_finite, 'answer was', 'answers were')} not numbers"
        failed = 1000 * tally.errors > self.permille * tally.requests
        if tally.requests >= self.requests and failed:
            return (
                f"ERROR_GATE: {tally.errors} of {tally.requests} requests failed; at most {self.permille} in a "
                "thousand may"
            )
        return ""


class Rollouts:
    """The readers, the calls that wait for them, and the guard of canaries."""

    def __init__(self, service: Interventions, gate: ErrorGate) -> None:
        self._service, self._gate = service, gate
        self.fleet = ReaderTracker()
        self._progress, self._standing_changed = WriteNotifier(), WriteNotifier()
        self._handled: dict[SyncServer, set[Refusal]] = {}  # current refusals that were already judged
        self._unpublished: set[SyncServer] = set()  # whose status has changed since it was published

    async def receive(self, server: SyncServer, message: FromReader) -> None:
        """Handle a message of a reader that its `SyncServer` has already processed."""
        if server.hello is None:
            return
        report = message if isinstance(message, ReaderReport) else None
        news = self.fleet.record(server, report) or not report
        for tally in report.tallies if report else ():
            await self._judge_canary(tally)
        handled = self._handled.get(server, set())
        if isinstance(message, Hello | Nack):  # judge these again: a canary may have begun since
            handled = handled.difference(message.refusals)
        standing = tuple(server.refusals.values())
        self._handled[server] = {r for r in standing if r in handled or await self._end_refused_canary(r)}
        if news:
            self._notify(server)

    def disconnect(self, server: SyncServer, error: ServiceError | None = None, hello: Hello | None = None) -> None:
        """Handle the end of a stream; `error` if the service ended it, `hello` is the stream's last Hello."""
        why = StatusReason(error.reason, error.message) if error else None
        if why and hello and server.hello is None:
            self.fleet.reject(hello, why)
        self.fleet.disconnect(server, why)
        self._handled.pop(server, None)
        self._unpublished.discard(server)
        self._notify()

    def receive_remote(self, hello: Hello, report: ReaderReport) -> None:
        """Handle the published status of another process's reader."""
        self.fleet.record_remote(hello, report)
        self._progress.notify_now()

    async def publish(self, publish_standing: Callable[[list[tuple[Hello, ReaderReport]]], None]) -> None:
        """Publish the status of this process's readers for ever: of all each second, of those that changed soon.

        No error ends it: the other processes would take these readers for disconnected.
        """
        loop = asyncio.get_running_loop()
        all_due = loop.time()
        while True:
            changed, everybody = self._standing_changed.next_write(), loop.time() >= all_due
            if everybody:
                all_due = loop.time() + PUBLISH_SECONDS
            some, self._unpublished = self._unpublished, set()
            names = self.fleet.known_incarnations if everybody else [s.hello.incarnation for s in some if s.hello]
            for first in range(0, len(names), PUBLISHED_AT_ONCE):
                if standing := self.fleet.local_standing(names[first : first + PUBLISHED_AT_ONCE]):
                    try:
                        await asyncio.to_thread(publish_standing, standing)
                    except ServiceError:
                        break  # the database is away, and the other processes with it
                    except Exception:
                        log.exception("a mistake of ours; going on")
            await asyncio.sleep(GATHER_SECONDS)
            await tasks.wait_at_most(changed, all_due - loop.time())

    async def wait(
        self, channel: ChannelRecord, position: Position, level: Level, seconds: float
    ) -> RolloutProgress | None:
        """Wait until enough readers hold a write, until they can't any more, or for so many seconds."""
        if level is Level.NONE:
            return None
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while True:
            progress = self._progress.next_write()
            rollout = self.fleet.rollout(channel, position)
            if level.reached(rollout) or level.out_of_reach(rollout) or loop.time() >= until:
                return rollout
            again = loop.time() + COUNT_SECONDS
            # Readers of other processes leave without a word.
            await tasks.wait_at_most(progress, min(SILENT_SECONDS, until - loop.time()))
            # All readers are counted once for the many that answer at the same time; the first answer at once, since a
            # refusal is over soon where it ends a canary.
            await asyncio.sleep(max(0.0, min(again, until) - loop.time()))

    async def wait_judged(self, who: Principal, release: int) -> None:
        """Wait until a release that was just made is judged, if there are a gateway and a replica to do that."""
        expected = self._service.judgements.expected
        while self.fleet.can_judge and (seconds := await asyncio.to_thread(expected, who, release)):
            await asyncio.sleep(min(seconds, LOOK_SECONDS))

    def _notify(self, server: SyncServer | None = None) -> None:
        if server is not None:
            self._unpublished.add(server)
        self._progress.notify_now()
        self._standing_changed.notify_now()

    async def _judge_canary(self, tally: CanaryTally) -> None:
        together = self.fleet.tally(tally.tenant, tally.channel, tally.digest)
        if why := self._gate.verdict(together):
            await self._end_canary(tally.tenant, tally.channel, tally.digest, why)

    async def _end_refused_canary(self, refusal: Refusal) -> bool:
        """End the canary that is refused, if it is one. False to try again later."""
        if not (refusal.final and refusal.channel):
            return True
        why = f"NACK: a reader refuses it: {refusal.reason}: {refusal.message}"
        return await self._end_canary(refusal.tenant, refusal.channel, refusal.digest, why)

    async def _end_canary(self, tenant: str, channel: str, digest: str, why: str) -> bool:
        """End a canary, if this release is one. False if the database is away."""
        try:
            ended = await asyncio.to_thread(self._service.channels.end_bad_canary, tenant, channel, digest, why)
        except ServiceError as error:  # the database is away: the next report leads here again
            log.error(
                "can't end a canary: the database is unavailable; will retry",
                tenant=tenant,
                channel=channel,
                why=why,
                error=error.why or error.message,
            )
            return False
        if ended:
            log.warning("a canary was ended", tenant=tenant, channel=channel, digest=digest, why=why)
        return True
