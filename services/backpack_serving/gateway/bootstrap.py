"""The gateway as a process."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from backpack_lm.manifest import Manifest
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2_grpc

from backpack_serving import rpc
from backpack_serving.gateway.book import Book
from backpack_serving.gateway.routing import Router
from backpack_serving.gateway.servicer import GatewayServicer
from backpack_serving.gateway.sync import follow_directory, follow_interventions
from backpack_serving.metrics import Metrics
from backpack_serving.settings import Settings

SERVICE = "backpack.v1.InferenceService"


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway."""

    server: rpc.Server
    book: Book
    router: Router
    tasks: tuple[asyncio.Task[None], ...]
    drain: float

    @property
    def address(self) -> str:
        return self.server.address

    async def ready(self) -> None:
        """Wait until requests can be served: the book has been read, and there is a replica."""
        while self.book.age == float("inf") or not self.router.size:
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        await self.server.stop(self.drain)
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def start(settings: Settings, metrics: Metrics) -> Gateway:
    """Serve on `settings.gateway_address`. Raises OSError if it is taken, ManifestError if there is no model."""
    manifest = Manifest.read(settings.model)
    tokenizer = Tokenizer.read(settings.model / "tokenizer.json")
    key = settings.key_for("replica")
    book, router = Book(settings.expired_after), Router(manifest.fingerprint)
    measured = metrics.gateway(lambda: router.size, lambda: book.age)
    servicer = GatewayServicer(manifest, tokenizer, book, router, key, measured)
    service = rpc.Service(SERVICE, inference_pb2_grpc.add_InferenceServiceServicer_to_server, servicer)
    server = await rpc.start([service], settings.gateway_address, metrics.calls("gateway"))
    tasks = (
        asyncio.create_task(follow_interventions(settings.interventions_address, key, manifest.fingerprint, book)),
        asyncio.create_task(follow_directory(settings.directory_address, settings.directory_metadata, router)),
        asyncio.create_task(_tell_health(server, book, router, settings.stale_after)),
    )
    return Gateway(server, book, router, tasks, settings.drain)


async def _tell_health(server: rpc.Server, book: Book, router: Router, stale_after: float) -> None:
    """Not serving while there is no replica, or no news from the intervention service."""
    while True:
        serving = router.size > 0 and book.age < stale_after
        for name in ("", SERVICE):
            await server.set_serving(serving, name)
        await asyncio.sleep(0.5)
