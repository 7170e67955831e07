"""Refusals through a real server: what arrives is a refusal, whatever was sent."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import grpc
import pytest
from backpack_lm.patch import Violation
from backpack_proto.v1 import directory_pb2 as pb
from backpack_proto.v1 import directory_pb2_grpc
from backpack_serving import rpc
from backpack_serving.client import AsyncClient
from backpack_serving.errors import InvalidRequest, NotFound, PreconditionFailed, Quota, ServiceError, Unavailable
from google.rpc import code_pb2, status_pb2


class Refusing(directory_pb2_grpc.DirectoryServiceServicer):
    """Refuses everything with the same error, or in gRPC's own way."""

    def __init__(self, error: ServiceError | None) -> None:
        self._error = error

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:
        if self._error is not None:
            raise self._error
        other = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message="of something else")
        details = (("grpc-status-details-bin", other.SerializeToString()),)
        return await context.abort(grpc.StatusCode.NOT_FOUND, "gone", details)


async def _refused(error: ServiceError | None) -> ServiceError:
    add = directory_pb2_grpc.add_DirectoryServiceServicer_to_server
    server = await rpc.start([rpc.Service("backpack.v1.DirectoryService", add, Refusing(error))], "127.0.0.1:0")
    channel = rpc.channel(server.address)
    try:
        with pytest.raises(ServiceError) as refused, rpc.errors():
            await directory_pb2_grpc.DirectoryServiceStub(channel).Report(pb.ReportRequest(), timeout=30)
    finally:
        await channel.close()
        await server.stop(0)
    return refused.value


async def test_a_refusal_arrives_as_it_was_sent() -> None:
    sent = InvalidRequest(
        "BAD",
        "bad; 100 % of it: é",
        violations=[Violation("a", "ONE", "x"), Violation("b", "TWO", "y")],
        quotas=[Quota("tenants/t", "2 a minute")],
        retry_after=1.5,
        value=3,
    )
    told = await _refused(sent)
    assert type(told) is InvalidRequest
    for name in ("reason", "message", "violations", "quotas", "retry_after", "metadata"):
        assert getattr(told, name) == getattr(sent, name), name


@pytest.mark.parametrize("letter", ["x", "界", "\n"])
@pytest.mark.parametrize("count", [1, 50, 2000])
async def test_a_refusal_of_any_size_arrives_in_what_clients_take(letter: str, count: int) -> None:
    long = letter * 5000
    sent = InvalidRequest.of(*(Violation(f"edits[{n}].{long}", "BAD", long) for n in range(count)))
    sent.metadata = {"value": long}
    told = await _refused(sent)
    assert (type(told), told.reason) == (InvalidRequest, "BAD")
    assert told.violations[0].description == long[: len(told.violations[0].description) - 1] + "…"
    assert told.violations[0].field.startswith("edits[0].")
    assert (told.violations[-1].reason == "MORE") == (count > 1)
    size = len(rpc.to_status(sent).SerializeToString()) * 4 / 3 + 3 * len(told.message.encode())
    assert size < 8000, "gRPC's own limit for clients, which isn't hard, is 8192"


class Sent:
    """What a message is made of, as the collector sees it: one object, whatever its size."""


async def test_what_was_sent_with_a_refused_call_goes_with_it() -> None:
    kept: list[weakref.ref[Sent]] = []

    class Keeping(directory_pb2_grpc.DirectoryServiceServicer):
        async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:
            sent = Sent()
            kept.append(weakref.ref(sent))
            raise NotFound("REASON", "message")

    add = directory_pb2_grpc.add_DirectoryServiceServicer_to_server
    server = await rpc.start([rpc.Service("backpack.v1.DirectoryService", add, Keeping())], "127.0.0.1:0")
    gc.disable()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            with pytest.raises(grpc.RpcError):
                await directory_pb2_grpc.DirectoryServiceStub(channel).Report(pb.ReportRequest(), timeout=30)
        await server.stop(0)
        assert [one() for one in kept] == [None]
    finally:
        gc.enable()
        await server.stop(0)


async def test_of_large_messages_one_is_read_at_a_time() -> None:
    running, most = 0, 0

    class Slow(directory_pb2_grpc.DirectoryServiceServicer):
        async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.05)
            running -= 1
            return pb.ReportResponse()

    async def anybody(context: rpc.Context) -> None:
        pass

    add = directory_pb2_grpc.add_DirectoryServiceServicer_to_server
    service = rpc.Service("backpack.v1.DirectoryService", add, Slow(), large={"Report": anybody})
    server = await rpc.start([service], "127.0.0.1:0")
    request = pb.ReportRequest(replica=pb.Replica(address="a" * rpc.SMALL))
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = directory_pb2_grpc.DirectoryServiceStub(channel)
        await asyncio.gather(*(stub.Report(request, timeout=60) for _ in range(3)))
    assert most == 1
    await server.stop(0)


async def test_who_calls_another_server_is_told_which_one_to_call() -> None:
    add, servicer = directory_pb2_grpc.add_DirectoryServiceServicer_to_server, Refusing(None)
    server = await rpc.start([rpc.Service("backpack.v1.DirectoryService", add, servicer)], "127.0.0.1:0")
    try:
        async with AsyncClient(server.address) as client:
            with pytest.raises(PreconditionFailed, match="text is a gateway's") as refused:
                await client.model()
        assert refused.value.reason == "WRONG_SERVER"
    finally:
        await server.stop(0)


async def test_a_status_that_asyncios_grpc_lost_may_be_asked_for_again() -> None:
    """In a race with a server of another process, which no test can win: this is what comes of it."""
    nothing = grpc.aio.Metadata()
    lost = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, details="Internal error from Core")
    with pytest.raises(Unavailable, match="before all of it was sent") as told, rpc.errors():
        raise lost
    assert told.value.retry_after == 0


async def test_details_of_another_error_than_the_one_that_came_are_left_out() -> None:
    told = await _refused(None)
    assert (type(told), told.reason, told.message) == (NotFound, "TRANSPORT", "gone")
