"""Composes the HTTP server from its settings, and starts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from backpack_lm.manifest import TOKENIZER
from backpack_lm.tokenizer import Tokenizer
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from backpack_serving import rpc, starting
from backpack_serving.errors import ServiceError
from backpack_serving.http import connect, openai, site
from backpack_serving.http.calls import Calls
from backpack_serving.http.document import document
from backpack_serving.http.listener import Listener, listen
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings

PROBE_SECONDS = 2.0
"""How long the gateway has to say whether it serves."""


@dataclass(frozen=True, slots=True)
class HttpServer:
    """A running HTTP server, and the channels on which it passes calls on."""

    listener: Listener
    channels: tuple[Any, ...]
    drain: float

    @property
    def address(self) -> str:
        return self.listener.address

    async def stop(self) -> None:
        await self.listener.stop(self.drain)
        for channel in self.channels:
            await channel.close()


async def start(settings: Settings, metrics: Metrics) -> HttpServer:
    """Wait for the model's manifest, then serve on `settings.http_address`. Calls nobody before it is called.

    Raises OSError if the address is taken, ManifestError if there is no model, ValueError if there is no address, or
    the certificates or the model's chat template are no good.
    """
    if not settings.http_address:
        raise ValueError("BACKPACK_HTTP_ADDRESS is empty; write host:port, as in 127.0.0.1:8480")
    await starting.blocking(partial(rpc.check_address, settings.http_address))
    manifest = (await starting.model(settings)).with_context(settings.context)
    tokenizer = await starting.blocking(partial(Tokenizer.read, settings.model / TOKENIZER, manifest.tokenizer))
    template = await starting.blocking(partial(openai.ChatTemplate.read, settings.model))
    tls = settings.tls
    gateway = rpc.channel(settings.gateway_address, tls)
    interventions = rpc.channel(settings.interventions_address, tls)
    services = connect.services(gateway, interventions)
    described = document()
    studio = await starting.blocking(site.routes)

    async def healthy(request: Request) -> Response:
        """This process lives: its event loop answers."""
        return JSONResponse({"status": "SERVING"})

    async def ready(request: Request) -> Response:
        """Requests would be answered: the gateway serves, and this process isn't stopping."""
        if calls.draining:
            return JSONResponse({"status": "NOT_SERVING", "why": "it is stopping"}, 503)
        try:
            serves, why = await rpc.serving(gateway, PROBE_SECONDS)
        except ServiceError as error:
            serves, why = False, f"the gateway doesn't answer ({error.code})"
        return JSONResponse(
            {"status": "SERVING"} if serves else {"status": "NOT_SERVING", "why": why}, 200 if serves else 503
        )

    async def describe(request: Request) -> Response:
        return JSONResponse(described)

    routes = [
        Route("/healthz", healthy),
        Route("/readyz", ready),
        *studio,
        Route("/openapi.json", describe),
        *openai.routes(manifest, tokenizer, template, gateway, interventions),
        Route("/backpack.v1.{service}/{method}", services),
    ]
    calls = Calls(
        Router(routes, redirect_slashes=False),
        metrics.calls("http"),
        _method_names(services, [route.path for route in studio]),
        settings.http_origins,
    )
    listener = await listen(calls, settings.http_address, tls)
    return HttpServer(listener, (gateway, interventions), settings.drain)


def _method_names(services: connect.Connect, studio: Iterable[str]) -> Callable[[str], str]:
    """What a path is called in metrics, spans and logs: of few names, whatever is asked for."""
    known = {**{path: path for path in services.paths}, **openai.NAMES, "/openapi.json": "/http/Document"}
    known |= dict.fromkeys(studio, "/http/Studio")
    prefix, retrieve = openai.RETRIEVE
    return lambda path: known.get(path) or (retrieve if path.startswith(prefix) else "/http/Other")
