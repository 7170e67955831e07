"""What reaches a server in the moment that it stops is ended by gRPC with CANCELLED, and is told to retry."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import grpc
import pytest
from backpack_proto.v1 import directory_pb2 as pb
from backpack_proto.v1 import directory_pb2_grpc
from backpack_serving import rpc
from backpack_serving.errors import Unavailable
from backpack_serving.inference import directory
from backpack_serving.observability.metrics import Metrics
from backpack_serving.rpc.server import CANCELLED_PER_TURN
from backpack_serving.settings import Settings

CALLS = 40


async def test_what_no_handler_took_may_be_tried_again(tmp_path: Path) -> None:
    server = await directory.serve(Settings(state=tmp_path, directory_address="127.0.0.1:0"), Metrics())
    failures: list[grpc.RpcError] = []
    connected, sent = threading.Event(), threading.Event()

    def call_all() -> None:
        with grpc.insecure_channel(server.address) as channel:  # without retries
            stub = directory_pb2_grpc.DirectoryServiceStub(channel)
            stub.Report(pb.ReportRequest())
            connected.set()
            calls = [stub.Report.future(pb.ReportRequest(), timeout=60) for _ in range(CALLS)]
            sent.set()
            failures.extend(error for call in calls if isinstance(error := call.exception(), grpc.RpcError))

    clients = threading.Thread(target=call_all)
    clients.start()
    await asyncio.to_thread(connected.wait, 60)
    time.sleep(1)  # the event loop takes nothing meanwhile
    assert sent.is_set()
    await server.stop(0)
    await asyncio.to_thread(clients.join, 60)
    cancelled = [error for error in failures if error.code() is grpc.StatusCode.CANCELLED]  # type: ignore[attr-defined]
    assert cancelled, "as gRPC does; if not, `rpc.status` needs no word on it"
    for error in cancelled:
        with pytest.raises(Unavailable, match="the server stopped before it took the call") as told, rpc.errors():
            raise error
        assert told.value.retry_after is not None


async def test_endless_calls_are_ended_few_at_a_time(tmp_path: Path) -> None:
    server = await directory.serve(Settings(state=tmp_path, directory_address="127.0.0.1:0"), Metrics())
    async with rpc.channel(server.address) as channel:
        stub = directory_pb2_grpc.DirectoryServiceStub(channel)
        watches = [aiter(stub.WatchReplicas(pb.WatchReplicasRequest())) for _ in range(3 * CANCELLED_PER_TURN)]
        for watch in watches:
            await anext(watch)
        running, ended = set(server._calls._running), set[object]()
        assert len(running) == len(watches)
        stopping, each_turn = asyncio.create_task(server.stop(60)), []
        while not stopping.done():
            await asyncio.sleep(0)
            each_turn.append(len(running & server._calls._ended - ended))
            ended |= server._calls._ended
        assert sum(each_turn) == len(watches)
        assert max(each_turn) == CANCELLED_PER_TURN, "all at once hold the loop"
        for watch in watches:
            with pytest.raises(Unavailable, match="this server is stopping") as told, rpc.errors():
                await anext(watch)
            assert told.value.reason == "DRAINING"
