"""Everything in one process: interventions, directory, one replica, a gateway and HTTP on one event loop.

They are the same servers that run apart on a cluster, and they speak gRPC to each other here too, over the
loopback: there is one code path for what a request means. Only their addresses are chosen here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from backpack_serving import rpc, starting, tasks
from backpack_serving.gateway import bootstrap as gateway
from backpack_serving.http import bootstrap as http
from backpack_serving.inference import directory
from backpack_serving.interventions import bootstrap as interventions
from backpack_serving.observability import exposition
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings


@dataclass(frozen=True, slots=True)
class Embedded:
    """The addresses that clients call; a part sets its event in `failed` if it must be restarted.

    `http` is None where none is served.
    """

    gateway: str
    interventions: str
    http: str | None
    metrics: Metrics
    settings: Settings
    failed: tuple[asyncio.Event, ...]


@asynccontextmanager
async def run(settings: Settings) -> AsyncIterator[Embedded]:
    """Serve while the block runs. It is entered when requests can be served, or when a part has failed."""
    listening = (
        settings.gateway_address,
        settings.inference_address,
        settings.directory_address,
        settings.http_address,
    )
    for address in filter(None, listening):
        await starting.blocking(partial(rpc.check_address, address))
    await starting.model(settings, weights=True)
    async with AsyncExitStack() as stack:
        tls = settings.tls
        if tls.certificate and not tls.authorities:
            raise ValueError("BACKPACK_TLS_CA isn't set: in one process, too, the parts call each other by TLS")
        metrics = Metrics(settings.metrics_tenants)
        if settings.metrics_address:
            await starting.blocking(partial(exposition.listen, metrics.registry, settings.metrics_address, tls))
        control = await interventions.start(settings, metrics)
        stack.push_async_callback(control.stop)
        # Port 0 means any free port: pass on the one that was chosen.
        settings = settings.model_copy(update={"interventions_address": control.address})
        replica_directory = await directory.serve(settings, metrics)
        stack.push_async_callback(replica_directory.stop)
        settings = settings.model_copy(update={"directory_address": replica_directory.address})
        channels = [rpc.channel(part.address, tls) for part in (control, replica_directory)]
        for channel in channels:
            stack.push_async_callback(channel.close)
        # This import loads torch; all other errors were raised before.
        from backpack_serving.inference import replica

        serving = await replica.start(
            settings,
            replica.report_to(channels[1]),
            channels[0],
            metrics,
        )
        stack.push_async_callback(serving.stop)
        front = await gateway.start(settings, metrics)
        stack.push_async_callback(front.stop)
        # Last, so that it is the first to stop: what it still runs needs the others.
        web = None
        if settings.http_address:
            web = await http.start(settings.model_copy(update={"gateway_address": front.address}), metrics)
            stack.push_async_callback(web.stop)
        failed = (control.failed, serving.failed)
        ready = starting.wait_for("the gateway", front.ready, settings.start_wait, why=front.not_ready)
        await tasks.first(ready, *(part.wait() for part in failed))
        yield Embedded(front.address, control.address, web.address if web else None, metrics, settings, failed)
