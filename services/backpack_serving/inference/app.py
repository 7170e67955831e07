"""Replicas under Ray Serve: the only file that imports ray.

Ray Serve places replicas, counts them, checks their health and restarts them. Their tokens don't go through it:
each replica runs a gRPC server of its own that gateways call directly (ARCHITECTURE.md says why, with figures).
A replica of several ranks is a placement group of as many bundles, of which Serve gives it the first one.
Two applications: `directory`, which Serve's gRPC proxy makes reachable for gateways, and `replicas`.
`deploy/ray/serve.yaml` deploys both on a cluster. `start` runs both on the Ray that the process is connected to;
call it before the process opens a gRPC channel: Ray forks.
"""

# No `from __future__ import annotations`: Ray Serve reads the builders' annotations to check their arguments.

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Literal

import ray
from backpack_lm.manifest import Manifest, ManifestError
from backpack_lm.sharding import check_ranks
from backpack_proto.v1 import directory_pb2 as pb
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator
from ray import serve
from ray.serve.config import gRPCOptions
from ray.serve.exceptions import RayServeException
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from backpack_serving import rpc
from backpack_serving.engine.ranks import ENDING, PAUSE
from backpack_serving.errors import Unavailable
from backpack_serving.inference import rank, replica
from backpack_serving.inference.autoscaling import METRIC, Autoscaling, TokensInFlight
from backpack_serving.inference.directory import Directory
from backpack_serving.inference.ranks import Invitation
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
    tensor_parallel: int = Field(
        1, ge=1, le=1024, description="Ranks of each replica: processes that share its model, one a GPU."
    )
    placement: Literal["STRICT_PACK", "SPREAD"] = Field(
        "STRICT_PACK",
        description="Where Ray places a replica's ranks: all on one node, or on as many nodes as it can.",
    )
    cpus: float = Field(1, ge=0, description="Cores that Ray sets aside for each rank.")
    gpus: float = Field(0, ge=0, description="GPUs for each rank: 0, 1, or, without other ranks, a part of one.")
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
    def _one_at_most(cls, gpus: float) -> float:
        if gpus > 1:
            raise ValueError(
                f"{gpus:g} GPUs: a rank computes on one; set gpus: 1, and tensor_parallel to a replica's number of GPUs"
            )
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
        if settings.get("ranks", 1) != 1:
            raise ValueError("`ranks` are processes that Ray would set nothing aside for; use tensor_parallel")
        Settings(**settings)
        return settings

    @model_validator(mode="after")
    def _can_be_placed(self) -> "Arguments":
        if self.tensor_parallel > 1:
            if 0 < self.gpus < 1:
                raise ValueError(f"gpus is {self.gpus}: ranks (tensor_parallel) need a GPU each, or none")
            if not self.cpus and not self.gpus:
                raise ValueError("cpus and gpus are 0: Ray places ranks (tensor_parallel) by what they need")
        elif self.placement != "STRICT_PACK":
            raise ValueError(f"placement is {self.placement}: placement needs tensor_parallel above 1")
        return self

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
        if self.tensor_parallel > 1:
            needed = {"CPU": self.cpus, "GPU": self.gpus}
            options["placement_group_bundles"] = [{n: v for n, v in needed.items() if v}] * self.tensor_parallel
            options["placement_group_strategy"] = self.placement
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
        update: dict[str, Any] = {"inference_address": address, "ranks": 1}
        launcher = None
        if group := ray.util.get_current_placement_group():
            launcher = RayRanks(group)
            threads = settings.threads or max(1, int(launcher.share(0)["num_cpus"]))
            update |= {"ranks": group.bundle_count, "threads": threads}
        settings = settings.model_copy(update=update)
        self._channel = rpc.channel(settings.interventions_address, settings.tls)
        metrics = Metrics(settings.metrics_tenants)
        if settings.metrics_address:
            exposition.listen(metrics.registry, settings.metrics_address, settings.tls)
        self._replica = await replica.start(settings, self._report_to_directory, self._channel, metrics, launcher)

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


class RayRanks:
    """The other ranks of the replica that this process is, in the other bundles of its placement group.

    They are its tasks, so Ray ends them with it, and they take its runtime environment.
    """

    def __init__(self, group: PlacementGroup) -> None:
        self.host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._group, self._node = group, ray.get_runtime_context().get_node_id()

    def start(self, invitation: Invitation) -> "RayRank":
        bundle = invitation.shard.rank
        task = _run_rank.options(
            name=f"Rank:{bundle}",
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle),
            runtime_env={"env_vars": NOT_NICE},
            **self.share(bundle),
        )
        return RayRank(task.remote(invitation, self._node))

    def share(self, bundle: int) -> dict[str, float]:
        """What Ray sets aside for a rank, as its options are called."""
        needed = self._group.bundle_specs[bundle]
        return {"num_cpus": needed.get("CPU", 0), "num_gpus": needed.get("GPU", 0)}


class RayRank:
    """A rank as a task of Ray's."""

    def __init__(self, status: "ray.ObjectRef[int]") -> None:
        self._status = status

    def ended(self) -> str:
        try:
            return f"ended with status {ray.get(self._status, timeout=PAUSE)}"
        except ray.exceptions.GetTimeoutError:
            return ""
        except ray.exceptions.RayTaskError as error:
            return f"failed: {error.cause!r}"
        except ray.exceptions.RayError as error:
            return f"ended: {' '.join(str(error).split())}"

    def end(self) -> None:
        ended, _ = ray.wait([self._status], timeout=ENDING)
        if not ended:
            ray.cancel(self._status, force=True)


@ray.remote(max_retries=0, max_calls=1)
def _run_rank(invitation: Invitation, node: str) -> int:
    """Be a rank of a replica whose rank 0 is on a node. Ray shows it the one GPU that it is to compute on."""
    host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return rank.run(invitation, host, 0, other_node=ray.get_runtime_context().get_node_id() != node)


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
    """The application of the replicas.

    Raises ConfigError, with the numbers that would fit, if so many ranks can't share the model. Where its folder can't
    be read, as in a container without it, replicas do.
    """
    with suppress(ManifestError):
        check_ranks(Manifest.read(Settings(**arguments.settings).model).config, arguments.tensor_parallel)
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
