"""Processes that are told to stop under load: what runs may finish, the rest is told to retry, nothing is lost."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from backpack_lm.manifest import Manifest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc
from backpack_proto.v1 import sync_pb2 as spb
from backpack_serving import embedded, rpc
from backpack_serving.errors import ServiceError, Unavailable
from backpack_serving.settings import Settings

from tests.conftest import free_port
from tests.e2e.conftest import ANYWHERE, Metadata, System, copy
from tests.e2e.test_processes import Processes

PROMPT = "The story of the king and the"
LONG = pb.Sampling(max_tokens=480, seed=1, ignore_end_of_text=True)


@asynccontextmanager
async def _ending(state: Path, **settings: Any) -> AsyncIterator[tuple[System, Callable[[], Awaitable[None]]]]:
    """A system, and what stops it: its clients stay."""
    async with AsyncExitStack() as servers:
        chosen = Settings(state=state, threads=1, slots=4, **{**ANYWHERE, **settings})
        serving = await servers.enter_async_context(embedded.run(chosen))
        system = System(serving.gateway, serving.interventions, serving.settings)
        try:
            yield system, servers.aclose
        finally:
            await system.close()


async def _reader(fingerprint: str) -> AsyncIterator[spb.SyncRequest]:
    """Says Hello, then lives."""
    hello = spb.Hello(kind=spb.READER_KIND_GATEWAY, incarnation="x", model_fingerprint=fingerprint)
    yield spb.SyncRequest(hello=hello)
    while True:
        await asyncio.sleep(1)
        yield spb.SyncRequest(report=spb.Report())


async def test_what_outlasts_the_grace_period_is_told_to_retry(tmp_path: Path) -> None:
    async with _ending(tmp_path, drain=0.2) as (system, stop):
        key = await system.tenant()
        request = pb.GenerateStreamRequest(prompt=pb.Prompt(text=PROMPT), sampling=LONG)
        request.coalesce.FromMilliseconds(0)
        fingerprint = Manifest.read(system.settings.model).fingerprint
        calls = [
            aiter(system.inference.GenerateStream(request, metadata=key)),
            aiter(system.sync.Sync(_reader(fingerprint), metadata=system.replica)),
        ]
        await asyncio.gather(*(anext(call) for call in calls))
        await stop()
        for call in calls:
            with pytest.raises(ServiceError) as ended, rpc.errors():
                while True:
                    await anext(call)
            assert (ended.value.code, ended.value.reason) == ("UNAVAILABLE", "DRAINING")
            assert ended.value.retry_after == 0.1


async def test_what_runs_may_finish(tmp_path: Path) -> None:
    async with _ending(tmp_path) as (system, stop):
        key = await system.tenant()
        request = pb.GenerateStreamRequest(prompt=pb.Prompt(text=PROMPT), sampling=LONG)
        call = aiter(system.inference.GenerateStream(request, metadata=key))
        tokens = len((await anext(call)).tokens)
        await stop()
        assert tokens + sum([len(part.tokens) async for part in call]) == 480


class Load:
    """Clients that call gateways, and call again whenever they are told that they may."""

    def __init__(self, target: str, keys: list[Metadata]) -> None:
        self._channel = rpc.channel(target)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._keys = keys
        self.stopped = False
        self.finished = 0
        self.retried: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    async def client(self, number: int) -> None:
        key = self._keys[number % len(self._keys)]
        while not self.stopped:
            request = pb.GenerateStreamRequest(
                prompt=pb.Prompt(text=PROMPT),
                sampling=pb.Sampling(max_tokens=480 if number % 4 == 0 else 40, seed=number, ignore_end_of_text=True),
            )
            while not await self._try(request, key):
                await asyncio.sleep(0.1)

    async def _try(self, request: pb.GenerateStreamRequest, key: Metadata) -> bool:
        acknowledged, tokens = False, 0
        try:
            with rpc.errors():
                async for part in self._stub.GenerateStream(request, metadata=key, timeout=120):
                    acknowledged = True
                    tokens += len(part.tokens)
        except ServiceError as error:
            # Whoever has had an answer must be told by us; that there is no connection, the library tells.
            marked = error.retry_after is not None or (not acknowledged and isinstance(error, Unavailable))
            if marked:
                self.retried[error.reason] += 1
            else:
                self.lost[f"{error.code} {error.reason}, {tokens} tokens: {error.message}"] += 1
            return False
        assert tokens == request.sampling.max_tokens
        self.finished += 1
        return True

    async def close(self) -> None:
        await self._channel.close()


@pytest_asyncio.fixture
async def two_of_each(tmp_path: Path) -> AsyncIterator[tuple[Processes, list[dict[str, str]]]]:
    processes = Processes(tmp_path)
    drain = {"BACKPACK_DRAIN": "2"}
    gateways = [{"BACKPACK_GATEWAY_ADDRESS": f"127.0.0.1:{free_port()}", **drain} for _ in range(2)]
    try:
        for part in ("interventions", "directory"):
            await asyncio.to_thread(processes.start, part)
        await asyncio.gather(
            *(asyncio.to_thread(processes.start, "gateway", f"gateway {n}", **gateways[n]) for n in range(2)),
            *(asyncio.to_thread(processes.start, "inference", f"inference {n}", BACKPACK_DRAIN="2") for n in range(2)),
        )
        yield processes, gateways
    finally:
        processes.stop()


async def test_a_rolling_restart_under_load_loses_nothing(
    two_of_each: tuple[Processes, list[dict[str, str]]],
) -> None:
    processes, gateways = two_of_each
    settings = processes.settings
    addresses = [g["BACKPACK_GATEWAY_ADDRESS"] for g in gateways]
    system = System(addresses[0], settings.interventions_address, settings)
    keys = [await system.tenant(copy("king", word)) for word in ("ship", "nurse")]
    await system.close()
    load = Load("ipv4:" + ",".join(addresses), keys)
    clients = [asyncio.create_task(load.client(n)) for n in range(8)]

    async def again(part: str, number: int, **environment: str) -> int:
        code = await asyncio.to_thread(processes.kill, f"{part} {number}", signal.SIGTERM)
        await asyncio.to_thread(processes.start, part, f"{part} {number}", **environment)
        return code

    codes = []
    for number in range(2):
        before = load.finished
        while load.finished < before + 8:
            await asyncio.sleep(0.05)
        codes += await asyncio.gather(
            again("gateway", number, **gateways[number]), again("inference", number, BACKPACK_DRAIN="2")
        )
    load.stopped = True
    await asyncio.gather(*clients)
    await load.close()
    print(f"{load.finished} streams finished, {dict(load.retried)} were told to retry, {dict(load.lost)} were lost")
    assert codes == [0] * 4
    assert not load.lost, load.lost
    assert load.finished >= 24
    assert "Traceback" not in processes.log
