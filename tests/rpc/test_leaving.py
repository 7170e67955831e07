"""Who leaves in the moment in which it is answered is told nothing any more, and the log has no error for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from backpack_proto.v1 import directory_pb2 as pb
from backpack_proto.v1 import directory_pb2_grpc
from backpack_serving import rpc
from backpack_serving.errors import NotFound

HERE, LEFT = threading.Event(), threading.Event()


class Late(directory_pb2_grpc.DirectoryServiceServicer):
    """Answers when whoever called has left, before the event loop has heard of that."""

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:
        _block()
        if request.replica.id == "grpc's":
            await context.abort(grpc.StatusCode.NOT_FOUND)
        raise NotFound("GONE", "gone")

    async def WatchReplicas(
        self, request: pb.WatchReplicasRequest, context: Any
    ) -> AsyncIterator[pb.WatchReplicasResponse]:
        _block()
        yield pb.WatchReplicasResponse()


def _block() -> None:
    HERE.set()
    LEFT.wait(60)
    time.sleep(0.5)


class Codes:
    """As the metrics are told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def began(self, method: str) -> None: ...

    def ended(self, method: str, code: str, reason: str, seconds: float) -> None:
        self.told.append(code)


@pytest.mark.parametrize("call", ["refused", "refused by grpc", "stream"])
async def test_an_answer_to_who_has_left_is_no_error(call: str, caplog: pytest.LogCaptureFixture) -> None:
    HERE.clear()
    LEFT.clear()
    codes = Codes()
    add = directory_pb2_grpc.add_DirectoryServiceServicer_to_server
    server = await rpc.start([rpc.Service("backpack.v1.DirectoryService", add, Late())], "127.0.0.1:0", codes)

    def leave() -> None:
        with grpc.insecure_channel(server.address) as channel:
            stub = directory_pb2_grpc.DirectoryServiceStub(channel)
            request = pb.ReportRequest(replica=pb.Replica(id="grpc's" if "grpc" in call else ""))
            going: Any = stub.WatchReplicas(pb.WatchReplicasRequest()) if call == "stream" else None
            going = going or stub.Report.future(request)
            HERE.wait(60)
            going.cancel()
            LEFT.set()

    await asyncio.to_thread(leave)
    while not codes.told:
        await asyncio.sleep(0.01)
    await server.stop(0)
    assert codes.told == ["CANCELLED"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
