"""The two streams that a gateway follows all its life: the intervention service's watch, and the directory's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import structlog
from backpack_proto.v1 import directory_pb2, directory_pb2_grpc, interventions_pb2, interventions_pb2_grpc

from backpack_serving import rpc
from backpack_serving.errors import ServiceError
from backpack_serving.gateway.book import Book
from backpack_serving.gateway.routing import Router
from backpack_serving.wire.sync import read_change

M = TypeVar("M")

log = structlog.get_logger(__name__)

SILENCE = 5.0
"""Seconds without a message, bookmarks included, after which a stream is taken for dead and opened anew."""

LONGEST_PAUSE = 5.0


async def follow_interventions(address: str, key: str, fingerprint: str, book: Book) -> None:
    """Keep the book up to date, for ever."""
    channel = rpc.channel(address)
    stub = interventions_pb2_grpc.SyncServiceStub(channel)

    async def once() -> None:
        epoch, revision = book.position
        start = interventions_pb2.Position(epoch=epoch, revision=revision)
        request = interventions_pb2.WatchRequest(model_fingerprint=fingerprint, **{"from": start})
        async for message in _alive(stub.Watch(request, metadata=rpc.with_key(key))):
            at = message.position
            book.apply((at.epoch, at.revision), message.reset, [read_change(c) for c in message.changes])

    try:
        await _for_ever(once, "interventions", address)
    finally:
        await channel.close()


async def follow_directory(address: str, metadata: tuple[tuple[str, str], ...], router: Router) -> None:
    """Keep the router's replicas up to date, for ever."""
    channel = rpc.channel(address)
    stub = directory_pb2_grpc.DirectoryServiceStub(channel)

    async def once() -> None:
        request = directory_pb2.WatchReplicasRequest()
        async for message in _alive(stub.WatchReplicas(request, metadata=metadata)):
            router.update(message.replicas)

    try:
        await _for_ever(once, "directory", address)
    finally:
        await channel.close()


async def _alive(call: AsyncIterator[M]) -> AsyncIterator[M]:
    """The call's messages. Raises TimeoutError after SILENCE: a half-open connection looks just like that."""
    messages = aiter(call)
    try:
        while True:
            try:
                yield await asyncio.wait_for(anext(messages), SILENCE)
            except StopAsyncIteration:
                return
    finally:
        call.cancel()  # type: ignore[attr-defined]


async def _for_ever(once: Callable[[], Awaitable[None]], name: str, address: str) -> None:
    """Run `once` again and again, with full jitter (exponential, at most LONGEST_PAUSE) between failures."""
    failures, told = 0, False
    while True:
        started = asyncio.get_running_loop().time()
        try:
            with rpc.errors():
                await once()
            reason = "the stream ended"
        except (ServiceError, TimeoutError) as error:
            reason = str(error) or "silence"
        if asyncio.get_running_loop().time() - started > SILENCE:
            failures, told = 0, False
        if not told:
            log.warning("lost a stream; trying again until it is back", peer=name, address=address, reason=reason)
            told = True
        failures += 1
        await asyncio.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.1 * 2**failures)))
