"""Composes a gateway from its settings, and starts it."""

from __future__ import annotations

import asyncio
import socket
import uuid
from dataclasses import dataclass
from functools import partial
from typing import Any

from backpack_lm.manifest import TOKENIZER
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2_grpc, sync_pb2_grpc

from backpack_serving import rpc, starting, tasks
from backpack_serving.auth.identity import Identities
from backpack_serving.auth.keys import Principal
from backpack_serving.gateway.canary_stats import CanaryStats
from backpack_serving.gateway.limits import Limit, TenantLimits
from backpack_serving.gateway.registry import TenantRegistry
from backpack_serving.gateway.release_judge import ReleaseJudge
from backpack_serving.gateway.releases import ReleaseResolver, resolve_from
from backpack_serving.gateway.replica_watch import follow_directory
from backpack_serving.gateway.routing import Router
from backpack_serving.gateway.servicer import GatewayServicer
from backpack_serving.gateway.usage import UsageMeter
from backpack_serving.observability.metrics import Metrics
from backpack_serving.references import ReaderKind
from backpack_serving.settings import Settings
from backpack_serving.sync.client import SyncClient
from backpack_serving.sync.transport import SyncTransport

SERVICE = "backpack.v1.InferenceService"
READER = "backpack.v1.SyncService"
"""Health service name under which a gateway reports whether it follows the intervention service."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway."""

    server: rpc.Server
    registry: TenantRegistry
    router: Router
    tasks: tuple[asyncio.Task[None], ...]
    drain: float
    control: Any

    @property
    def address(self) -> str:
        return self.server.address

    async def ready(self) -> None:
        """Wait until the gateway has a view of the store and at least one replica."""
        while self.registry.age == float("inf") or not self.router.size:
            await asyncio.sleep(0.02)

    def not_ready(self) -> str:
        """What the gateway still waits for, as text for people; empty if it can serve."""
        if self.registry.age == float("inf"):
            return "it hasn't heard from the intervention service"
        return "" if self.router.size else "there is no replica"

    async def stop(self) -> None:
        await self.server.stop(self.drain)
        await tasks.end(*self.tasks)
        await self.router.close()
        await self.control.close()


def _display_name(address: str) -> str:
    """The gateway's name in `backpack fleet`: its address, with the host name if it listens on all interfaces."""
    host, _, port = address.rpartition(":")
    return f"{socket.gethostname()}:{port}" if host in ("0.0.0.0", "[::]", "") else address


async def start(settings: Settings, metrics: Metrics) -> Gateway:
    """Wait for the model's manifest and the key, then serve on `settings.gateway_address`.

    Raises OSError if the address is taken or there is no key, ManifestError if there is no model, ValueError if
    certificates, limits or the issuer of tokens are no good.
    """
    await starting.blocking(partial(rpc.check_address, settings.gateway_address))
    manifest, key = await starting.model(settings), await starting.key(settings, "replica")
    manifest = manifest.with_context(settings.context)
    tokenizer = await starting.blocking(partial(Tokenizer.read, settings.model / TOKENIZER, manifest.tokenizer))
    tls, directory_tls = settings.tls, settings.directory_tls
    sync_client = SyncClient(
        ReaderKind.GATEWAY, uuid.uuid4().hex, _display_name(settings.gateway_address), manifest.fingerprint
    )
    registry = TenantRegistry(sync_client, settings.expired_after, settings.serve_expired)
    router = Router(manifest.fingerprint, tls)
    control, canary_stats = rpc.channel(settings.interventions_address, tls), CanaryStats()
    transport = SyncTransport(
        control, key, sync_client, canary_stats, settings.state / "known-good" / "gateway" / "view"
    )
    await starting.blocking(transport.restore)

    async def by_key(presented: str) -> Principal:
        return registry.authenticate(presented)

    async def check_tenant(principal: Principal) -> None:
        registry.check(principal.tenant)  # a tenant that doesn't exist is refused later, when its channel is looked up

    identities = Identities(by_key, check_tenant, settings.issuer, settings.certificates)
    default = Limit(settings.limit_requests, settings.limit_tokens, settings.limit_concurrent)
    limits = TenantLimits(default, settings.limits_file)
    releases = ReleaseResolver(
        registry, resolve_from(control, key), lambda since: transport.wait_until(since, settings.catch_up)
    )
    meters = UsageMeter(limits, metrics.gateway(lambda: router.size, lambda: registry.age))
    judge = ReleaseJudge(transport, releases, router, sync_pb2_grpc.SyncServiceStub(control), key)
    servicer = GatewayServicer(
        manifest, tokenizer, identities, releases, meters, router, canary_stats, judge, key, settings.log_prompts
    )
    service = rpc.Service(SERVICE, inference_pb2_grpc.add_InferenceServiceServicer_to_server, servicer)
    background = (
        transport.run,
        partial(follow_directory, settings.directory_address, settings.directory_metadata, router, directory_tls),
    )
    starting.freeze_heap()  # before anybody calls: it holds the loop
    server = await rpc.start(
        [service],
        settings.gateway_address,
        metrics.calls("gateway"),
        tls=tls,
        connection_age=settings.connection_age,
        message_limit=rpc.SMALL,
    )
    sync_client.name = _display_name(server.address)
    running = [asyncio.create_task(each()) for each in background]
    if starting.can_judge(settings):
        running.append(asyncio.create_task(judge.run()))
    running.append(asyncio.create_task(_publish_health(server, registry, router, settings.stale_after)))
    return Gateway(server, registry, router, tuple(running), settings.drain, control)


async def _publish_health(server: rpc.Server, registry: TenantRegistry, router: Router, stale_after: float) -> None:
    """Update the health services twice a second, for ever.

    The gateway reports NOT_SERVING without a replica, or if its view of the store is too old to serve any tenant.
    Without news for more than `stale_after` seconds it still serves, and only `READER` reports NOT_SERVING.
    """
    while True:
        missing = [] if registry.usable else [registry.contact]
        missing += [] if router.size else ["no replica of this model is known to the directory"]
        for name in ("", SERVICE):
            await server.set_serving(not missing, name, "; ".join(missing))
        await server.set_serving(registry.age < stale_after, READER, registry.contact)
        await asyncio.sleep(0.5)
