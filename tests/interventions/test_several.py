"""Several processes of the service on one PostgreSQL: each knows of all readers, whichever of them they follow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from backpack_lm.manifest import Manifest
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_proto.v1 import sync_pb2 as spb
from backpack_serving.interventions import bootstrap
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.store import MAX_MESSAGE_BYTES
from backpack_serving.observability.metrics import Metrics
from backpack_serving.references import CanaryTally, Position, ReaderKind, Refusal
from backpack_serving.settings import Settings
from backpack_serving.sync.messages import Hello, ReaderReport
from backpack_serving.sync.server import LONGEST_NAME
from backpack_serving.sync.standing import read_standing, write_standing
from backpack_serving.sync.state import Stageable

from tests.e2e.conftest import System, copy
from tests.promises.follower import Follower
from tests.waiting import eventually


class Refusing(Follower):
    """A reader that refuses every release but those without patches."""

    async def stage(self, work: tuple[Stageable, ...]) -> tuple[Refusal, ...]:
        return tuple(
            Refusal(*change.key, change.serving[0].digest, "NON_FINITE", "no numbers")
            for change in work
            if change.serving[0].number
        )


@asynccontextmanager
async def two(state: Path, database: str) -> AsyncIterator[tuple[Settings, list[System]]]:
    settings = Settings(state=state, database=database, drain=0.2, interventions_address="127.0.0.1:0")
    running = [await bootstrap.start(settings, Metrics()) for _ in range(2)]
    systems = [System(one.address, one.address, settings) for one in running]
    yield settings, systems
    for system in systems:
        await system.close()
    for one in running:
        await one.stop()


def _follow(kind: type[Follower], what: ReaderKind, system: System, name: str) -> Follower:
    settings = system.settings
    fingerprint = Manifest.read(settings.model).fingerprint
    file = settings.state / name / "view"
    return kind(what, system.interventions, settings.key_for("replica"), file, fingerprint)


async def _tenant(system: System) -> Any:
    await system.tenants.CreateTenant(ipb.CreateTenantRequest(tenant_id="acme"), metadata=system.admin)
    request = ipb.CreateApiKeyRequest(parent="tenants/acme", roles=[ipb.ROLE_RELEASER])
    secret = (await system.tenants.CreateApiKey(request, metadata=system.admin)).secret
    key = (("authorization", f"Bearer {secret}"),)
    await system.patches.CreatePatch(ipb.CreatePatchRequest(patch_id="p"), metadata=key)
    return key


async def _three(one: System, other: System, third: type[Follower]) -> tuple[Any, int, list[Follower]]:
    """A tenant's key, a release of it, and readers: gateway and replica of one process, a third of the other."""
    key = await _tenant(one)
    release = await one.release(key, copy("king", "ship"))
    followers = [
        _follow(Follower, ReaderKind.GATEWAY, one, "gateway"),
        _follow(Follower, ReaderKind.REPLICA, one, "here"),
        _follow(third, ReaderKind.REPLICA, other, "there"),
    ]
    for follower in followers:
        await follower.start()
    return key, release, followers


async def _connected(system: System) -> int:
    answer = await system.fleet.ListReaders(spb.ListReadersRequest(), metadata=system.admin)
    return sum(reader.connected for reader in answer.readers)


async def _activate(system: System, key: Any, release: int) -> tuple[ipb.Rollout, float]:
    """Through one process, waiting for all readers; how far it came, and the seconds it took."""
    now = await system.releases.GetChannel(ipb.GetChannelRequest(name="channels/live"), metadata=key)
    request = ipb.ActivateRequest(channel="channels/live", release=release, etag=now.channel.etag, wait=ipb.WAIT_ALL)
    request.wait_timeout.FromSeconds(40)
    started = time.monotonic()
    answer = await system.releases.Activate(request, metadata=key)
    return answer.rollout, time.monotonic() - started


async def test_a_wait_counts_the_readers_of_every_process_and_forgets_those_that_left(
    tmp_path: Path, postgres_url: str
) -> None:
    async with two(tmp_path, postgres_url) as (_, (one, other)):
        key, release, followers = await _three(one, other, Follower)
        for system in (one, other):
            await eventually(lambda system=system: _all_of(system, 3))  # type: ignore[misc]
        followers[2].slow = 1.0
        rollout, seconds = await _activate(one, key, release)
        assert (rollout.complete, rollout.replicas, rollout.replicas_acked) == (True, 2, 2)
        assert seconds >= 1, "the slow one follows the other process"
        rollout, _ = await _activate(other, key, 0)
        assert (rollout.complete, rollout.replicas, rollout.gateways) == (True, 2, 1)
        await followers[2].stop()
        await eventually(lambda: _all_of(one, 2))
        rollout, _ = await _activate(one, key, release)
        assert (rollout.complete, rollout.replicas) == (True, 1)
        for follower in followers[:2]:
            await follower.stop()


async def _all_of(system: System, count: int) -> bool:
    return await _connected(system) == count


async def test_a_refusal_to_one_process_ends_a_wait_at_another(tmp_path: Path, postgres_url: str) -> None:
    async with two(tmp_path, postgres_url) as (_, (one, other)):
        key, release, followers = await _three(one, other, Refusing)
        await eventually(lambda: _all_of(one, 3))
        rollout, seconds = await _activate(one, key, release)
        assert (rollout.complete, rollout.replicas) == (False, 2)
        assert rollout.replicas_acked < 2, "one refuses; the other may not have answered yet"
        assert "NON_FINITE" in rollout.refusals[0]
        assert seconds < 30, "it can't become complete any more, so nobody waits for it"
        for follower in followers:
            await follower.stop()


async def test_where_a_reader_stands_is_read_as_it_was_written_and_fits_a_notice() -> None:
    refusals = [Refusal("acme", f"c{n}", "ab" * 32, "NON_FINITE", "no numbers" * 10) for n in range(60)]
    tallies = (CanaryTally("acme", "live", "cd" * 32, 7, 2, 1),)
    hello = Hello(ReaderKind.REPLICA, "i1", "r", "ef" * 32, Position(2, 9), refusals=tuple(refusals[:2]))
    assert read_standing(write_standing(hello, ReaderReport(tallies=tallies), MAX_MESSAGE_BYTES - 100)) == (
        hello,
        ReaderReport(tallies=tallies),
    )
    many = Hello(ReaderKind.REPLICA, "i1", "r", "ef" * 32, Position(2, 9), refusals=tuple(refusals))
    text = write_standing(many, ReaderReport(tallies=tallies), MAX_MESSAGE_BYTES - 100)
    assert len(text) < MAX_MESSAGE_BYTES
    told, _ = read_standing(text)
    assert (told.position, told.incarnation) == (Position(), "i1"), "who can't be told of in full holds nothing"


async def test_names_that_the_service_takes_fit_a_notice_and_longer_ones_are_an_error() -> None:
    """The longest characters there are, in UTF-8."""
    longest = "\U0001f600" * LONGEST_NAME
    hello = Hello(ReaderKind.REPLICA, longest, longest, "ef" * 32, Position(2**62, 2**62))
    tallies = tuple(CanaryTally(f"tenant-{n}", "live", "cd" * 32, 1000, 3) for n in range(60))
    told, _ = read_standing(write_standing(hello, ReaderReport(tallies=tallies), MAX_MESSAGE_BYTES - 100))
    assert (told.name, told.incarnation) == (longest, longest)
    with pytest.raises(ValueError, match="at most 7800"):
        write_standing(replace(hello, name=longest * 4), ReaderReport(tallies=tallies), MAX_MESSAGE_BYTES - 100)


async def test_a_gateway_under_more_canaries_than_a_notice_holds_is_told_of_with_fewer_counts() -> None:
    hello = Hello(ReaderKind.GATEWAY, "ab" * 16, "gateway-7f9c-abcde:8470", "ef" * 32, Position(2, 9))
    for number in (60, 70, 1000):
        tallies = tuple(CanaryTally(f"tenant-{n}", "live", "cd" * 32, 1000, 3) for n in range(number))
        text = write_standing(hello, ReaderReport(tallies=tallies), MAX_MESSAGE_BYTES - 100)
        assert len(text) < MAX_MESSAGE_BYTES
        told, report = read_standing(text)
        assert told == hello
        assert report.tallies == tallies[: len(report.tallies)]
        assert len(report.tallies) >= 30, "as many as half a notice holds, at least"


async def test_what_is_told_reaches_the_others_and_not_oneself(postgres_url: str) -> None:
    one, other = open_store(postgres_url), open_store(postgres_url)
    heard: dict[str, list[str]] = {"one": [], "other": []}
    one.listen(lambda: None, print, heard["one"].append)
    other.listen(lambda: None, print, heard["other"].append)

    async def arrived() -> bool:
        await asyncio.to_thread(one.publish, ["a", "b c"])
        return bool(heard["other"])

    try:
        await eventually(arrived)
        assert set(heard["other"]) == {"a", "b c"}
        assert heard["one"] == []
    finally:
        one.close()
        other.close()
