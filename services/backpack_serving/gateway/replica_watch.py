"""Watches the directory of replicas."""

from __future__ import annotations

from backpack_proto.v1 import directory_pb2, directory_pb2_grpc

from backpack_serving import rpc
from backpack_serving.auth.tls import Tls
from backpack_serving.gateway.routing import Router
from backpack_serving.sync.transport import run_forever, with_silence_limit


async def follow_directory(address: str, metadata: tuple[tuple[str, str], ...], router: Router, tls: Tls) -> None:
    """Keep the router's list of replicas up to date, for ever."""
    channel = rpc.channel(address, tls)
    stub = directory_pb2_grpc.DirectoryServiceStub(channel)

    async def watch() -> None:
        request = directory_pb2.WatchReplicasRequest()
        async for message in with_silence_limit(stub.WatchReplicas(request, metadata=metadata)):
            router.update(message.replicas)

    try:
        await run_forever(watch, "directory")
    finally:
        await channel.close()
