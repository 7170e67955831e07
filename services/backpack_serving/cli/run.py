"""`backpack run`: everything in one process, with two tenants to look at."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import uvloop

from backpack_serving import tasks
from backpack_serving.cli import hints
from backpack_serving.cli.client import exits, out
from backpack_serving.cli.stopping import Stop, Stopped
from backpack_serving.errors import InvalidRequest, Unauthenticated
from backpack_serving.settings import Settings

if TYPE_CHECKING:
    from backpack_serving.embedded import Embedded


def run(
    examples: Annotated[bool, typer.Option(help="Create two example tenants and show one prompt for both.")] = True,
    once: Annotated[bool, typer.Option(help="Stop after the examples.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="Folder or name of the model, as BACKPACK_MODEL; `backpack model list`.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Processes that share the model, as BACKPACK_RANKS.", show_default=False)
    ] = None,
) -> None:
    """Serve on this machine: gateway, inference and interventions in one process, on SQLite.

    A model of `backpack model list` that isn't installed is installed first. Addresses, the model and the state folder
    are settings: `backpack settings` lists them.
    """
    from backpack_lm import installed

    from backpack_serving.cli.model import install_model
    from backpack_serving.observability.telemetry import configure

    with exits():
        given = {"model": model, "ranks": ranks}
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
        if "log_level" not in settings.model_fields_set:
            settings = settings.model_copy(update={"log_level": "warning"})
        configure(settings, "run")
        settings.check_threads()
        if (name := installed.missing(settings.model)) is not None:
            if installed.earlier_install(name) is None:
                out.print(f"installing {name}: some minutes, once on this machine", style="dim")
            try:
                install_model(name)
            except ValueError as error:
                raise ValueError(f"{error}; a model that needs no network: BACKPACK_MODEL=micro") from None
        uvloop.run(_serve_all(settings, examples, once))


async def _serve_all(settings: Settings, examples: bool, once: bool) -> None:
    from backpack_serving import embedded

    started = time.monotonic()
    stop = Stop()
    async with AsyncExitStack() as stack:
        try:
            with out.status(f"loading {settings.model.name} and starting the servers"):
                serving = await stop.start(stack.enter_async_context(embedded.run(settings)))
        except Stopped as stopped:
            stopped.leave()
        out.print(
            f"gateway [bold]{serving.gateway}[/], interventions [bold]{serving.interventions}[/], "
            f"{f'HTTP [bold]{serving.http}[/], ' if serving.http else ''}"
            f"state in [bold]{settings.state}/[/] [dim]({time.monotonic() - started:.1f} s)[/]\n"
        )
        if examples:
            try:
                await tasks.first(stop.asked.wait(), _show_examples(serving, settings))
            except InvalidRequest as error:  # a model of other words, or of a short context
                if once:
                    raise
                out.print(f"The examples aren't for this model: {error.message}", markup=False)
                out.print(f"Make a tenant of your own: `{hints.backpack('tenant create NAME')}` in another terminal.\n")
            except Unauthenticated as error:  # a key of another store, or revoked; a suspended tenant
                if once:
                    raise
                out.print(f"\nThe examples can't be shown: {error.message}\n", markup=False)
        if not once or stop.asked.is_set():
            if not stop.asked.is_set():
                out.print("Serving until you press Ctrl-C.")
            await tasks.first(stop.asked.wait(), *(part.wait() for part in serving.failed))
            signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))  # before it is promised
            out.print("Finishing what runs, then stopping; Ctrl-C again stops at once.")
    if any(part.is_set() for part in serving.failed):
        raise typer.Exit(1)  # so that whoever supervises this process starts it again


async def _show_examples(serving: Embedded, settings: Settings) -> None:
    from backpack_serving.cli import demo

    await demo.provide(serving)
    # The gateway hears of the new tenants by its watch, within milliseconds.
    await asyncio.sleep(0.2)
    await demo.side_by_side(serving)
    out.print(_usage(serving.gateway, serving.interventions, serving.http, settings), markup=False, soft_wrap=True)


def _usage(gateway: str, interventions: str, http: str | None, settings: Settings) -> str:
    from backpack_serving.cli import demo

    key = settings.key_file("harbour")
    here = {"gateway_address": gateway, "interventions_address": interventions, "state": str(settings.state)}
    # Another terminal has none of the variables that this one may have.
    others = [name for name, value in here.items() if value != str(Settings.model_fields[name].default)]
    told = " ".join(f"BACKPACK_{name.upper()}={shlex.quote(here[name])}" for name in others)
    backpack = f"{told} {hints.backpack('')}".strip()
    return f"""
From the command line (in another terminal, here):

    {backpack} generate "{demo.PROMPT}" --as harbour
    {backpack} explain "{demo.PROMPT}" --as harbour
    {backpack} release activate 0 --as harbour    # harbour without a patch; `release rollback` undoes it
{_over_http(http, key, demo.PROMPT)}
From Python:

    from backpack_serving.client import Client

    with Client("{gateway}", open("{key}").read().strip()) as client:
        for part in client.stream("{demo.PROMPT}"):
            print(part.text, end="", flush=True)

With grpcurl:

    grpcurl -plaintext -H "authorization: Bearer $(cat {key})" \\
      -d '{{"prompt": {{"text": "{demo.PROMPT}"}}}}' {gateway} backpack.v1.InferenceService/Generate
"""


def _over_http(address: str | None, key: Path, prompt: str) -> str:
    if address is None:
        return ""
    return f"""
In a browser, with the key that is in {key}: http://{address}/

With any client of OpenAI's API, at http://{address}/v1:

    curl http://{address}/v1/completions -H "Authorization: Bearer $(cat {key})" -H "Content-Type: application/json" \\
      -d '{{"model": "live", "prompt": "{prompt}"}}'
"""
