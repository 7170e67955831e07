"""Streams that share a call are calls like any other, to who calls and to who answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from backpack_lm.patch import Violation
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc, tunnel_pb2, tunnel_pb2_grpc
from backpack_serving import rpc, tasks
from backpack_serving.errors import (
    Exhausted,
    Expired,
    Internal,
    InvalidRequest,
    PreconditionFailed,
    Unavailable,
)
from backpack_serving.rpc import carrier, tunnel

NAME = "backpack.v1.InferenceService"
METHOD = f"/{NAME}/GenerateStream"


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
            for number in range(100):
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
    tunnel: rpc.Tunnel
    watcher: Watcher
    stub: inference_pb2_grpc.InferenceServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.tunnel)  # type: ignore[arg-type]

    def stream(self, text: str, **how: Any) -> Any:
        return self.stub.GenerateStream(_request(text), **how)

    async def texts(self, text: str, **how: Any) -> list[str]:
        return [part.text async for part in self.stream(text, **how)]


def _request(text: str) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(prompt=pb.Prompt(text=text))


async def _serve(servicer: Servicer, watcher: Watcher, address: str = "127.0.0.1:0", **how: Any) -> rpc.Server:
    service = rpc.Service(NAME, inference_pb2_grpc.add_InferenceServiceServicer_to_server, servicer)
    return await rpc.start([service], address, watcher, message_limit=rpc.SMALL, **({"tunnel": True} | how))


@asynccontextmanager
async def _running(**how: Any) -> AsyncIterator[Running]:
    servicer, watcher = Servicer(), Watcher()
    server = await _serve(servicer, watcher, **how)
    through = rpc.Tunnel(rpc.channel(server.address, repeats=False))
    try:
        async with asyncio.timeout(60):
            yield Running(server, servicer, through, watcher)
    finally:
        await through.close()
        await server.stop(0)


async def _until(true: Callable[[], object]) -> None:
    while not true():
        await asyncio.sleep(0.01)


async def _first(stream: Any) -> str:
    await stream.initial_metadata()
    text: str = (await anext(stream)).text
    return text


async def test_streams_of_one_call_each_get_their_own() -> None:
    async with _running() as here:
        found = await asyncio.gather(*(here.texts(f"count {n}") for n in range(60)))
        assert found == [[str(number) for number in range(n)] for n in range(60)]
        assert here.watcher.told == [("GenerateStream", "OK")] * 60
        assert here.watcher.running == ["Open"]


async def test_other_calls_go_beside() -> None:
    async with _running() as here:
        assert (await here.stub.GetModel(pb.GetModelRequest())).fingerprint == "f"
        assert here.watcher.told == [("GetModel", "OK")]


async def test_metadata_travels() -> None:
    async with _running() as here:
        metadata = (("authorization", "Bearer k"), ("pin-bin", b"\xff\x00"))
        told = await here.texts("metadata", metadata=metadata)
        assert told == ["authorization='Bearer k'", r"pin-bin=b'\xff\x00'"]


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


async def test_a_refusal_that_cant_be_told_is_an_internal_error() -> None:
    async with _running() as here:
        with pytest.raises(Internal, match="the server's log has more"):
            await here.texts("unspeakable")


async def test_what_isnt_served_is_refused_and_nothing_else() -> None:
    async with _running() as here:
        call = here.tunnel.unary_stream("/backpack.v1.Other/Watch", bytes, bytes)
        with pytest.raises(PreconditionFailed, match="no streams of /backpack"):
            [_ async for _ in call(b"")]
        call = here.tunnel.unary_stream(METHOD, bytes, bytes)
        with pytest.raises(InvalidRequest, match="isn't this method's message"):
            [_ async for _ in call(b"\xff")]
        assert await here.texts("count 1") == ["0"]


async def test_a_slow_reader_holds_up_its_own_servicer_alone() -> None:
    async with _running() as here:
        slow = here.stream("large slow")
        assert await _first(slow) == f"{0:<30000}"
        await _until(lambda: here.servicer.sent["slow"] * 30_000 > tunnel.WINDOW)
        assert len(await here.texts("large quick")) == 100
        # It sends until more than a window is on its way, and no further.
        assert tunnel.WINDOW < here.servicer.sent["slow"] * 30_000 < tunnel.WINDOW + 3 * 30_000
        assert [int(part.text) async for part in slow] == list(range(1, 100))


async def test_who_leaves_ends_what_runs_for_them_alone() -> None:
    async with _running() as here:
        leaves, stays, late = here.stream("wait leaves"), here.stream("wait stays"), here.stream("wait late")
        late.cancel()  # before it has begun over there
        assert await _first(leaves) == await _first(stays) == "here"
        leaves.cancel()
        await _until(lambda: here.servicer.left)
        here.servicer.go.set()
        assert [part.text async for part in stays] == ["there"]
        assert here.servicer.left == ["leaves"]
        assert here.watcher.running == ["Open"]


async def test_a_deadline_ends_both_ends() -> None:
    async with _running() as here:
        with pytest.raises(Expired, match="the deadline passed"):
            await here.texts("wait late", timeout=0.2)
        await _until(lambda: here.watcher.told)
        assert here.watcher.told == [("GenerateStream", "DEADLINE_EXCEEDED")]
        assert here.servicer.left == ["late"]
        here.servicer.go.set()
        assert await here.texts("wait early", timeout=30) == ["here", "there"]


class Late(tunnel_pb2_grpc.TunnelServiceServicer):
    """Takes notice of deadlines by its caller alone."""

    def __init__(self) -> None:
        self.cancelled: list[int] = []

    async def Open(self, requests: AsyncIterator[tunnel_pb2.OpenRequest], context: Any) -> None:  # type: ignore[override]
        async for request in requests:
            self.cancelled += request.cancelled


async def test_a_server_that_is_late_is_told_of_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "LATE", 0.1)
    late = Late()
    service = rpc.Service("backpack.v1.TunnelService", tunnel_pb2_grpc.add_TunnelServiceServicer_to_server, late)
    server = await rpc.start([service], "127.0.0.1:0")
    through = rpc.Tunnel(rpc.channel(server.address, repeats=False))
    with pytest.raises(Expired):
        await anext(through.unary_stream(METHOD, bytes, bytes)(b"", timeout=0.1))
    async with asyncio.timeout(30):
        await _until(lambda: late.cancelled == [1])
    await through.close()
    await server.stop(0)


async def test_a_drain_lets_streams_end_and_begins_none() -> None:
    async with _running() as here:
        runs = here.stream("wait")
        assert await _first(runs) == "here"
        stopping = asyncio.create_task(here.server.stop(30))
        await _until(lambda: not here.tunnel._calls[0].has_room())
        # Who hasn't heard of it is told to ask another.
        late = here.tunnel._calls[0].begin(
            tunnel_pb2.StreamBegin(method=METHOD), pb.GenerateStreamResponse.FromString, None
        )
        with pytest.raises(Unavailable) as refused:
            await anext(late)
        assert refused.value.reason == "DRAINING"
        here.servicer.go.set()
        assert [part.text async for part in runs] == ["there"]
        await stopping
        assert here.watcher.told == [("GenerateStream", "OK"), ("Open", "OK")]


async def test_what_a_drain_ends_is_told_to_retry() -> None:
    async with _running() as here:
        streams = [here.stream(f"wait {n}") for n in range(3)]
        for stream in streams:
            assert await _first(stream) == "here"
        await here.server.stop(0.2)
        for stream in streams:
            with pytest.raises(Unavailable) as refused:
                await anext(stream)
            assert refused.value.reason == "DRAINING"
            assert refused.value.retry_after is not None
        assert here.watcher.told.count(("GenerateStream", "UNAVAILABLE")) == 3


async def test_what_a_drain_ends_is_told_so_behind_all_that_waits() -> None:
    async with _running() as here:
        channel = rpc.channel(here.server.address)
        call: Any = tunnel_pb2_grpc.TunnelServiceStub(channel).Open()
        request = _request("large it").SerializeToString()
        begins = [tunnel_pb2.StreamBegin(stream=n, method=METHOD, request=request) for n in range(100)]
        await call.write(tunnel_pb2.OpenRequest(begin=begins))
        # They send what they may, and nobody reads.
        await _until(lambda: here.servicer.sent.get("it", 0) * 30_000 > tunnel.WINDOW)
        stopping = asyncio.create_task(here.server.stop(0.5))
        await _until(lambda: here.watcher.told.count(("GenerateStream", "UNAVAILABLE")) == 100)
        ends = []
        with pytest.raises(Unavailable, match="is stopping"), rpc.errors():
            async for message in call:
                ends += [part.end.code for part in message.parts if part.HasField("end")]
        assert ends == [14] * 100
        await stopping
        await channel.close()


async def test_a_server_that_is_gone_is_told_of_each_stream_and_found_again() -> None:
    async with _running() as here:
        streams = [here.stream("wait"), here.stream("wait")]
        for stream in streams:
            assert await _first(stream) == "here"
        await here.server._server.stop(0)  # as if it were killed: it says nothing to any stream
        for stream in streams:
            with pytest.raises(Unavailable) as refused:
                await anext(stream)
            assert refused.value.reason == "TRANSPORT"
        again = await _serve(here.servicer, here.watcher, here.server.address)
        while True:
            try:
                assert await here.texts("count 2") == ["0", "1"]
                break
            except Unavailable:  # until it is connected again
                await asyncio.sleep(0.05)
        await here.tunnel.close()
        await again.stop(0)


async def test_a_server_without_a_tunnel_is_unavailable() -> None:
    async with _running(tunnel=False) as here:
        with pytest.raises(Unavailable):
            await here.texts("count 2")


async def test_the_largest_request_goes_and_what_is_larger_hurts_nobody() -> None:
    async with _running() as here:
        stays = here.stream("wait")
        assert await _first(stays) == "here"
        room = rpc.SMALL - len(_request("count 1 ").SerializeToString()) - 8
        padded = [f"count 1{' ' * room}" for _ in range(3)]  # all at once
        assert await asyncio.gather(*map(here.texts, padded)) == [["0"]] * 3
        with pytest.raises(InvalidRequest, match="at most"):
            await here.texts("count 1" + " " * rpc.SMALL)
        here.servicer.go.set()
        assert [part.text async for part in stays] == ["there"]


async def test_what_goes_beside_many_requests_hurts_nobody() -> None:
    async with _running() as here:
        metadata = (("baggage", "x" * 8000),)
        found = await asyncio.gather(*(here.texts("count 1", metadata=metadata) for _ in range(300)))
        assert found == [["0"]] * 300


async def test_new_streams_go_in_a_new_call_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "RENEW", 0.0)
    async with _running() as here:
        stays = here.stream("wait")
        assert await _first(stays) == "here"
        assert await here.texts("count 1") == ["0"]
        assert await here.texts("count 1") == ["0"]
        await _until(lambda: sorted(here.watcher.running) == ["GenerateStream", "Open", "Open"])
        here.servicer.go.set()
        assert [part.text async for part in stays] == ["there"]
        await _until(lambda: here.watcher.running == ["Open"])
        assert set(here.watcher.told) == {("GenerateStream", "OK"), ("Open", "OK")}


async def test_streams_outlive_the_age_of_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "RENEW", 0.1)
    async with _running(connection_age=0.2) as here:
        stays = here.stream("wait")
        assert await _first(stays) == "here"
        while here.watcher.told.count(("Open", "OK")) < 10:
            assert await here.texts("count 20") == [str(n) for n in range(20)]
        here.servicer.go.set()
        assert [part.text async for part in stays] == ["there"]


async def test_a_call_has_so_many_streams_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "STREAMS", 2)
    monkeypatch.setattr(carrier, "STREAMS", 2)
    async with _running() as here:
        streams = [here.stream("wait") for _ in range(5)]
        for stream in streams:
            assert await _first(stream) == "here"
        assert here.watcher.running.count("Open") == 3
        channel = rpc.channel(here.server.address)
        call: Any = tunnel_pb2_grpc.TunnelServiceStub(channel).Open()
        begins = [tunnel_pb2.StreamBegin(stream=n, method=METHOD) for n in range(3)]
        await call.write(tunnel_pb2.OpenRequest(begin=begins))
        with pytest.raises(Exhausted, match="2 streams at most"), rpc.errors():
            assert [message async for message in call] == []
        await channel.close()


async def test_who_reads_nothing_is_told_only_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    told, refuse = [], carrier._Stream.refuse

    def count(*how: Any) -> None:
        told.append(how)
        refuse(*how)

    monkeypatch.setattr(carrier._Stream, "refuse", count)
    async with _running() as here:
        channel = rpc.channel(here.server.address)
        call: Any = tunnel_pb2_grpc.TunnelServiceStub(channel).Open()
        begins = [tunnel_pb2.StreamBegin(stream=n, method="/x" * 300) for n in range(tunnel.STREAMS)]

        async def begin() -> None:
            for _ in range(100):
                await call.write(tunnel_pb2.OpenRequest(begin=begins))

        beginning, before = asyncio.create_task(begin()), -1
        while not beginning.done() and (before < len(told) or not told):
            before = len(told)
            await asyncio.sleep(0.5)
        assert len(told) < 50 * tunnel.STREAMS
        await tasks.end(beginning)
        await channel.close()


async def test_who_comes_finds_the_place_of_who_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "STREAMS", 2)
    monkeypatch.setattr(carrier, "STREAMS", 2)
    async with _running() as here:
        for _ in range(10):
            streams = [here.stream("wait") for _ in range(2)]
            for stream in streams:
                assert await _first(stream) == "here"
            for stream in streams:
                stream.cancel()
        await _until(lambda: not here.tunnel._calls[0]._streams)


async def test_a_tunnel_that_is_retired_ends_with_its_streams() -> None:
    async with _running() as here:
        runs = here.stream("wait")
        assert await _first(runs) == "here"
        here.tunnel.retire()
        here.servicer.go.set()
        assert [part.text async for part in runs] == ["there"]
        await _until(lambda: here.watcher.told == [("GenerateStream", "OK"), ("Open", "OK")])


async def test_a_callers_end_that_breaks_off_ends_all_its_streams() -> None:
    async with _running() as here:
        for name in ("one", "two"):
            assert await _first(here.stream(f"wait {name}")) == "here"
        await here.tunnel.close()
        await _until(lambda: not here.watcher.running)
        assert sorted(here.servicer.left) == ["one", "two"]
        assert sorted(here.watcher.told) == [("GenerateStream", "CANCELLED")] * 2 + [("Open", "CANCELLED")]


async def test_what_began_when_a_tunnel_is_closed_ends() -> None:
    async with _running() as here:
        stream = here.stream("wait")
        await here.tunnel.close()
        with pytest.raises(Unavailable):
            await anext(stream)


async def test_a_caller_that_counts_wrongly_is_told() -> None:
    async with _running() as here:
        channel = rpc.channel(here.server.address)
        call: Any = tunnel_pb2_grpc.TunnelServiceStub(channel).Open()
        begin = tunnel_pb2.StreamBegin(stream=1, method=METHOD, request=_request("wait").SerializeToString())
        nobody = tunnel_pb2.StreamRead(stream=7, bytes=2**40)
        await call.write(tunnel_pb2.OpenRequest(read=[nobody], cancelled=[nobody.stream]))
        await call.write(tunnel_pb2.OpenRequest(begin=[begin, begin]))
        await _until(lambda: "GenerateStream" in here.watcher.running)
        here.servicer.go.set()
        with pytest.raises(InvalidRequest, match="stream 1 began before"), rpc.errors():
            texts = [part.response for message in [m async for m in call] for part in message.parts]
            raise AssertionError(texts)
        await channel.close()
