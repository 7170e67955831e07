"""`backpack serve …`: one part of the system as a process of its own."""

from __future__ import annotations

import asyncio
import faulthandler
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import typer
import uvloop

from backpack_serving import tasks
from backpack_serving.cli.client import exits, out
from backpack_serving.cli.stopping import Stop, Stopped
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings

if TYPE_CHECKING:
    from backpack_serving.inference.replica import Replica

app = typer.Typer(
    no_args_is_help=True,
    help="Run one part as a process of its own. Where it listens and whom it calls: `backpack settings`.",
)


HANG_TIMEOUT = 60.0
"""Seconds without a turn of the event loop after which a server prints its stacks and exits."""

WATCH = 1.0
"""Seconds between two resets of that timer."""


@app.command()
def interventions() -> None:
    """Run the intervention service: tenants, keys, patches, releases, audit."""
    from backpack_serving.interventions import bootstrap

    _serve("interventions", bootstrap.start, lambda running: running.failed)


@app.command()
def gateway() -> None:
    """Run a gateway, which clients call. It uses one core; start more of them behind a TCP load balancer."""
    from backpack_serving.gateway import bootstrap

    _serve("gateway", bootstrap.start)


@app.command()
def http() -> None:
    """Run HTTP: OpenAI's API, and our services as Connect and JSON. It calls the gateway and interventions."""
    from backpack_serving.http import bootstrap

    _serve("http", bootstrap.start)


@app.command()
def directory() -> None:
    """Run the directory of replicas, without Ray."""
    from backpack_serving.inference import directory as directory_room

    _serve("directory", directory_room.serve)


@app.command()
def inference() -> None:
    """Run a replica, without Ray. With Ray Serve, deploy/ray/serve.yaml takes its place."""
    from backpack_serving import rpc
    from backpack_serving.inference.required import required

    async def start(settings: Settings, metrics: Metrics) -> Replica:
        await required(settings)  # before torch is loaded, so that errors come at once
        from backpack_serving.inference import replica

        return await replica.start(
            settings,
            replica.report_to(
                rpc.channel(settings.directory_address, settings.directory_tls), settings.directory_metadata
            ),
            rpc.channel(settings.interventions_address, settings.tls),
            metrics,
        )

    _serve("inference", start, lambda running: running.failed)


def _serve(
    name: str,
    start: Callable[[Settings, Metrics], Awaitable[Any]],
    failure: Callable[[Any], asyncio.Event] = lambda running: asyncio.Event(),
) -> None:
    """Serve until a signal, or until the event of `failure` is set: then exit with status 1, to be restarted.

    A signal before the server serves exits with status 128 and its number.
    """
    from backpack_serving import starting
    from backpack_serving.observability import exposition
    from backpack_serving.observability.telemetry import configure

    async def started() -> Any:
        metrics = Metrics(settings.metrics_tenants)
        if settings.metrics_address:  # first, so that its errors come before anything runs
            listen = partial(exposition.listen, metrics.registry, settings.metrics_address, settings.tls)
            await starting.blocking(listen)
        return await start(settings, metrics)

    async def serve() -> bool:
        stop = Stop()
        try:
            with out.status(f"starting {name}"):
                running = await stop.start(started())
        except Stopped as stopped:
            stopped.leave()
        starting.keep_heap_frozen()
        out.print(f"{name} serves on [bold]{running.address}[/]; Ctrl-C stops it")
        failed = failure(running)
        watching = asyncio.create_task(_end_if_it_hangs())
        await tasks.first(stop.asked.wait(), failed.wait())
        await running.stop()
        await tasks.end(watching)
        return failed.is_set()

    with exits():
        settings = Settings()
        configure(settings, name)
        if uvloop.run(serve()):
            raise typer.Exit(1)


async def _end_if_it_hangs() -> NoReturn:
    """Exit with status 1, and all stacks on stderr, if the event loop hangs.

    The port would go on accepting connections, so a supervisor may not notice. faulthandler's watchdog is a C thread
    that needs no lock of Python's.
    """
    try:
        while True:
            faulthandler.dump_traceback_later(HANG_TIMEOUT, exit=True)
            await asyncio.sleep(WATCH)
    finally:
        faulthandler.cancel_dump_traceback_later()
