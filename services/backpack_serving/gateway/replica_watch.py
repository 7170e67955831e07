"""What a gateway follows beside the intervention service: the directory of replicas."""

from __future__ import annotations

from backpack_proto.v1 import directory_pb2, directory_pb2_grpc

from backpack_serving import rpc
from backpack_serving.auth.tls import Tls
from backpack_serving.gateway.routing import Router
from backpack_serving.sync.transport import alive, for_ever


async def follow_directory(address: str, metadata: tuple[tuple[str, str], ...], router: Router, tls: Tls) -> None:
    """Keep the router's replicas up to date, for ever."""
    channel = rpc.channel(address, tls)
    stub = directory_pb2_grpc.DirectoryServiceStub(channel)

    async def once() -> None:
        request = directory_pb2.WatchReplicasRequest()
        async for message in alive(stub.WatchReplicas(request, metadata=metadata)):
            router.update(message.replicas)

    try:
        await for_ever(once, "directory")
    finally:
        await channel.close()
