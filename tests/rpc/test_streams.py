"""A stream, to who calls and to who answers: its messages, refusals, deadline, end, and how far it runs ahead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from backpack_lm.patch import Violation
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc
from backpack_serving import rpc
from backpack_serving.errors import (
    Exhausted,
    Expired,
    Internal,
    InvalidRequest,
    Unavailable,
)

from tests.waiting import eventually

NAME = "backpack.v1.InferenceService"


class Servicer(inference_pb2_grpc.InferenceServiceServicer):
    """What it does with a stream is what its prompt says."""

    def __init__(self) -> None:
        self.sent: dict[str, int] = {}
        self.left: list[str] = []
        self.go = asyncio.Event()

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: rpc.Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        what, _, argument = request.prompt.text.partition(" ")
        if what == "refuse":
            raise InvalidRequest.at("prompt", "REFUSED", argument)
        if what == "unspeakable":
            raise InvalidRequest("REFUSED", "\udc80")
        if what == "fail":
            raise ZeroDivisionError
        await context.send_initial_metadata(())
        if what == "metadata":
            for name, value in rpc.metadata(context).items():
                yield pb.GenerateStreamResponse(text=f"{name}={value!r}")
        elif what == "count":
            for number in range(int(argument)):
                yield pb.GenerateStreamResponse(text=str(number))
                await asyncio.sleep(0)
        elif what == "large":
            for number in range(1000):
                self.sent[argument] = number + 1
                yield pb.GenerateStreamResponse(text=f"{number:<30000}")
        elif what == "wait":
            try:
                yield pb.GenerateStreamResponse(text="here")
                await self.go.wait()
                yield pb.GenerateStreamResponse(text="there")
            except asyncio.CancelledError:
                self.left.append(argument)
                raise

    async def GetModel(self, request: pb.GetModelRequest, context: rpc.Context) -> pb.GetModelResponse:
        return pb.GetModelResponse(fingerprint="f")


class Watcher:
    """As the metrics are told: each call's method and code."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.told: list[tuple[str, str]] = []

    def began(self, method: str) -> None:
        self.running.append(method.rpartition("/")[2])

    def ended(self, method: str, code: str, reason: str, seconds: float) -> None:
        method = method.rpartition("/")[2]
        self.running.remove(method)
        self.told.append((method, code))


@dataclass
class Running:
    server: rpc.Server
    servicer: Servicer
    channel: Any
    watcher: Watcher
    stub: inference_pb2_grpc.InferenceServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)

    def stream(self, text: str, **how: Any) -> Any:
        return self.stub.GenerateStream(_request(text), **how)

    async def texts(self, text: str, **how: Any) -> list[str]:
        return await _texts(self.stream(text, **how))


def _request(text: str) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(prompt=pb.Prompt(text=text))


async def _serve(servicer: Servicer, watcher: Watcher, address: str = "127.0.0.1:0", **how: Any) -> rpc.Server:
    service = rpc.Service(NAME, inference_pb2_grpc.add_InferenceServiceServicer_to_server, servicer)
    return await rpc.start([service], address, watcher, message_limit=rpc.SMALL, **how)


@asynccontextmanager
async def _running(**how: Any) -> AsyncIterator[Running]:
    servicer, watcher = Servicer(), Watcher()
    server = await _serve(servicer, watcher, **how)
    channel = rpc.channel(server.address, repeats=False)
    try:
        async with asyncio.timeout(60):
            yield Running(server, servicer, channel, watcher)
    finally:
        await channel.close()
        await server.stop(0)


async def _texts(stream: Any) -> list[str]:
    with rpc.errors():
        return [part.text async for part in stream]


async def _first(stream: Any) -> str:
    await stream.initial_metadata()
    text: str = (await anext(aiter(stream))).text
    return text


async def test_streams_at_once_each_get_their_own() -> None:
    async with _running() as here:
        found = await asyncio.gather(*(here.texts(f"count {n}") for n in range(60)))
        assert found == [[str(number) for number in range(n)] for n in range(60)]
        assert here.watcher.told == [("GenerateStream", "OK")] * 60


async def test_other_calls_go_beside() -> None:
    async with _running() as here:
        assert (await here.stub.GetModel(pb.GetModelRequest())).fingerprint == "f"
        assert here.watcher.told == [("GetModel", "OK")]


async def test_metadata_travels() -> None:
    async with _running() as here:
        metadata = (("authorization", "Bearer k"), ("pin-bin", b"\xff\x00"))
        told = await here.texts("metadata", metadata=metadata)
        assert {"authorization='Bearer k'", r"pin-bin=b'\xff\x00'"} <= set(told)


async def test_a_refusal_arrives_with_all_it_says() -> None:
    async with _running() as here:
        with pytest.raises(InvalidRequest) as refused:
            await here.texts("refuse it's no good")
        assert refused.value.reason == "REFUSED"
        assert refused.value.violations == (Violation("prompt", "REFUSED", "it's no good"),)
        with pytest.raises(Internal, match="the server's log has more"):
            await here.texts("fail")
        assert here.watcher.told == [("GenerateStream", "INVALID_ARGUMENT"), ("GenerateStream", "INTERNAL")]
        assert await here.texts("count 2") == ["0", "1"]


async def test_a_slow_reader_holds_up_its_own_servicer_alone() -> None:
    async with _running() as here:
        slow = here.stream("large slow")
        assert await _first(slow) == f"{0:<30000}"
        assert len(await here.texts("large quick")) == 1000
        # It sends until gRPC's windows are full, and no further.
        assert here.servicer.sent["slow"] < 500
        assert [int(part.text) async for part in slow] == list(range(1, 1000))


async def test_who_leaves_ends_what_runs_for_them_alone() -> None:
    async with _running() as here:
        leaves, stays, late = here.stream("wait leaves"), here.stream("wait stays"), here.stream("wait late")
        late.cancel()  # before it has begun over there
        assert await _first(leaves) == await _first(stays) == "here"
        leaves.cancel()
        await eventually(lambda: here.servicer.left)
        here.servicer.go.set()
        assert await _texts(stays) == ["there"]
        assert here.servicer.left == ["leaves"]
        await eventually(lambda: not here.watcher.running)


async def test_a_deadline_ends_both_ends() -> None:
    async with _running() as here:
        with pytest.raises(Expired):
            await here.texts("wait late", timeout=0.2)
        await eventually(lambda: here.watcher.told)
        assert here.watcher.told == [("GenerateStream", "DEADLINE_EXCEEDED")]
        assert here.servicer.left == ["late"]
        here.servicer.go.set()
        assert await here.texts("wait early", timeout=30) == ["here", "there"]


async def test_a_drain_lets_streams_end_and_begins_none() -> None:
    async with _running() as here:
        runs = here.stream("wait")
        assert await _first(runs) == "here"
        stopping = asyncio.create_task(here.server.stop(30))
        with pytest.raises(Unavailable):
            while True:
                assert await here.texts("count 1") == ["0"]  # until it has heard of it
        assert not stopping.done()
        here.servicer.go.set()
        assert await _texts(runs) == ["there"]
        await stopping
        assert here.watcher.told[-1] == ("GenerateStream", "OK")


async def test_what_a_drain_ends_is_told_to_retry() -> None:
    async with _running() as here:
        streams = [here.stream(f"wait {n}") for n in range(3)]
        for stream in streams:
            assert await _first(stream) == "here"
        await here.server.stop(0.2)
        for stream in streams:
            with pytest.raises(Unavailable) as refused:
                await _texts(stream)
            assert refused.value.reason == "DRAINING"
            assert refused.value.retry_after is not None
        assert here.watcher.told.count(("GenerateStream", "UNAVAILABLE")) == 3


async def test_a_server_that_is_gone_is_told_of_each_stream_and_found_again() -> None:
    async with _running() as here:
        streams = [here.stream("wait"), here.stream("wait")]
        for stream in streams:
            assert await _first(stream) == "here"
        await here.server._server.stop(0)  # as if it were killed: it says nothing to any stream
        for stream in streams:
            with pytest.raises(Unavailable) as refused:
                await _texts(stream)
            assert refused.value.reason == "TRANSPORT"
        again = await _serve(here.servicer, here.watcher, here.server.address)
        while True:
            try:
                assert await here.texts("count 2") == ["0", "1"]
                break
            except Unavailable:  # until it is connected again
                await asyncio.sleep(0.05)
        await here.channel.close()
        await again.stop(0)


async def test_the_largest_request_goes_and_what_is_larger_hurts_nobody() -> None:
    async with _running() as here:
        stays = here.stream("wait")
        assert await _first(stays) == "here"
        room = rpc.SMALL - len(_request("count 1 ").SerializeToString()) - 8
        padded = [f"count 1{' ' * room}" for _ in range(3)]  # all at once
        assert await asyncio.gather(*map(here.texts, padded)) == [["0"]] * 3
        with pytest.raises(Exhausted, match="larger than max"):
            await here.texts("count 1" + " " * rpc.SMALL)
        here.servicer.go.set()
        assert await _texts(stays) == ["there"]


async def test_what_goes_beside_many_requests_hurts_nobody() -> None:
    async with _running() as here:
        metadata = (("baggage", "x" * 7000),)
        found = await asyncio.gather(*(here.texts("count 1", metadata=metadata) for _ in range(300)))
        assert found == [["0"]] * 300


async def test_streams_outlive_the_age_of_connections() -> None:
    async with _running(connection_age=0.2) as here:
        stays = here.stream("wait")
        assert await _first(stays) == "here"
        until = time.monotonic() + 1.0  # the age of several
        while time.monotonic() < until:
            assert await here.texts("count 20") == [str(n) for n in range(20)]
        here.servicer.go.set()
        assert await _texts(stays) == ["there"]


async def test_a_callers_end_that_breaks_off_ends_all_its_streams() -> None:
    async with _running() as here:
        for name in ("one", "two"):
            assert await _first(here.stream(f"wait {name}")) == "here"
        await here.channel.close()
        await eventually(lambda: not here.watcher.running)
        assert sorted(here.servicer.left) == ["one", "two"]
        assert sorted(here.watcher.told) == [("GenerateStream", "CANCELLED")] * 2
