"""Runs `SyncServer`s over gRPC streams: they react to messages, writes of the store, and the clock."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import aclosing, contextmanager, nullcontext, suppress
from typing import Protocol

from backpack_proto.v1 import sync_pb2 as pb

from backpack_serving import tasks
from backpack_serving.errors import InvalidRequest
from backpack_serving.sync.messages import BOOKMARK_SECONDS, Delta, FromReader, Snapshot, ToReader
from backpack_serving.sync.server import History, SyncServer
from backpack_serving.sync.state import StateEntry
from backpack_serving.sync.wire import read_from_reader, write_changes, write_header, write_to_reader
from backpack_serving.turnstile import Turnstile

POLL_SECONDS = 1.0

SHARED_SECONDS = 0.1
"""A bookmark may rest on a read of the store that is so old: one read serves many bookmarks."""

EARLY_SECONDS = 0.5
"""A bookmark that is due so soon is sent with the answer to a message: a reader's report wakes its stream anyway."""

UNITS_A_TURN = 16
"""How many streams may do something in one turn of the loop: take messages, and send one."""

WOKEN_A_TURN = 64
"""How many streams are told of a write in one turn of the loop: each then waits for its turn to do something."""

LONG_AT_ONCE = 16
"""How many streams are sent a message in several parts at the same time."""

KEEP_WAITING = pb.SyncResponse().SerializeToString()
"""A message without content: readers of every version ignore it, and know that the stream is alive."""

LONG = 500
"""Changes from which on encoding them is no work for the loop."""

Part = tuple[bytes, bytes]
"""Of a message, or of a part of a long one: bytes that all readers share, and a stream's own. They are joined when they
are sent, so that streams which wait for their turn hold no copies."""

_Inbox = deque[FromReader | Exception | None]
"""A reader's messages; an error if one is invalid; None at the end of the stream."""


class SharedHistory(History, Protocol):
    """A history that all streams of a process share."""

    async def refresh(self, within: float = 0.0) -> None:
        """Read what was written, unless a read that began within so many seconds has done it.

        Raises Unavailable if the store can't be read.
        """


class ReaderStreams:
    """All streams of a process: they share a history, threads, the turns of the loop, and the bytes of what is sent."""

    def __init__(self, history: SharedHistory, executor: Executor) -> None:
        self.history, self._executor = history, executor
        self.turns = Turnstile(UNITS_A_TURN)
        self._long = asyncio.Semaphore(LONG_AT_ONCE)
        self._encoder = ChangeEncoder()
        self._listening: set[asyncio.Event] = set()
        self._to_wake: set[asyncio.Event] = set()

    def wake(self) -> None:
        """Wake all streams, some in each turn of the loop, because the history has moved on."""
        waking = bool(self._to_wake)
        self._to_wake |= self._listening
        if not waking:
            self._wake_some()

    def _wake_some(self) -> None:
        for _ in range(min(WOKEN_A_TURN, len(self._to_wake))):
            self._to_wake.pop().set()
        if self._to_wake:
            asyncio.get_running_loop().call_soon(self._wake_some)

    @contextmanager
    def listening(self) -> Iterator[asyncio.Event]:
        """An event that is set when the history moves on."""
        event = asyncio.Event()
        self._listening.add(event)
        try:
            yield event
        finally:
            self._listening.discard(event)

    async def serve(
        self,
        server: SyncServer,
        requests: AsyncIterator[pb.SyncRequest],
        on_message: Callable[[FromReader], Awaitable[None]],
    ) -> AsyncGenerator[bytes, None]:
        """Yield the messages for a reader, encoded, until it ends its stream.

        `on_message` is called after each message of the reader. Raises InvalidRequest for invalid messages, and as
        `SyncServer` does.
        """
        inbox: _Inbox = deque()
        with self.listening() as woken:
            receiving = asyncio.create_task(_receive(requests, inbox, woken))
            try:
                while True:
                    await tasks.wait_at_most(woken, _seconds_until_due(server))
                    await self.turns.enter()
                    woken.clear()
                    early = EARLY_SECONDS if inbox else 0.0
                    while inbox:
                        request = inbox.popleft()
                        if request is None:
                            return
                        if isinstance(request, Exception):
                            raise request
                        server.receive(request, time.monotonic())
                        await on_message(request)
                        if inbox:
                            await self.turns.enter()
                    if server.opening:
                        await self.history.refresh()
                        await self.turns.enter()
                    elif server.hello and time.monotonic() >= server.due - early:
                        await self.history.refresh(SHARED_SECONDS)
                        await self.turns.enter()  # others have waited for the same read
                        server.hasten_bookmark()
                    parts = await self._messages(server)
                    if len(parts) == 1:
                        shared, own = parts[0]
                        yield shared + own
                    elif parts:
                        async with aclosing(self._one_by_one(parts)) as long:
                            async for part in long:
                                yield part
            finally:
                receiving.cancel()

    async def _one_by_one(self, parts: list[Part]) -> AsyncGenerator[bytes, None]:
        """The parts of a long message. Few readers get one at the same time, the others are kept waiting: if all had a
        share, and the share of each took longer than SILENCE, all would begin anew and nobody would be done, ever.
        """
        while not await self._acquire_long():
            await self.turns.enter()
            yield KEEP_WAITING
        try:
            for shared, own in parts:
                await self.turns.enter()
                yield shared + own
        finally:
            self._long.release()

    async def _acquire_long(self) -> bool:
        with suppress(TimeoutError):
            # Those who began to wait at once don't wake at once.
            async with asyncio.timeout(BOOKMARK_SECONDS * random.uniform(0.5, 1.0)):
                return await self._long.acquire()
        return False

    async def _messages(self, server: SyncServer) -> list[Part]:
        """What to send now. Whatever needs the store, or is long, is done in a thread."""
        loop = asyncio.get_running_loop()
        if server.at_hand:
            messages = server.pump(time.monotonic())
        else:
            messages = await loop.run_in_executor(self._executor, server.pump, time.monotonic())
        if any(self._encoder.takes_long(message) for message in messages):
            return await loop.run_in_executor(self._executor, self._encode_all, messages)
        return self._encode_all(messages)

    def _encode_all(self, messages: Iterable[ToReader]) -> list[Part]:
        return [part for message in messages for part in self._encoder.encode(message)]


class ChangeEncoder:
    """Encodes messages for readers. The changes of those that are sent to many are encoded once."""

    def __init__(self, kept: int = 8) -> None:
        self._kept = kept
        self._parts: OrderedDict[int, tuple[tuple[StateEntry, ...], list[bytes]]] = OrderedDict()
        self._turn = threading.Lock()

    def takes_long(self, message: ToReader) -> bool:
        return (
            isinstance(message, Snapshot | Delta)
            and len(message.changes) > LONG
            and not self._encoded_parts(message.changes)
        )

    def encode(self, message: ToReader) -> list[Part]:
        """The message; a snapshot in several parts."""
        if not isinstance(message, Snapshot | Delta):
            return [(write_to_reader(message).SerializeToString(), b"")]
        if (parts := self._encoded_parts(message.changes)) is None:
            # Threads encode a long one once; the loop, which encodes short ones, doesn't wait for them.
            with self._turn if len(message.changes) > LONG else nullcontext():
                if (parts := self._encoded_parts(message.changes)) is None:
                    parts = self._encode_new(message)
        own = write_header(message)
        return [(part, own) for part in parts]

    def _encode_new(self, message: Snapshot | Delta) -> list[bytes]:
        parts = write_changes(message)
        self._parts[id(message.changes)] = message.changes, parts
        for old in list(self._parts)[: -self._kept]:
            self._parts.pop(old, None)
        return parts

    def _encoded_parts(self, changes: tuple[StateEntry, ...]) -> list[bytes] | None:
        """The same tuple's, not an equal one's: comparing them would take longer than encoding."""
        found = self._parts.get(id(changes))
        return found[1] if found and found[0] is changes else None


def _seconds_until_due(server: SyncServer) -> float:
    if server.hello is None:
        return POLL_SECONDS
    return min(POLL_SECONDS, server.due - time.monotonic())


async def _receive(requests: AsyncIterator[pb.SyncRequest], inbox: _Inbox, woken: asyncio.Event) -> None:
    """Put the reader's messages into the inbox, then None; or the error of an invalid one."""
    last: Exception | None = None
    try:
        async for request in requests:
            inbox.append(read_from_reader(request))
            woken.set()
    except InvalidRequest as error:
        last = error
    inbox.append(last)
    woken.set()
