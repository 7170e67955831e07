"""Replicas under Ray Serve: the only file that imports ray.

Ray Serve places replicas, counts them, checks their health and restarts them. Their tokens don't go through it:
each replica runs a gRPC server of its own that gateways call directly (ARCHITECTURE.md says why, with figures).
Two applications: `directory`, which Serve's gRPC proxy makes reachable for gateways, and `replicas`.
`deploy/ray/serve.yaml` deploys both on a cluster. `start` runs both on the Ray that the process is connected to;
call it before the process opens a gRPC channel: Ray forks.
"""

# No `from __future__ import annotations`: Ray Serve reads the builders' annotations to check their arguments.

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import ray
from backpack_proto.v1 import directory_pb2 as pb
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator
from ray import serve
from ray.serve.config import gRPCOptions
from ray.serve.exceptions import RayServeException

from backpack_serving import rpc
from backpack_serving.errors import Unavailable
from backpack_serving.inference import replica
from backpack_serving.inference.autoscaling import METRIC, Autoscaling, TokensInFlight
from backpack_serving.inference.directory import Directory
from backpack_serving.observability import exposition
from backpack_serving.observability.metrics import Metrics
from backpack_serving.observability.telemetry import configure
from backpack_serving.settings import PORTS, Settings, ports_from

DIRECTORY, REPLICAS = "directory", "replicas"
"""Names of the applications. Gateways set BACKPACK_DIRECTORY_APPLICATION to the first."""

GRPC_SERVICERS = ["backpack_proto.v1.directory_pb2_grpc.add_DirectoryServiceServicer_to_server"]

NOT_NICE = {"RAY_worker_niceness": "0"}
"""Ray's workers are 15 nicer than whatever else runs on their node: made for batches, ruinous where tokens are
waited for."""


class Nothing(BaseModel):
    """Arguments of the application `directory`: there are none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Arguments(BaseModel):
    """Arguments of the application `replicas`, as they stand in a Serve config file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(1, ge=1, description="Replicas, where there is no autoscaling.")
    cpus: float = Field(1, ge=0, description="Cores that Ray sets aside for each.")
    gpus: float = Field(0, ge=0, description="GPUs for each: 0, a part of one, or whole ones.")
    surge_percent: int = Field(
        100,
        ge=0,
        le=100,
        description="New replicas that a redeploy starts before it stops old ones, in per cent of all, rounded "
        "up. 0 where there is no room for one more: then old ones stop first.",
    )
    autoscaling: Autoscaling | None = Field(None, description="Replicas by load, instead of `count`.")
    settings: dict[str, Any] = Field(
        {},
        description="Settings of each replica, over those of its node's environment. No secrets: Ray shows these.",
    )

    @field_validator("gpus")
    @classmethod
    def _part_or_whole(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"{gpus} GPUs: Ray places a part of one GPU, or whole ones")
        return gpus

    @field_validator("autoscaling")
    @classmethod
    def _one_of_both(cls, autoscaling: Autoscaling | None, info: ValidationInfo) -> Autoscaling | None:
        if autoscaling and info.data.get("count", 1) != 1:
            raise ValueError(f"count ({info.data['count']}) and autoscaling exclude each other; leave one out")
        return autoscaling

    @field_validator("settings")
    @classmethod
    def _check_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for name in settings:
            if name not in Settings.model_fields:
                raise ValueError(f"no setting is called `{name}`; `backpack settings` lists them")
            if name in SECRETS:
                raise ValueError(f"`{name}` is a secret; set BACKPACK_{name.upper()} in the environment of Ray's nodes")
        if (ranks := Settings(**settings).ranks) > 1:
            raise ValueError(
                f"`ranks` is {ranks}: Ray would set nothing aside for those processes; leave it at 1 under Ray"
            )
        return settings

    @property
    def options(self) -> dict[str, Any]:
        """The deployment options of Ray Serve that these arguments mean."""
        options: dict[str, Any] = {
            "ray_actor_options": {
                "num_cpus": self.cpus,
                "num_gpus": self.gpus,
                "runtime_env": {"env_vars": NOT_NICE},
            },
            "max_surge_percent": self.surge_percent,
            "graceful_shutdown_timeout_s": Settings(**self.settings).drain + 10,
        }
        if self.autoscaling is None:
            return {**options, "num_replicas": self.count}
        wanted = self.autoscaling
        return {
            **options,
            "num_replicas": "auto",
            "autoscaling_config": {
                "min_replicas": wanted.min_replicas,
                "max_replicas": wanted.max_replicas,
                "upscale_delay_s": wanted.up_after_seconds,
                "downscale_delay_s": wanted.down_after_seconds,
                "look_back_period_s": wanted.average_seconds,
                "policy": {
                    "policy_function": TokensInFlight,
                    "policy_kwargs": {"per_replica": wanted.tokens_in_flight},
                },
            },
        }


SECRETS = frozenset(name for name, field in Settings.model_fields.items() if field.annotation is SecretStr)
"""Settings that are never passed as arguments."""


@serve.deployment(
    name="Directory",
    num_replicas=1,
    max_ongoing_requests=10_000,
    ray_actor_options={"num_cpus": 0},
    graceful_shutdown_timeout_s=1,  # gateways watch for ever: there is nothing to wait for
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
)
class ReplicaDeployment:
    """One engine with its own gRPC server, on the address of the node that Ray chose.

    Ray Serve counts it as running when its constructor returns, so after its first token (`replica.start`).
    """

    async def __init__(self, overrides: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = Settings(**overrides)
        configure(settings, "inference")
        address = _listen_address(ray.util.get_node_ip_address(), settings.inference_address)  # type: ignore[no-untyped-call]
        settings = settings.model_copy(update={"inference_address": address})
        self._channel = rpc.channel(settings.interventions_address, settings.tls)
        metrics = Metrics(settings.metrics_tenants)
        if settings.metrics_address:
            exposition.listen(metrics.registry, settings.metrics_address, settings.tls)
        self._replica = await replica.start(settings, self._report_to_directory, self._channel, metrics)

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine has failed."""
        if not self._replica.healthy:
            raise RuntimeError("the engine stopped")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaler hands to the policy."""
        return {METRIC: self._replica.state().tokens_in_flight}

    async def __call__(self) -> str:
        """Where this replica serves. Requests don't come this way."""
        return self._replica.address

    async def __del__(self) -> None:
        await self._replica.stop()
        await self._channel.close()

    async def _report_to_directory(self, state: pb.Replica) -> None:
        try:
            handle = serve.get_app_handle(DIRECTORY)
            async with asyncio.timeout(2):
                await handle.Report.remote(pb.ReportRequest(replica=state))
        except (RayServeException, ray.exceptions.RayError, TimeoutError) as error:
            raise Unavailable("NO_DIRECTORY", f"the directory can't be reached: {error!r}") from None


def _listen_address(host: str, chosen: str) -> str:
    """Where a replica listens on its node: at the chosen port, or the first of PORTS from there that is free.

    Raises OSError if none is. Another process may still take it first; then Serve starts the replica again.
    """
    first = int(chosen.rpartition(":")[2])
    if first == 0:
        return f"{host}:0"
    for port in ports_from(first):
        with suppress(OSError):
            rpc.check_address(f"{host}:{port}")
            return f"{host}:{port}"
    raise OSError(f"no free port for a replica on {host}: {first} and the {PORTS - 1} after it are taken")


def directory(_: Nothing) -> serve.Application:
    """The application of the directory."""
    application: serve.Application = DirectoryDeployment.bind()  # type: ignore[attr-defined]
    return application


def replicas(arguments: Arguments) -> serve.Application:
    """The application of the replicas."""
    deployment = ReplicaDeployment.options(**arguments.options)  # type: ignore[attr-defined]
    application: serve.Application = deployment.bind(arguments.settings)
    return application


def start(settings: Settings, grpc_port: int, **arguments: Any) -> None:
    """Run both applications on the Ray that this process is connected to, and return when they serve.

    Replicas get the settings that were chosen here, but for secrets: those they read from their own environment or
    state folder. `arguments` are those of `Arguments`. Called again, it redeploys the replicas.
    """
    chosen = settings.model_dump(mode="json", exclude_unset=True, exclude=set(SECRETS))
    serve.start(grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=GRPC_SERVICERS))
    serve.run(directory(Nothing()), name=DIRECTORY, route_prefix="/directory")
    serve.run(replicas(Arguments(settings=chosen, **arguments)), name=REPLICAS, route_prefix=None)
