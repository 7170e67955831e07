"""Clients that ping while nothing else goes over their connection, as they do behind NAT and load balancers."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from backpack_proto.v1 import directory_pb2 as pb
from backpack_proto.v1 import directory_pb2_grpc
from backpack_serving import rpc
from backpack_serving.rpc.server import PING_INTERVAL

from tests.rpc.test_strangers import OPENING, begin, frame

PING, GO_AWAY, ACKNOWLEDGED = 6, 7, 1
ENHANCE_YOUR_CALM = 11
SHORT = 0.1


class Watched(directory_pb2_grpc.DirectoryServiceServicer):
    """Has calls that never end and never say anything."""

    async def WatchReplicas(self, request: Any, context: Any) -> AsyncIterator[pb.WatchReplicasResponse]:
        await asyncio.sleep(600)
        yield pb.WatchReplicasResponse()

    async def Report(self, request: Any, context: Any) -> pb.ReportResponse:
        return pb.ReportResponse()


@asynccontextmanager
async def serving(**how: Any) -> AsyncIterator[str]:
    add = directory_pb2_grpc.add_DirectoryServiceServicer_to_server
    service = rpc.Service("backpack.v1.DirectoryService", add, Watched(), endless=frozenset({"WatchReplicas"}))
    server = await rpc.start([service], "127.0.0.1:0", **how)
    try:
        yield server.address
    finally:
        await server.stop(0)


def pinged(address: str, pauses: Sequence[float], call: bytes = b"") -> tuple[int, int | None]:
    """How many pings were answered, each sent so many seconds after the one before, and why the server left."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(OPENING + call)
        answered = 0
        with connection.makefile("rb") as frames:
            for pause in pauses:
                time.sleep(pause)
                connection.sendall(frame(PING, 0, 0, answered.to_bytes(8, "big")))
                while True:
                    head = frames.read(9)
                    payload = frames.read(int.from_bytes(head[:3], "big"))
                    if not head or head[3] == GO_AWAY:
                        return answered, int.from_bytes(payload[4:8], "big") if head else None
                    if head[3] == PING and head[4] & ACKNOWLEDGED:
                        answered += 1
                        break
        return answered, None


WATCHING = begin(1, "/backpack.v1.DirectoryService/WatchReplicas") + frame(0, 1, 1, bytes(5))


@pytest.mark.parametrize("call", [b"", WATCHING], ids=["idle", "in a call"])
async def test_who_pings_as_often_as_is_allowed_stays(call: bytes) -> None:
    async with serving(ping_interval=SHORT) as address:
        assert await asyncio.to_thread(pinged, address, [2 * SHORT] * 8, call) == (8, None)


@pytest.mark.parametrize("call", [b"", WATCHING], ids=["idle", "in a call"])
async def test_who_pings_without_end_is_told_to_go(call: bytes) -> None:
    async with serving() as address:
        answered, why = await asyncio.to_thread(pinged, address, [0.0] * 100, call)
        assert why == ENHANCE_YOUR_CALM
        assert answered < 10


def test_what_common_clients_send_is_allowed() -> None:
    """grpc-go and grpc-java: 10 s at least, whatever they are told. gRPC's core: as it is told, 5 s are common."""
    assert PING_INTERVAL < 5.0


async def _quiet(address: str, seconds: float, **settings: int) -> list[str]:
    """The states of a connection on which nothing but pings goes for so long, and that then carries a call."""
    options = [(f"grpc.{name}", value) for name, value in settings.items()]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        report = directory_pb2_grpc.DirectoryServiceStub(channel).Report
        await report(pb.ReportRequest(), timeout=30)
        states, until = [channel.get_state().name], asyncio.get_running_loop().time() + seconds
        while True:
            try:
                async with asyncio.timeout_at(until):
                    await channel.wait_for_state_change(channel.get_state())
            except TimeoutError:
                break
            states.append(channel.get_state().name)
        await report(pb.ReportRequest(), timeout=30)
        return states


ALWAYS = {"keepalive_permit_without_calls": 1, "http2.max_pings_without_data": 0}


async def test_a_channel_that_keeps_an_idle_connection_alive_keeps_it() -> None:
    async with serving(ping_interval=SHORT) as address:
        assert await _quiet(address, 2.0, keepalive_time_ms=200, **ALWAYS) == ["READY"]


@pytest.mark.slow
@pytest.mark.parametrize("interval", [5_000, 10_000])
async def test_a_channel_that_keeps_an_idle_connection_alive_keeps_it_at_real_intervals(interval: int) -> None:
    async with serving() as address:
        assert await _quiet(address, 45.0, keepalive_time_ms=interval, **ALWAYS) == ["READY"]
