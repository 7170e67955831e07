"""Health probes, for a container's health check."""

from __future__ import annotations

from typing import Any

from backpack_proto.v1 import directory_pb2, directory_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from backpack_serving.auth.tls import Tls
from backpack_serving.rpc.channel import sync_channel
from backpack_serving.rpc.metadata import WHY
from backpack_serving.rpc.status import errors


def health(address: str, service: str, seconds: float, tls: Tls | None = None) -> tuple[str, str]:
    """The status of a service ("": of the whole server), SERVING, NOT_SERVING or UNKNOWN, and the reason if given.

    Raises ServiceError if nobody answers, or if there is no such service.
    """
    with sync_channel(address, tls) as channel, errors():
        request = health_pb2.HealthCheckRequest(service=service)
        answer, call = health_pb2_grpc.HealthStub(channel).Check.with_call(request, timeout=seconds)
        why = dict(call.trailing_metadata() or ()).get(WHY, "")
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)), str(why)


async def serving(channel: Any, seconds: float) -> tuple[bool, str]:
    """Whether the server behind a channel serves, and if not, the reason. Raises ServiceError if nobody answers."""
    with errors():
        call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=seconds)
        answer = await call
        why = dict(await call.trailing_metadata() or ()).get(WHY, "")
    return answer.status == health_pb2.HealthCheckResponse.SERVING, str(why)


def replicas(address: str, metadata: tuple[tuple[str, str], ...], seconds: float, tls: Tls | None = None) -> int:
    """How many replicas accept requests, according to the directory. Raises ServiceError if it doesn't answer."""
    with sync_channel(address, tls) as channel, errors():
        request = directory_pb2.WatchReplicasRequest()
        stub = directory_pb2_grpc.DirectoryServiceStub(channel)
        call = stub.WatchReplicas(request, metadata=metadata, timeout=seconds)
        try:
            first = next(iter(call))
        finally:
            call.cancel()
    return sum(not replica.draining for replica in first.replicas)
