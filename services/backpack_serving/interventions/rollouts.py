"""How changes reach the fleet: waiting until enough readers hold one, and ending canaries that go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

import structlog
from backpack_lm.counted import counted

from backpack_serving import tasks
from backpack_serving.errors import ServiceError
from backpack_serving.interventions.fleet import ReaderTracker, RolloutProgress, Why
from backpack_serving.interventions.records import ChannelRecord, Position
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.write_notifier import WriteNotifier
from backpack_serving.references import CanaryTally, Refusal
from backpack_serving.sync.messages import FromReader, Hello, Nack, ReaderReport
from backpack_serving.sync.server import SyncServer

log = structlog.get_logger(__name__)

PUBLISH_SECONDS, GATHER_SECONDS = 1.0, 0.05
"""How often other processes are told at least, and for how long changes are gathered for one telling."""


class Level(StrEnum):
    """Who must hold a change before its answer is sent: of the connected replicas, and of the gateways."""

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
        """Whether refusals have made it impossible already."""
        counts = rollout.replicas, rollout.gateways
        if self is Level.ALL:
            return any(count.nacked for count in counts)
        return any(count.nacked and 2 * count.nacked >= count.total for count in counts)


@dataclass(frozen=True, slots=True)
class ErrorGate:
    """A canary ends when at least `requests` were made under it and more than `permille` of them failed."""

    requests: int = 20
    permille: int = 50

    def verdict(self, tally: CanaryTally) -> str:
        """Why the canary must end; empty if it needn't."""
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
    """The fleet, with who waits for it and who guards it."""

    def __init__(self, service: Interventions, gate: ErrorGate) -> None:
        self._service, self._gate = service, gate
        self.fleet = ReaderTracker()
        self._progress, self._standing_changed = WriteNotifier(), WriteNotifier()
        self._handled: dict[SyncServer, set[Refusal]] = {}  # of what stands, what was looked into

    async def receive(self, server: SyncServer, message: FromReader) -> None:
        """A reader has spoken, and the session has taken it in."""
        if server.hello is None:
            return
        report = message if isinstance(message, ReaderReport) else None
        self.fleet.record(server, report)
        for tally in report.tallies if report else ():
            await self._judge_canary(tally)
        handled = self._handled.get(server, set())
        if isinstance(message, Hello | Nack):  # told anew: since it was told before, a canary may have begun
            handled = handled.difference(message.refusals)
        standing = tuple(server.refusals.values())
        self._handled[server] = {r for r in standing if r in handled or await self._end_refused_canary(r)}
        self._notify()

    def disconnect(self, server: SyncServer, error: ServiceError | None = None, hello: Hello | None = None) -> None:
        """A stream has ended, by this refusal of ours; `hello` is what it had begun with."""
        why = Why(error.reason, error.message) if error else None
        if why and hello and server.hello is None:
            self.fleet.reject(hello, why)
        self.fleet.disconnect(server, why)
        self._handled.pop(server, None)
        self._notify()

    def receive_remote(self, hello: Hello, report: ReaderReport) -> None:
        """Another process of the service has heard of a reader of its own."""
        self.fleet.record_remote(hello, report)
        self._progress.notify_now()

    async def publish(self, publish_standing: Callable[[list[tuple[Hello, ReaderReport]]], None]) -> None:
        """Tell the other processes where the readers here stand, for ever: each second, and when that changes."""
        while True:
            changed = self._standing_changed.next_write()
            if standing := self.fleet.local_standing():
                with suppress(ServiceError):  # the database is away: so are the others
                    await asyncio.to_thread(publish_standing, standing)
            await asyncio.sleep(GATHER_SECONDS)
            await tasks.wait_at_most(changed, PUBLISH_SECONDS)

    async def wait(
        self, channel: ChannelRecord, position: Position, level: Level, seconds: float
    ) -> RolloutProgress | None:
        """How far a write has come when enough readers hold it, when they can't any more, or after so long."""
        if level is Level.NONE:
            return None
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while True:
            progress = self._progress.next_write()
            rollout = self.fleet.rollout(channel, position)
            if level.reached(rollout) or level.out_of_reach(rollout) or loop.time() >= until:
                return rollout
            await tasks.wait_at_most(progress, until - loop.time())

    def _notify(self) -> None:
        self._progress.notify_now()
        self._standing_changed.notify_now()

    async def _judge_canary(self, tally: CanaryTally) -> None:
        together = self.fleet.tally(tally.tenant, tally.channel, tally.digest)
        if why := self._gate.verdict(together):
            await self._end_canary(tally.tenant, tally.channel, tally.digest, why)

    async def _end_refused_canary(self, refusal: Refusal) -> bool:
        """End the canary that is refused, if it is one. Whether that is settled."""
        if not (refusal.final and refusal.channel):
            return True
        why = f"NACK: a reader refuses it: {refusal.reason}: {refusal.message}"
        return await self._end_canary(refusal.tenant, refusal.channel, refusal.digest, why)

    async def _end_canary(self, tenant: str, channel: str, digest: str, why: str) -> bool:
        """End a canary, if this is one. False if that can't be done now."""
        try:
            ended = await asyncio.to_thread(self._service.channels.end_bad_canary, tenant, channel, digest, why)
        except ServiceError as error:  # the database is away: the next report brings it up again
            log.error(
                "a canary should have ended",
                tenant=tenant,
                channel=channel,
                why=why,
                error=error.why or error.message,
            )
            return False
        if ended:
            log.warning("a canary was ended", tenant=tenant, channel=channel, digest=digest, why=why)
        return True
