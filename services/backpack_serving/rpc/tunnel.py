"""Streams to a server, all in one call: what gRPC's Python spends on a message is spent once for all that go at a
time. This is the end that calls; `carrier` is the end that answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import grpc
from backpack_proto.v1 import tunnel_pb2 as pb
from backpack_proto.v1 import tunnel_pb2_grpc

from backpack_serving import tasks
from backpack_serving.errors import Expired, ServiceError, Unavailable
from backpack_serving.rpc.channel import SMALL, too_large
from backpack_serving.rpc.status import error_from, from_status

STREAMS = 1000
"""Calls of one connection at once; more wait in the client. One that was reset counts until its turn has come. As
many streams go in one call, and more in another.
"""

BATCH = 2**18
"""Bytes after which what waits for its way goes in another message."""

LONG = 8
"""Messages waiting for their way, behind which a server reads nothing more: who doesn't read what it is told could
fill the memory with refusals.
"""

WINDOW = 2**18
"""Bytes of a stream on their way and not read yet, beyond which no more are sent. A slow reader holds up nobody
else, nor fills the memory: its servicer waits.
"""

LATE = 1.0
"""Seconds after a stream's deadline in which the server ends it by itself, unless it stood still when it began."""

RENEW = 30.0
"""Seconds after which new streams go in a new call. A server lets no call outlive its connection for long; so it
has to outlive it by these and the length of a stream.
"""

R = TypeVar("R")
M = TypeVar("M")


def expired() -> Expired:
    """What a deadline ends a stream with, at either end."""
    return Expired("DEADLINE_EXCEEDED", "the deadline passed before the stream had ended")


class Outbox(Generic[M]):
    """Messages on their way, as few as may be: what comes while one is being sent goes together in the next."""

    def __init__(self, make: Callable[[], M]) -> None:
        self._make = make
        self._waiting: deque[M] = deque()
        self._size = 0
        self._bell, self._sent = asyncio.Event(), asyncio.Event()

    def message(self, size: int = 0) -> M:
        """That which something of so many bytes goes in."""
        if not self._waiting or self._size + size > BATCH:
            self._waiting.append(self._make())
            self._size = 0
        self._size += size
        self._bell.set()
        return self._waiting[-1]

    def ring(self) -> None:
        """Have whoever sends look whether that was the last."""
        self._bell.set()

    async def room(self) -> None:
        """Wait until no more than LONG messages wait."""
        while len(self._waiting) > LONG:
            self._sent.clear()
            await self._sent.wait()

    async def send_all(self, write: Callable[[M], Awaitable[None]], last: Callable[[], bool]) -> None:
        """Send what there is and what comes, until it was the last."""
        while True:
            while self._waiting:
                await write(self._waiting.popleft())
                self._sent.set()
            if last():
                return
            await self._bell.wait()
            self._bell.clear()


class Tunnel:
    """A channel whose streams share a call. Other calls go as on any channel.

    It is for a generated stub, within one event loop. A stream is an iterator with `initial_metadata` and
    `cancel`, as grpc.aio's; what it raises is a `ServiceError`.
    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._calls: list[_TunnelCall] = []

    def unary_unary(self, *how: Any, **named: Any) -> Any:
        return self._channel.unary_unary(*how, **named)

    def unary_stream(
        self, method: str, request_serializer: Callable[[Any], bytes], response_deserializer: Any, **_: Any
    ) -> Callable[..., Stream[Any]]:
        def call(
            request: Any, *, metadata: Iterable[tuple[str, str | bytes]] = (), timeout: float | None = None
        ) -> Stream[Any]:
            data = request_serializer(request)
            if len(data) > SMALL:
                raise too_large(len(data))
            begin = pb.StreamBegin(method=method, request=data)
            for name, value in metadata:
                begin.metadata.add(name=name, value=value.encode() if isinstance(value, str) else value)
            if timeout is not None:
                begin.timeout.FromNanoseconds(int(timeout * 1e9))
            return self._call_with_room().begin(begin, response_deserializer, timeout)

        return call

    def retire(self) -> None:
        """No streams begin any more; the calls end with those that run."""
        for call in self._calls:
            call.retire()

    async def close(self) -> None:
        """End all calls, with the streams that run, and the channel."""
        for call in self._calls:
            await call.close()
        await self._channel.close()

    def _call_with_room(self) -> _TunnelCall:
        """The call in which a stream begins now."""
        self._calls = [call for call in self._calls if not call.over]
        for call in self._calls:
            if call.has_room():
                return call
        self.retire()  # those that are full have streams, and so go on
        self._calls.append(call := _TunnelCall(self._channel))
        return call


class Stream(Generic[R]):
    """One stream's responses. Iterate once, and cancel at the end, whatever came."""

    def __init__(
        self, call: _TunnelCall, number: int, deserialize: Callable[[bytes], R], timeout: float | None
    ) -> None:
        self._call_with_room, self._number, self._deserialize = call, number, deserialize
        self._responses: deque[bytes] = deque()
        self._bell = asyncio.Event()
        self._taken = self._ended = False
        self._failure: ServiceError | None = None
        self._read_responses = 0
        self._timer: asyncio.TimerHandle | None = None
        if timeout is not None:
            self._timer = asyncio.get_running_loop().call_later(timeout, self._expire)

    async def initial_metadata(self) -> None:
        """Wait until the method has taken the request; or the stream has failed, which iterating tells."""
        while not (self._taken or self._ended):
            await self._wait()

    def __aiter__(self) -> Stream[R]:
        return self

    async def __anext__(self) -> R:
        while not self._responses:
            if self._failure:
                raise self._failure
            if self._ended:
                raise StopAsyncIteration
            await self._wait()
        data = self._responses.popleft()
        self._read_responses += len(data)
        if self._read_responses > WINDOW // 2 and not self._ended:
            self._call_with_room.read(self._number, self._read_responses)
            self._read_responses = 0
        return self._deserialize(data)

    def cancel(self) -> None:
        """Have it end, if it hasn't."""
        if not self._ended:
            self.end(None)
            self._call_with_room.cancel(self._number)

    def add(self, part: pb.StreamPart) -> bool:
        """A part came. Whether it was the last."""
        kind = part.WhichOneof("part")
        if kind == "end":
            self.end(from_status(part.end) if part.end.code else None)
        elif not self._ended:
            self._taken = True
            if kind == "response":
                self._responses.append(part.response)
            self._bell.set()
        return kind == "end"

    def end(self, failure: ServiceError | None) -> None:
        """Nothing more is to come; what ended it first counts."""
        if self._ended:
            return
        self._ended, self._failure = True, failure
        if self._timer:
            self._timer.cancel()
        self._bell.set()

    def _expire(self) -> None:
        """The deadline passed, as it does over there."""
        self.end(expired())
        asyncio.get_running_loop().call_later(LATE, self._call_with_room.cancel, self._number)

    async def _wait(self) -> None:
        self._bell.clear()
        await self._bell.wait()


class _TunnelCall:
    """One call, with the streams that began in it."""

    def __init__(self, channel: Any) -> None:
        self._grpc: Any = tunnel_pb2_grpc.TunnelServiceStub(channel).Open()
        self._streams: dict[int, Stream[Any]] = {}
        self._count = 0
        self._retired = False
        self._renew = asyncio.get_running_loop().time() + RENEW
        self._outbox = Outbox(pb.OpenRequest)
        self._writing, self._reading = (
            asyncio.create_task(self._write_requests()),
            asyncio.create_task(self._read_responses()),
        )

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._reading.done()

    def has_room(self) -> bool:
        """Whether another stream may begin here."""
        young = asyncio.get_running_loop().time() < self._renew
        return young and not self._retired and len(self._streams) < STREAMS

    def retire(self) -> None:
        """End with the streams that run."""
        self._retired = True
        self._outbox.ring()

    async def close(self) -> None:
        """End at once."""
        await tasks.end(self._writing, self._reading)
        self._lose("this stream's caller has ended")  # its reader may never have begun

    def begin(self, begin: pb.StreamBegin, deserialize: Callable[[bytes], R], timeout: float | None) -> Stream[R]:
        self._count += 1
        begin.stream = self._count
        self._outbox.message(begin.ByteSize()).begin.append(begin)
        stream = self._streams[begin.stream] = Stream(self, begin.stream, deserialize, timeout)
        return stream

    def read(self, number: int, size: int) -> None:
        self._outbox.message().read.add(stream=number, bytes=size)

    def cancel(self, number: int) -> None:
        """Have a stream end over there. Until it has, it counts as one."""
        if number in self._streams:
            self._outbox.message().cancelled.append(number)

    async def _write_requests(self) -> None:
        """Send what there is, until no stream begins any more and all have ended."""
        with suppress(grpc.RpcError, asyncio.InvalidStateError):  # the call has ended, which its reader finds, too
            await self._outbox.send_all(self._grpc.write, lambda: self._retired and not self._streams)
            await self._grpc.done_writing()

    async def _read_responses(self) -> None:
        """Give streams what comes. Those that are left when the call ends may be tried again."""
        message = "the server ended the call that carried this stream"
        try:
            async for response in self._grpc:
                for part in response.parts:
                    if (stream := self._streams.get(part.stream)) and stream.add(part):
                        del self._streams[part.stream]
                self._retired |= response.draining
                if self._retired:
                    self._outbox.ring()
        except grpc.RpcError as error:
            message = error_from(error).message
        finally:
            self._lose(message)

    def _lose(self, message: str) -> None:
        self._retired = True
        for stream in self._streams.values():
            stream.end(Unavailable("TRANSPORT", message, retry_after=0.1))
        self._streams.clear()
        self._outbox.ring()
