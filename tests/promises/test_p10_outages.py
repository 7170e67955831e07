"""P10: with the service away, what was known last is served, and its age is told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e.conftest import Metadata, System, copy
from tests.promises.conftest import Apart, apart
from tests.waiting import eventually

PROMPT = "The story of the king and the"


async def _text(system: System, key: Metadata, **more: object) -> tuple[str, str]:
    parts = await system.stream(key, PROMPT, max_tokens=8, seed=1, temperature=0.0)
    return "".join(p.text for p in parts), parts[0].served.release_digest


async def _age(system: System, key: Metadata) -> float:
    parts = await system.stream(key, PROMPT, max_tokens=1)
    return float(parts[0].served.staleness.ToMilliseconds()) / 1000


async def _health(parts: Apart, service: str) -> int:
    assert parts.gateway is not None
    channel = rpc.channel(parts.gateway.address)
    try:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)
    finally:
        await channel.close()


@pytest.mark.parametrize("fault", ["reset", "refuse", "half_open"])
async def test_p10_traffic_cut_is_served_from_what_was_known_and_its_age_is_told(tmp_path: Path, fault: str) -> None:
    async with apart(tmp_path, stale_after=2.0) as parts:
        system = parts.system()
        key = await system.tenant(copy("king", "ship"))
        before = await _text(system, key)
        await eventually(lambda: _fresh(system, key))
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        await eventually(lambda: _says(parts, "backpack.v1.SyncService", serving))
        if fault == "reset":
            for _ in range(20):  # it comes back each time
                parts.proxy.reset()
                assert await _text(system, key) == before
                await asyncio.sleep(0.05)
            assert parts.proxy.connections > 2
        else:
            getattr(parts.proxy, fault)()
            served = 0
            while await _age(system, key) < 2.5:
                assert await _text(system, key) == before
                served += 1
            assert served > 5
            await eventually(lambda: _says(parts, "backpack.v1.SyncService", not_serving))
            assert await _health(parts, "") == serving, "it still serves"
        # What is decided meanwhile arrives when the way is free again.
        await system.activate(key, await system.release(key, copy("king", "nurse")))
        parts.proxy.heal()
        await eventually(lambda: _differs(system, key, before))
        await eventually(lambda: _fresh(system, key))


async def _fresh(system: System, key: Metadata) -> bool:
    return await _age(system, key) < 2


async def _says(parts: Apart, service: str, status: int) -> bool:
    return await _health(parts, service) == status


async def _differs(system: System, key: Metadata, before: tuple[str, str]) -> bool:
    return (await _text(system, key))[1] != before[1]


async def test_p10_cold_start_with_the_service_away_and_damaged_files(tmp_path: Path) -> None:
    async with apart(tmp_path) as parts:
        system = parts.system()
        keys = [await system.tenant(copy("king", word)) for word in ("ship", "nurse")]
        before = [await _text(system, key) for key in keys]
        await system.tenant()  # the generation before the newest one has both of them
        view = tmp_path / "known-good" / "gateway" / "view"
        assert view.exists()
        parts.proxy.refuse()

        async def restarted() -> System:
            await parts.end()
            await parts.start()
            return parts.system()

        # Everything that serves was restarted, the service is away: the same answers as before, and their age.
        await asyncio.sleep(1.5)
        system = await restarted()
        assert [await _text(system, key) for key in keys] == before
        assert parts.replica is not None
        assert parts.replica.releases.fetched == 0
        assert await _age(system, keys[0]) > 1

        # The newest generation of the view is damaged: the one before it is served. A release on the replica's
        # disk is damaged: its tenant is refused, and nobody gets anything else.
        view.write_bytes(view.read_bytes()[:-7])
        blob = tmp_path / "known-good" / "replica" / "releases" / before[0][1]
        data = bytearray(blob.read_bytes())
        data[-3] ^= 1
        blob.write_bytes(bytes(data))
        system = await restarted()
        assert await _text(system, keys[1]) == before[1]
        for _ in range(3):
            with pytest.raises(ServiceError) as refused, rpc.errors():
                await _text(system, keys[0])
            assert (refused.value.code, refused.value.reason) == ("UNAVAILABLE", "RELEASE_UNREACHABLE")
            assert await _text(system, keys[1]) == before[1], "who has a release is served as before"

        # Nothing on disk is whole: nobody is served, and told why.
        for path in view.parent.iterdir():
            path.write_bytes(b"damaged")
        system = await restarted()
        with pytest.raises(ServiceError) as refused, rpc.errors():
            await _text(system, keys[0])
        assert (refused.value.code, refused.value.reason) == ("UNAVAILABLE", "STARTING")

        # The service is back: so is everything.
        parts.proxy.heal()
        assert [await eventually(lambda key=key: _text(system, key)) for key in keys] == before  # type: ignore[misc]


async def test_a_tenant_is_told_nothing_of_what_is_wrong_between_parts(tmp_path: Path) -> None:
    """Of a release that no channel is at: neither where the service is, nor that a gateway's key isn't good."""
    async with apart(tmp_path) as parts:
        system = parts.system()
        key = await system.tenant(copy("king", "ship"))
        numbers = [await system.release(key, copy("king", word)) for word in ("sea", "nurse", "doctor", "land")]

        async def compare(number: int) -> bool:
            choice, prompt = pb.ReleaseChoice(number=number), pb.Prompt(text=PROMPT)
            with rpc.errors():
                await system.inference.Compare(pb.CompareRequest(prompt=prompt, releases=[choice]), metadata=key)
            return True

        await compare(numbers[0])
        parts.proxy.refuse()
        with pytest.raises(ServiceError) as refused:
            await compare(numbers[1])
        assert (refused.value.code, refused.value.reason) == ("UNAVAILABLE", "NOT_RESOLVED")
        assert parts.proxy.address not in refused.value.message
        parts.proxy.heal()
        await eventually(lambda: compare(numbers[1]))

        ours = parts.settings.key_for("replica").split("_")[1]
        revoke = ipb.RevokeApiKeyRequest(name=f"tenants/system/keys/{ours}")
        await system.tenants.RevokeApiKey(revoke, metadata=system.admin)
        with pytest.raises(ServiceError) as refused:
            await compare(numbers[2])
        assert (refused.value.code, refused.value.reason) == ("UNAVAILABLE", "NOT_RESOLVED")


async def test_p10_past_the_hard_bound_a_tenant_fails_or_is_served_as_the_operator_said(tmp_path: Path) -> None:
    async with apart(tmp_path, expired_after=3.0, serve_expired={"t1"}) as parts:
        system = parts.system()
        keys = [await system.tenant(copy("king", "ship")) for _ in range(2)]  # t0 and t1
        parts.proxy.half_open()

        async def refused() -> bool:
            try:
                with rpc.errors():
                    await _text(system, keys[0])
            except ServiceError as error:
                assert (error.code, error.reason) == ("UNAVAILABLE", "STALE")
                return True
            return False

        await eventually(refused)
        assert await _text(system, keys[1])
        assert await _age(system, keys[1]) > 3
        parts.proxy.heal()
        await eventually(lambda: _text(system, keys[0]))


async def test_min_revision_is_waited_for_and_refused_clearly(tmp_path: Path) -> None:
    async with apart(tmp_path, catch_up=3.0) as parts:
        system = parts.system()
        key = await system.tenant()
        for word in ("ship", "nurse", "sea", "doctor"):
            release = await system.release(key, copy("king", word))
            at = (await system.activate(key, release)).position
            request = pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=1))
            request.min_revision.CopyFrom(at)
            answer = await system.inference.Generate(request, metadata=key)
            assert answer.served.release == release, "a write is seen by the next request that names it"
        request.min_revision.revision += 1000
        told = await _refused(system, request, key)
        assert (told.code, told.reason) == ("FAILED_PRECONDITION", "NOT_WRITTEN"), "whoever asks so is to blame"
        parts.proxy.half_open()  # now it may have been written, for all that the gateway knows
        await asyncio.sleep(0.2)  # for what is under way
        told = await _refused(system, request, key)
        assert (told.code, told.reason, told.retry_after) == ("UNAVAILABLE", "BEHIND", 0.5)


async def _refused(system: System, request: pb.GenerateRequest, key: Metadata) -> ServiceError:
    with pytest.raises(ServiceError) as refused, rpc.errors():
        await system.inference.Generate(request, metadata=key)
    return refused.value
