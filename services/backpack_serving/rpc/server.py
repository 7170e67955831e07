"""gRPC servers with health, reflection and drain. Each call is measured, and its exception becomes a status.

Servicers raise `ServiceError`s, which become statuses here. Any other exception is logged, and the caller gets
INTERNAL without details.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from backpack_serving.auth.tls import Tls
from backpack_serving.errors import InvalidRequest, ServiceError
from backpack_serving.observability import tracing
from backpack_serving.rpc import listening
from backpack_serving.rpc.channel import MESSAGE_LIMIT, SMALL, too_large
from backpack_serving.rpc.credentials import server_credentials
from backpack_serving.rpc.drain import draining, ended, wait_at_most
from backpack_serving.rpc.metadata import WHY, Context, identify, metadata, with_request_id
from backpack_serving.rpc.status import refusal_of, to_status

log = structlog.get_logger(__name__)

STREAMS = 1000
"""Concurrent calls of one connection; further ones wait in the client. A reset call counts until it is processed."""

PING_INTERVAL = 4.0
"""Least seconds between two pings of a client; one that pings more often is disconnected (ENHANCE_YOUR_CALM).

grpc-go and grpc-java never ping more often than every 10 s; 5 s is a common setting of gRPC's core (Python, C++,
Ruby). The rest is tolerance for a ping that the network delayed.
"""

_OPTIONS: Sequence[tuple[str, Any]] = (
    # When so many calls of all clients together wait, gRPC begins to refuse calls of any client.
    ("grpc.max_concurrent_streams", STREAMS),
    # Clients behind NAT or a load balancer also ping while they have no call. Without this option gRPC takes a second
    # ping within two hours for an attack; with it, the server also pings idle connections, and closes dead ones.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A stream may outlive its connection's age by this much; clients reopen endless streams where they ended.
    ("grpc.max_connection_age_grace_ms", 300_000),
)

_ENDLESS = {"/grpc.health.v1.Health/Watch", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}

CANCELLED_PER_TURN = 16
"""How many calls are cancelled in one turn of the loop: to end a thousand at once would hold it for 0.2 s."""

_ENDING = 5.0
"""Seconds that cancelled calls have to send their status after the grace period."""


class Watcher(Protocol):
    """Observes every call of our services. `reason` is an error's stable word, empty for success; times in seconds."""

    def began(self, method: str) -> None: ...
    def ended(self, method: str, code: str, reason: str, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Service:
    """A servicer, its full service name, and the generated `add_…_to_server` that registers it.

    `endless` methods have streams that end only with the server: a drain doesn't wait for them. Successful calls of
    `quiet` methods aren't logged. `large` methods accept a message of more than SMALL bytes; the function beside each
    checks the caller before the message is parsed, and one such message is parsed at a time.
    """

    name: str
    add: Callable[[Any, Any], None]
    servicer: object
    endless: frozenset[str] = frozenset()
    quiet: frozenset[str] = frozenset()
    large: Mapping[str, Callable[[Context], Awaitable[None]]] = field(default_factory=dict)


class _CallTracker(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Tracks running calls: measures them, turns exceptions into statuses, and lets a drain cancel them."""

    def __init__(self, services: Iterable[Service], watcher: Watcher | None) -> None:
        def full_names(methods: Callable[[Service], Iterable[str]]) -> set[str]:
            return {f"/{service.name}/{method}" for service in services for method in methods(service)}

        self._endless, self._quiet = full_names(lambda s: s.endless) | _ENDLESS, full_names(lambda s: s.quiet)
        self._large = {f"/{s.name}/{method}": admit for s in services for method, admit in s.large.items()}
        self._turn = asyncio.Lock()
        self._watcher = watcher
        self._running: dict[asyncio.Task[Any], bool] = {}
        self._ended: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler, name = await continuation(details), details.method
        if handler is None:
            return None
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        handler_function = getattr(handler, kind)
        respond = self._stream(handler_function) if handler.response_streaming else handler_function
        read = _decoding(handler.request_deserializer)

        async def dispatch(request: Any, context: Any) -> Any:
            if handler.request_streaming:
                return await respond(request, context)
            if len(request) <= SMALL:
                return await respond(read(request), context)
            if not (admit := self._large.get(name)):
                raise too_large(len(request))
            await admit(context)
            async with self._turn:
                return await respond(read(request), context)

        async def call(request: Any, context: Any) -> Any:
            if not name.startswith("/backpack."):
                return await self._run_call(dispatch, request, context, name, None)
            call_metadata = metadata(context)
            structlog.contextvars.bind_contextvars(request_id=identify(call_metadata))
            context.set_trailing_metadata(with_request_id())
            with tracing.served(name, call_metadata):
                return await self._run_call(dispatch, request, context, name, self._watcher)

        make: Callable[..., grpc.RpcMethodHandler] = getattr(grpc, f"{kind}_rpc_method_handler")
        # Parse a unary request inside the call: outside, gRPC would answer UNKNOWN to bytes that are no message.
        return make(call, read if handler.request_streaming else None, _encoding(handler.response_serializer))

    @staticmethod
    def _stream(handler_function: Any) -> Any:
        async def write(request: Any, context: Any) -> None:
            responses = handler_function(request, context)
            if inspect.isawaitable(responses):
                await responses  # it writes to the context itself
                return
            async with aclosing(responses):
                async for response in responses:
                    await context.write(response)

        return write

    async def _run_call(
        self, handler_function: Any, request: Any, context: Any, method: str, watcher: Watcher | None
    ) -> Any:
        task = asyncio.current_task()
        assert task is not None, "grpc runs every call in a task"
        started, code, reason = time.perf_counter(), "OK", ""
        self._running[task] = method in self._endless
        ended.set(self._ended)
        self._idle.clear()
        if watcher:
            watcher.began(method)
        try:
            try:
                return await handler_function(request, context)
            except asyncio.CancelledError:
                if task not in self._ended:
                    remaining = context.time_remaining()
                    code = reason = "CANCELLED" if remaining is None or remaining > 0 else "DEADLINE_EXCEEDED"
                    raise
                task.uncancel()
                refusal: ServiceError = draining()
            except (grpc.aio.AbortError, grpc.aio.InternalError):
                raise  # grpc's own servicers abort like this
            except NotImplementedError:  # and so do they for a method that they lack
                code = reason = "UNIMPLEMENTED"
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} isn't served here")
            except Exception as error:
                refusal = refusal_of(error, method)
                # A reference cycle: it would keep the request in memory until the garbage collector runs.
                refusal.__traceback__ = None
            code, reason = refusal.code, refusal.reason
            status = rpc_status.to_status(to_status(refusal))
            trailing = (*status.trailing_metadata, *with_request_id())
            await context.abort_with_status(status._replace(trailing_metadata=trailing))
        except grpc.aio.InternalError:  # nothing can be sent any more: the caller is leaving
            code = reason = "CANCELLED"
            raise asyncio.CancelledError from None
        finally:
            del self._running[task]
            self._ended.discard(task)
            if not self._running:
                self._idle.set()
            if watcher:
                seconds = time.perf_counter() - started
                watcher.ended(method, code, reason, seconds)
                if reason or method not in self._quiet:
                    log.info("call", method=method, code=code, reason=reason, seconds=round(seconds, 4))

    async def close(self) -> None:
        """Begin a drain: cancel endless calls."""
        await self._cancel_calls([task for task, endless in self._running.items() if endless])

    async def end(self) -> None:
        """Cancel all running calls, with a status that asks to retry."""
        await self._cancel_calls(list(self._running))

    async def _cancel_calls(self, calls: Sequence[asyncio.Task[Any]]) -> None:
        for number, task in enumerate(calls, 1):
            if task in self._running:
                self._ended.add(task)
                task.cancel()
            if number % CANCELLED_PER_TURN == 0:
                await asyncio.sleep(0)

    async def idle(self, seconds: float) -> None:
        """Wait until no call runs, for at most so many seconds."""
        await wait_at_most(self._idle, seconds)


def _decoding(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The same deserializer, which raises InvalidRequest for bytes that are no message of this kind."""

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            raise InvalidRequest("NOT_A_MESSAGE", f"what was sent isn't this method's message: {error}") from None

    return read


def _encoding(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """The same serializer, which leaves bytes as they are: what is sent to many is serialized once."""
    return lambda message: message if isinstance(message, bytes) else serialize(message)


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """grpc's health servicer; its answer to Check has the reason for NOT_SERVING in trailing metadata."""

    def __init__(self) -> None:
        super().__init__()
        self.why: dict[str, str] = {}

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        answer = await super().Check(request, context)
        if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
            why = self.why.get(request.service, "") or "it is stopping"
            context.set_trailing_metadata(((WHY, why.encode("ascii", "backslashreplace").decode()),))
        return answer


class Server:
    """A started grpc.aio server with health and reflection."""

    def __init__(self, server: grpc.aio.Server, address: str, checks: _Health, calls: _CallTracker) -> None:
        self._server, self.address, self._health, self._calls = server, address, checks, calls

    async def set_serving(self, serving: bool, service: str = "", why: str = "") -> None:
        """Set a service's health; a health check returns `why` it doesn't serve."""
        self._health.why[service] = "" if serving else why
        status = health_pb2.HealthCheckResponse
        await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace: float = 5.0) -> None:
        """Drain: refuse new calls, let running ones finish for `grace` seconds, cancel the rest with RetryInfo."""
        self._health.why.clear()
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.create_task(self._server.stop(grace + _ENDING))
        await asyncio.sleep(0)  # from here on there are no new calls
        await self._calls.close()
        await self._calls.idle(grace)
        await self._calls.end()
        await stopping


async def start(
    services: Iterable[Service],
    address: str,
    watcher: Watcher | None = None,
    *,
    tls: Tls | None = None,
    connection_age: float = 1800.0,
    message_limit: int = MESSAGE_LIMIT,
    ping_interval: float = PING_INTERVAL,
) -> Server:
    """Serve on host:port (port 0: a free one) or unix:path, with TLS if there is a certificate.

    Raises OSError if the address is taken, ValueError if the certificates are no good.
    """
    await asyncio.to_thread(listening.check, address)
    services = list(services)
    calls = _CallTracker(services, watcher)
    options = [
        *_OPTIONS,
        ("grpc.max_receive_message_length", message_limit),
        ("grpc.max_connection_age_ms", int(connection_age * 1000)),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", int(ping_interval * 1000)),
    ]
    server = grpc.aio.server(interceptors=[calls], options=options)
    checks = _Health()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for service in services:
        service.add(service.servicer, server)
    names = [*(s.name for s in services), health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(names, server)
    try:
        if tls is None or tls.certificate is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, server_credentials(tls))
    except RuntimeError as error:
        raise listening.unusable(address, str(error)) from None
    await server.start()
    bound = address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
    started = Server(server, bound, checks, calls)
    for name in ("", *(s.name for s in services)):
        await started.set_serving(True, name)
    return started
