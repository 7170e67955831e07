"""Runs a `SyncServer` over one gRPC stream: it reacts to messages, writes of the store, and the clock."""

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
"""A reader's messages; an error if one is invalid; None at the end of the stream."""


async def serve_reader(
    server: SyncServer,
    requests: AsyncIterator[pb.SyncRequest],
    next_write: Callable[[], asyncio.Event],
    on_message: Callable[[FromReader], Awaitable[None]],
    executor: Executor,
) -> AsyncGenerator[pb.SyncResponse, None]:
    """Yield the messages for a reader until it ends its stream.

    `next_write` returns an event that the store's next write sets; `on_message` is called after each message of the
    reader. `SyncServer.pump` reads the store, so it runs in `executor`. Raises InvalidRequest for invalid messages.
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
    """Put the reader's messages into the inbox, then None; or the error of an invalid one."""
    try:
        async for request in requests:
            inbox.put_nowait(read_from_reader(request))
    except InvalidRequest as error:
        inbox.put_nowait(error)
    else:
        inbox.put_nowait(None)
