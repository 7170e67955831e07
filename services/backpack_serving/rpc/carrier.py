"""Streams from a caller, all in one call: the end that answers (see `tunnel`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import Context
from typing import Any, NoReturn

import grpc
from backpack_proto.v1 import tunnel_pb2 as pb
from backpack_proto.v1 import tunnel_pb2_grpc
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

from backpack_serving import tasks
from backpack_serving.errors import Exhausted, InvalidRequest, PreconditionFailed, ServiceError
from backpack_serving.rpc.drain import drained, draining
from backpack_serving.rpc.status import WRONG_SERVER, refusal_of, to_status
from backpack_serving.rpc.tunnel import STREAMS, WINDOW, Outbox, expired


class Carrier(tunnel_pb2_grpc.TunnelServiceServicer):
    """Carries calls of these methods until the server drains: by their full names, those with one request and a
    stream of responses. Handlers are the interceptor's: they read bytes, and write for themselves.
    """

    def __init__(self, methods: Mapping[str, grpc.RpcMethodHandler], closing: asyncio.Event) -> None:
        self._methods, self._closing = methods, closing

    async def Open(self, requests: AsyncIterator[pb.OpenRequest], context: Any) -> None:  # type: ignore[override]
        await _CarriedCall(self._methods, self._closing, context).run(requests)


class _CarriedCall:
    """One call, with the streams that began in it."""

    def __init__(self, methods: Mapping[str, grpc.RpcMethodHandler], closing: asyncio.Event, context: Any) -> None:
        self._methods, self._closing, self._context = methods, closing, context
        self._outbox = Outbox(pb.OpenResponse)
        self._streams: dict[int, tuple[_CarriedStream, asyncio.Task[None]]] = {}

    async def run(self, requests: AsyncIterator[pb.OpenRequest]) -> None:
        reading, watching = asyncio.create_task(self._read_parts(requests)), asyncio.create_task(self._watch())
        reading.add_done_callback(lambda _: self._outbox.ring())

        def last() -> bool:
            return not self._streams and (reading.done() or self._closing.is_set())

        # In a task of its own: gRPC can't go on with a message whose writing was cancelled.
        writing = asyncio.create_task(self._outbox.send_all(self._context.write, last))
        try:
            await asyncio.shield(writing)
            if reading.done():
                reading.result()
        except asyncio.CancelledError:
            if drained():  # with all its streams, which say so now
                await asyncio.wait([writing])
            raise
        finally:
            await tasks.end(reading, watching, writing, *(task for _, task in self._streams.values()))

    async def _watch(self) -> None:
        await self._closing.wait()
        self._outbox.message().draining = True

    async def _read_parts(self, requests: AsyncIterator[pb.OpenRequest]) -> None:
        async for request in requests:
            await self._outbox.room()
            if len(self._streams) + len(request.begin) > STREAMS:
                raise Exhausted("TOO_MANY_STREAMS", f"{STREAMS} streams at most in one call; open another")
            for begin in request.begin:
                self._begin_stream(begin)
            for read in request.read:
                if read.stream in self._streams:
                    self._streams[read.stream][0].was_read(read.bytes)
            for number in request.cancelled:
                if number in self._streams:
                    self._streams[number][1].cancel()

    def _begin_stream(self, begin: pb.StreamBegin) -> None:
        number = begin.stream
        if number in self._streams:
            raise InvalidRequest("STREAM_TAKEN", f"stream {number} began before, and hasn't ended; count up")
        stream = _CarriedStream(begin, self._outbox, self._context)
        if self._closing.is_set():
            stream.refuse(draining())
        elif not (method := self._methods.get(begin.method)):
            stream.refuse(PreconditionFailed("WRONG_SERVER", f"no streams of {begin.method} here. {WRONG_SERVER}"))
        else:
            # With a context of its own: what its call binds there is nobody else's.
            task = asyncio.create_task(stream.run(method, begin.request), context=Context())
            self._streams[number] = stream, task
            task.add_done_callback(lambda _: self._over(number))

    def _over(self, number: int) -> None:
        stream, task = self._streams.pop(number)
        if task.cancelled():
            stream.cancelled()
        self._outbox.ring()


class _CarriedStream:
    """A stream as its servicer and the server's interceptor know calls: what they use of grpc's context."""

    def __init__(self, begin: pb.StreamBegin, outbox: Outbox[pb.OpenResponse], context: Any) -> None:
        self._number, self._method, self._outbox, self._context = begin.stream, begin.method, outbox, context
        self._metadata = [
            (each.name, each.value if each.name.endswith("-bin") else each.value.decode(errors="replace"))
            for each in begin.metadata
        ]
        limited = begin.HasField("timeout")
        self._limit = asyncio.timeout(begin.timeout.ToNanoseconds() / 1e9 if limited else None)
        self._serialize: Callable[[Any], bytes]
        self._ahead = 0
        self._room = asyncio.Event()

    async def run(self, method: grpc.RpcMethodHandler, request: bytes) -> None:
        self._serialize = method.response_serializer
        try:
            async with self._limit:
                await method.unary_stream(request, self)
        except TimeoutError:
            self.refuse(expired())
        except grpc.aio.AbortError:
            pass  # it was told
        except Exception as error:  # of what is around every call: its caller would wait for ever
            self.refuse(refusal_of(error, self._method))
        else:
            self._send_end(status_pb2.Status())

    def refuse(self, error: ServiceError) -> None:
        self._send_end(to_status(error))

    def cancelled(self) -> None:
        """Its caller has left, and counts it until it has ended."""
        self._send_end(status_pb2.Status(code=code_pb2.CANCELLED))

    def was_read(self, size: int) -> None:
        """Its caller has read so many bytes more."""
        self._ahead -= size
        self._room.set()

    async def write(self, response: Any) -> None:
        data = self._serialize(response)
        while self._ahead > WINDOW:
            self._room.clear()
            await self._room.wait()
        self._ahead += len(data)
        self._outbox.message(len(data)).parts.add(stream=self._number, response=data)

    def _send_end(self, status: status_pb2.Status) -> None:
        self._outbox.message(status.ByteSize()).parts.add(stream=self._number, end=status)

    # ---- of grpc's context

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return self._metadata

    def auth_context(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._context.auth_context()
        return found

    def time_remaining(self) -> float | None:
        if self._limit.expired():
            return 0.0  # by its own clock, which may be some microseconds ahead of the loop's
        end = self._limit.when()
        return None if end is None else end - asyncio.get_running_loop().time()

    async def send_initial_metadata(self, _: Any) -> None:
        self._outbox.message().parts.add(stream=self._number, taken=True)

    def set_trailing_metadata(self, _: Any) -> None: ...

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn:
        self._send_end(status_pb2.Status(code=code.value[0], message=details))
        raise grpc.aio.AbortError

    async def abort_with_status(self, status: Any) -> NoReturn:
        packed = dict(status.trailing_metadata)[rpc_status.GRPC_DETAILS_METADATA_KEY]
        self._send_end(status_pb2.Status.FromString(packed))
        raise grpc.aio.AbortError
