"""`backpack serve …`: one part of the system as a process of its own."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import typer

from backpack_serving.cli.client import exits, out
from backpack_serving.metrics import Metrics
from backpack_serving.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    help="Run one part as a process of its own. Where it listens and whom it calls: `backpack settings`.",
)


@app.command()
def interventions() -> None:
    """The intervention service: tenants, keys, patches, releases, audit."""
    from backpack_serving.interventions import bootstrap

    _serve("interventions", bootstrap.start, lambda running: running.failed)


@app.command()
def gateway() -> None:
    """A gateway: what clients call. Run as many as you like; they hold no state."""
    from backpack_serving.gateway import bootstrap

    _serve("gateway", bootstrap.start)


@app.command()
def directory() -> None:
    """The directory of replicas, where there is no Ray."""
    from backpack_serving.inference import directory as directory_room

    _serve("directory", directory_room.serve)


@app.command()
def inference() -> None:
    """A replica, where there is no Ray. Under Ray Serve, deploy/ray/serve.yaml takes its place."""
    from backpack_serving import rpc
    from backpack_serving.inference import replica

    async def start(settings: Settings, metrics: Metrics) -> replica.Replica:
        return await replica.start(
            settings,
            replica.report_to(
                rpc.channel(settings.directory_address, settings.directory_tls), settings.directory_metadata
            ),
            rpc.channel(settings.interventions_address, settings.tls),
            metrics,
        )

    _serve("inference", start)


def _serve(
    name: str,
    start: Callable[[Settings, Metrics], Awaitable[Any]],
    failure: Callable[[Any], asyncio.Event] = lambda running: asyncio.Event(),
) -> None:
    """Serve until a signal, or until what `failure` gives is set, which is exit status 1: whoever supervises this
    process shall start it again.
    """
    from backpack_serving import exposition
    from backpack_serving.telemetry import configure

    async def serve() -> bool:
        stopped = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        with out.status(f"starting {name}"):
            metrics = Metrics(settings.metrics_tenants)
            running = await start(settings, metrics)
            if settings.metrics_address:
                exposition.listen(metrics.registry, settings.metrics_address, settings.tls)
        out.print(f"{name} serves on [bold]{running.address}[/]; Ctrl-C stops it")
        failed = failure(running)
        ends = [asyncio.ensure_future(event.wait()) for event in (stopped, failed)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        await running.stop()
        return failed.is_set()

    with exits():
        settings = Settings()
        configure(settings, name)
        if asyncio.run(serve()):
            raise typer.Exit(1)
