"""Replicas under Ray Serve: the only file that imports ray.

Ray Serve places replicas, counts them, checks their health and restarts them. Their tokens don't go through it:
each replica runs a gRPC server of its own that gateways call directly (ARCHITECTURE.md says why, with figures).
Two applications: `directory`, which Serve's gRPC proxy makes reachable for gateways, and `replicas`. `start` runs
both on the Ray that the process is connected to; call it before the process opens a gRPC channel: Ray forks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import ray
from backpack_proto.v1 import directory_pb2 as pb
from ray import serve
from ray.serve.config import gRPCOptions
from ray.serve.exceptions import RayServeException

from backpack_serving import rpc
from backpack_serving.errors import Unavailable
from backpack_serving.inference import replica
from backpack_serving.inference.directory import Directory
from backpack_serving.metrics import Metrics
from backpack_serving.settings import Settings
from backpack_serving.telemetry import configure

DIRECTORY, REPLICAS = "directory", "replicas"
"""Names of the applications. Gateways set BACKPACK_DIRECTORY_APPLICATION to the first."""

GRPC_SERVICERS = ["backpack_proto.v1.directory_pb2_grpc.add_DirectoryServiceServicer_to_server"]


@serve.deployment(
    name="Directory",
    num_replicas=1,
    max_ongoing_requests=10_000,
    ray_actor_options={"num_cpus": 0},
    logging_config={"enable_access_log": False},  # several reports a second
)
class DirectoryDeployment:
    """The directory. It has one copy; when that is restarted, replicas fill it again within a second."""

    def __init__(self) -> None:
        self._directory = Directory()

    async def Report(self, request: pb.ReportRequest) -> pb.ReportResponse:
        self._directory.report(request.replica)
        return pb.ReportResponse()

    async def WatchReplicas(self, request: pb.WatchReplicasRequest) -> AsyncIterator[pb.WatchReplicasResponse]:
        async for known in self._directory.watch():
            yield pb.WatchReplicasResponse(replicas=known)


@serve.deployment(
    name="Replica",
    health_check_period_s=1,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=40,
)
class ReplicaDeployment:
    """One engine with its own gRPC server, on the address of the node that Ray chose."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        configure(settings)
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        settings = settings.model_copy(update={"inference_address": f"{host}:0"})
        self._channel = rpc.channel(settings.interventions_address)
        fetch = replica.fetch_from(self._channel, settings.key_for("replica"))
        metrics = Metrics(settings.metrics_tenants)
        if settings.metrics_address:
            metrics.listen(settings.metrics_address)
        self._replica = await replica.start(settings, self._report, fetch, metrics)

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine has failed."""
        if not self._replica.healthy:
            raise RuntimeError("the engine stopped")

    async def __call__(self) -> str:
        """Where this replica serves. Requests don't come this way."""
        return self._replica.address

    async def __del__(self) -> None:
        await self._replica.stop()
        await self._channel.close()

    async def _report(self, state: pb.Replica) -> None:
        try:
            handle = serve.get_app_handle(DIRECTORY)
            await asyncio.wait_for(handle.Report.remote(pb.ReportRequest(replica=state)), 2)
        except (RayServeException, ray.exceptions.RayError, TimeoutError) as error:
            raise Unavailable("NO_DIRECTORY", f"the directory can't be reached: {error!r}") from None


def directory(_: dict[str, Any] | None = None) -> serve.Application:
    """The application of the directory."""
    application: serve.Application = DirectoryDeployment.bind()  # type: ignore[attr-defined]
    return application


def replicas(arguments: dict[str, Any] | None = None) -> serve.Application:
    """The application of the replicas. Arguments: `count`, and `gpus` for each (0: on the CPU)."""
    arguments = arguments or {}
    deployment = ReplicaDeployment.options(  # type: ignore[attr-defined]
        num_replicas=int(arguments.get("count", 1)),
        ray_actor_options={
            "num_gpus": float(arguments.get("gpus", 0)),
            "num_cpus": float(arguments.get("cpus", 1)),
        },
    )
    application: serve.Application = deployment.bind(arguments.get("settings") or Settings())
    return application


def start(settings: Settings, count: int, grpc_port: int, **resources: float) -> None:
    """Run both applications on the Ray that this process is connected to, and return when they serve."""
    serve.start(grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=GRPC_SERVICERS))
    serve.run(directory(), name=DIRECTORY, route_prefix="/directory")
    serve.run(replicas({"settings": settings, "count": count, **resources}), name=REPLICAS, route_prefix=None)
