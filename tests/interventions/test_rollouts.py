"""Canaries that readers refuse: each refusal is looked into, and none again and again."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
from backpack_proto.v1 import sync_pb2
from backpack_serving import tasks
from backpack_serving.auth.keys import Principal
from backpack_serving.client.channels import Status
from backpack_serving.errors import InvalidRequest, Unavailable
from backpack_serving.interventions.event_history import EventHistory
from backpack_serving.interventions.fleet_wire import write_hold
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.interventions.records import ChannelRecord
from backpack_serving.interventions.rollouts import PUBLISHED_AT_ONCE, ErrorGate, Level, Rollouts
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.store import Read, Store
from backpack_serving.interventions.wire import write_channel
from backpack_serving.references import LIVE, Position, ReaderKind, Refusal
from backpack_serving.sync.messages import Ack, FromReader, Hello, Nack, ReaderReport
from backpack_serving.sync.server import LONGEST_NAME, SyncServer

from tests.interventions.conftest import HALVE, SHAPE


class Reads:
    """A store whose reads are counted, and fail while it is away."""

    def __init__(self, store: Store, patch: pytest.MonkeyPatch) -> None:
        self.count, self.away = 0, False
        read: Callable[..., AbstractContextManager[Read]] = store.read

        def counted(tenant: str | None = None) -> AbstractContextManager[Read]:
            self.count += 1
            if self.away:
                raise Unavailable("DATABASE", "the database failed")
            return read(tenant)

        patch.setattr(store, "read", counted)


class Stream:
    """A reader's, to a service; what it says is taken in as from a stream."""

    def __init__(
        self, service: Interventions, kind: ReaderKind = ReaderKind.REPLICA, rollouts: Rollouts | None = None
    ) -> None:
        self.server, self._kind = SyncServer(EventHistory(service), itertools.count(1)), kind
        self._rollouts = rollouts or Rollouts(service, ErrorGate())

    async def say(self, message: FromReader) -> None:
        self.server.receive(message, 0.0)
        await self._rollouts.receive(self.server, message)

    async def hello(self, service: Interventions, *refusals: Refusal) -> None:
        at, _ = service.events.snapshot()
        await self.say(Hello(self._kind, self._kind.name, "r", SHAPE.fingerprint, at, refusals=refusals))


async def test_p12_what_a_replica_refuses_is_looked_into_once(
    store: Store, service: Interventions, acme: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reported each second: with a thousand such channels the store would do nothing else."""
    refusals = tuple(Refusal("acme", f"c{n}", "ab" * 32, "WRONG_MODEL", "of another model") for n in range(20))
    stream = Stream(service)
    await stream.hello(service, *refusals)
    reads = Reads(store, monkeypatch)
    for _ in range(3):
        await stream.say(ReaderReport(refusals))
    assert reads.count == 0
    more = Refusal("acme", "more", "ab" * 32, "WRONG_MODEL", "of another model")
    for _ in range(3):
        await stream.say(ReaderReport((*refusals, more)))
    assert reads.count == 1


@pytest.mark.parametrize("level", [Level.QUORUM, Level.ALL])
async def test_a_wait_outlasts_what_is_refused_for_now_and_no_final_refusal(
    service: Interventions, acme: Principal, level: Level
) -> None:
    """A replica refuses the first topics for as long as it computes what they need."""
    rollouts = Rollouts(service, ErrorGate())
    replica, gateway = (Stream(service, kind, rollouts) for kind in (ReaderKind.REPLICA, ReaderKind.GATEWAY))
    for stream in (replica, gateway):
        await stream.hello(service)
    service.patches.create_revision(acme, "debias", [HALVE], IdempotencyKey())
    release = service.releases.create_release(acme, [("debias", 1)], "", IdempotencyKey()).record
    etag = service.channels.get_channel(acme, LIVE).etag
    service.channels.activate(acme, LIVE, release.number, etag, IdempotencyKey())
    position, channel = service.channels.channel_now(acme, LIVE)
    for_now = Refusal("acme", LIVE, release.digest, "TOPICS_NOT_READY", "not yet", final=False)
    (delta,) = gateway.server.pump(0.0)
    await gateway.say(Ack(delta.nonce))  # type: ignore[union-attr]
    (delta,) = replica.server.pump(0.0)
    await replica.say(Nack(delta.nonce, (for_now,)))  # type: ignore[union-attr]
    rollout = await rollouts.wait(channel, position, level, 0.0)
    assert rollout is not None
    assert (rollout.replicas.nacked, level.reached(rollout), level.out_of_reach(rollout)) == (1, False, False)
    assert _status(rollouts, channel, position).refused(level.value) == (), "nor does a client give up"
    waiting = asyncio.create_task(rollouts.wait(channel, position, level, 60.0))
    await replica.say(ReaderReport())
    rollout = await waiting
    assert rollout is not None
    assert level.reached(rollout)
    await replica.say(ReaderReport((replace(for_now, final=True),)))
    rollout = await rollouts.wait(channel, position, level, 60.0)
    assert rollout is not None
    assert level.out_of_reach(rollout)
    assert len(_status(rollouts, channel, position).refused(level.value)) == 1


def _status(rollouts: Rollouts, channel: ChannelRecord, position: Position) -> Status:
    """As a client gets it."""
    holds = map(write_hold, rollouts.fleet.holds(channel, position, rollouts.fleet.readers()))
    return Status.of(sync_pb2.GetRolloutResponse(channel=write_channel(channel), holds=holds))


@pytest.mark.parametrize("field", ["name", "incarnation"])
async def test_a_reader_whose_name_is_too_long_is_refused_and_not_kept(service: Interventions, field: str) -> None:
    at, _ = service.events.snapshot()
    stream, hello = Stream(service), Hello(ReaderKind.REPLICA, "i", "r", SHAPE.fingerprint, at)
    with pytest.raises(InvalidRequest, match=f"hello.{field}: .* has 513 characters; at most 512"):
        await stream.say(replace(hello, **{field: "x" * (LONGEST_NAME + 1)}))  # type: ignore[arg-type]
    assert (stream.server.hello, stream.server.last_hello) == (None, None)
    await stream.say(replace(hello, **{field: "x" * LONGEST_NAME}))  # type: ignore[arg-type]
    assert stream.server.hello is not None


async def test_all_readers_are_published_some_at_a_time(service: Interventions) -> None:
    rollouts, loop, at = Rollouts(service, ErrorGate()), asyncio.get_running_loop(), service.events.snapshot()[0]
    names = {f"r{number}" for number in range(2 * PUBLISHED_AT_ONCE + 50)}
    for name in names:
        stream = Stream(service, rollouts=rollouts)
        await stream.say(Hello(ReaderKind.REPLICA, name, name, SHAPE.fingerprint, at))
    published: list[set[str]] = []
    away, whole = [True], asyncio.Event()

    def publish(standing: list[tuple[Hello, ReaderReport]]) -> None:
        published.append({hello.name for hello, _ in standing})
        if away:
            away.pop()
            raise Unavailable("DATABASE", "the database failed")
        if set.union(*published[1:]) == names:
            loop.call_soon_threadsafe(whole.set)

    publishing = asyncio.create_task(rollouts.publish(publish))
    async with asyncio.timeout(20):
        await whole.wait()
    await tasks.end(publishing)
    assert max(map(len, published)) == PUBLISHED_AT_ONCE
    assert [len(some) for some in published[1:4]] == [100, 100, 50], (
        "a round after the database was away is a whole one"
    )


@pytest.mark.parametrize("count", [0, 1, 100, 101, 250])
async def test_work_in_slices_leaves_nothing_out_and_lets_others_run(count: int) -> None:
    turns, going = [0], True

    async def others() -> None:
        while going:
            turns[0] += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(others())
    await asyncio.sleep(0)
    before = turns[0]
    assert await tasks.in_slices(lambda n: 2 * n, range(count)) == [2 * n for n in range(count)]
    assert turns[0] - before == count // 100
    going = False
    await counting


async def test_publishing_goes_on_after_a_mistake(service: Interventions) -> None:
    rollouts = Rollouts(service, ErrorGate())
    stream, published, loop = Stream(service, rollouts=rollouts), asyncio.Event(), asyncio.get_running_loop()
    await stream.hello(service)
    mistakes = [RecursionError("a mistake")]

    def publish(standing: list[tuple[Hello, ReaderReport]]) -> None:
        if mistakes:
            raise mistakes.pop()
        loop.call_soon_threadsafe(published.set)

    publishing = asyncio.create_task(rollouts.publish(publish))
    waiting = asyncio.create_task(published.wait())
    await asyncio.wait([publishing, waiting], return_when=asyncio.FIRST_COMPLETED)
    assert published.is_set()
    await tasks.end(publishing, waiting)


async def test_p12_a_canary_that_was_refused_before_ends_when_it_is_refused_again(
    store: Store, service: Interventions, acme: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.patches.create_revision(acme, "debias", [HALVE], IdempotencyKey())
    release = service.releases.create_release(acme, [("debias", 1)], "", IdempotencyKey()).record
    refusal = Refusal("acme", LIVE, release.digest, "NON_FINITE", "no numbers")
    stream = Stream(service)
    await stream.hello(service, refusal)
    for away in (False, True):
        etag = service.channels.get_channel(acme, LIVE).etag
        service.channels.start_canary(acme, LIVE, release.number, 500, "", etag, IdempotencyKey())
        (delta,) = stream.server.pump(0.0)
        reads = Reads(store, monkeypatch)
        reads.away = away
        await stream.say(Nack(delta.nonce, (refusal,)))  # type: ignore[union-attr]
        reads.away = False
        await stream.say(
            ReaderReport((refusal,))
        )  # of which the service knows that it must look, if it couldn't before
        assert "NON_FINITE" in service.channels.get_channel(acme, LIVE).aborted
        (delta,) = stream.server.pump(0.0)
        await stream.say(Ack(delta.nonce))  # type: ignore[union-attr]
