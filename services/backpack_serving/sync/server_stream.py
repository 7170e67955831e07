"""The service's end of one reader's stream over gRPC: a `SyncServer`, driven by messages, writes and the clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor

from backpack_proto.v1 import sync_pb2 as pb

from backpack_serving import tasks
from backpack_serving.errors import InvalidRequest
from backpack_serving.sync.messages import FromReader
from backpack_serving.sync.server import SyncServer
from backpack_serving.sync.wire import read_from_reader, write_to_reader

POLL_SECONDS = 1.0

Inbox = asyncio.Queue[FromReader | Exception | None]
"""What a reader said; what was wrong with it; None at its end."""


async def serve_reader(
    server: SyncServer,
    requests: AsyncIterator[pb.SyncRequest],
    next_write: Callable[[], asyncio.Event],
    on_message: Callable[[FromReader], Awaitable[None]],
    executor: Executor,
) -> AsyncGenerator[pb.SyncResponse, None]:
    """The messages for a reader until it ends its stream.

    `next_write` gives an event that the store's next write sets; `on_message` is called after each message was taken in.
    `SyncServer.pump` reads the store, so it runs in `executor`. Raises what the reader's messages raise.
    """
    inbox: Inbox = asyncio.Queue()
    receiving = asyncio.create_task(_receive(requests, inbox))
    arrived: asyncio.Task[FromReader | Exception | None] = asyncio.create_task(inbox.get())
    try:
        while True:
            written = next_write()
            pump = asyncio.get_running_loop().run_in_executor(executor, server.pump, time.monotonic())
            for message in await pump:
                for part in write_to_reader(message):
                    yield part
            seconds = min(POLL_SECONDS, server.due - time.monotonic()) if server.hello else POLL_SECONDS
            write_or_timeout = asyncio.create_task(tasks.wait_at_most(written, seconds))
            await asyncio.wait({write_or_timeout, arrived}, return_when=asyncio.FIRST_COMPLETED)
            write_or_timeout.cancel()
            while arrived.done():
                request = arrived.result()
                if request is None:
                    return
                if isinstance(request, Exception):
                    raise request
                server.receive(request, time.monotonic())
                await on_message(request)
                arrived = asyncio.create_task(inbox.get())
                await asyncio.sleep(0)
    finally:
        receiving.cancel()
        arrived.cancel()


async def _receive(requests: AsyncIterator[pb.SyncRequest], inbox: Inbox) -> None:
    """Put what the reader says into the inbox, then None; or what is wrong with it."""
    try:
        async for request in requests:
            inbox.put_nowait(read_from_reader(request))
    except InvalidRequest as error:
        inbox.put_nowait(error)
    else:
        inbox.put_nowait(None)
