"""The mechanics of gRPC, in one place: servers, channels, credentials, and errors as statuses and back.

Servicers raise `ServiceError`s; an interceptor turns them into statuses with google.rpc details
(ErrorInfo, BadRequest, RetryInfo). Anything else that escapes is INTERNAL, logged here and not told to
the caller. `error_from` is the way back, for clients and for a gateway that passes a refusal on.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import structlog
from backpack_lm.patch import PatchError, Violation
from google.protobuf.any_pb2 import Any as PackedAny
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from backpack_serving.errors import (
    BY_CODE,
    DOMAIN,
    Internal,
    ServiceError,
    Unauthenticated,
    from_patch_error,
)

log = structlog.get_logger(__name__)

MESSAGE_LIMIT = 20 * 2**20
"""Largest message that a server takes: a revision at the limits of its size, and some room."""

_SERVER_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),
)

# Only reads may be repeated by the library: a second Generate would be charged and sampled twice.
SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [
                    {"service": "backpack.v1.InferenceService", "method": method}
                    for method in ("Score", "Explain", "Tokenize", "ListSenses", "GetModel")
                ]
                + [
                    {"service": f"backpack.v1.{service}", "method": method}
                    for service, method in (
                        ("TenantService", "ListTenants"),
                        ("PatchService", "ListPatches"),
                        ("PatchService", "GetRevision"),
                        ("PatchService", "ListRevisions"),
                        ("ReleaseService", "ListReleases"),
                        ("ReleaseService", "GetChannel"),
                        ("SyncService", "FetchRelease"),
                    )
                ],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)

_CHANNEL_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.service_config", SERVICE_CONFIG),
    # Two parts of one process must not share a connection pool: a test may restart a server on its port.
    ("grpc.use_local_subchannel_pool", 1),
)


class Context(Protocol):
    """What a servicer needs of grpc's context. `time_remaining` is in seconds, None without a deadline."""

    def invocation_metadata(self) -> Any: ...
    def time_remaining(self) -> float | None: ...


def metadata(context: Context) -> Mapping[str, str | bytes]:
    """The caller's metadata; of a repeated name, the last."""
    return dict(context.invocation_metadata() or ())


def bearer(context: Context) -> str:
    """The token of `authorization: Bearer …`. Raises Unauthenticated if there is none."""
    value = metadata(context).get("authorization", "")
    scheme, _, token = str(value).partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("NO_CREDENTIAL", "no API key; send the metadata `authorization: Bearer <key>`")
    return token.strip()


def with_key(key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that carries an API key."""
    return (("authorization", f"Bearer {key}"),) if key else ()


# ---------------------------------------------------------------- errors


def to_status(error: ServiceError) -> status_pb2.Status:
    """The google.rpc.Status of a refusal."""
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)]
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(
                field=violation.field, reason=violation.reason, description=violation.description
            )
        details.append(bad)
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(retry)
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def error_from(error: grpc.RpcError) -> ServiceError:
    """The refusal that a server of ours sent, or what a failure of the transport amounts to."""
    call: Any = error
    code = call.code().name
    kind = BY_CODE.get(code, Internal)
    status = rpc_status.from_call(call)
    if status is None:
        return kind("TRANSPORT", call.details() or code)
    reason, values, violations, retry_after = code, {}, [], None
    for packed in status.details:
        detail = _unpack(packed)
        if isinstance(detail, error_details_pb2.ErrorInfo):
            reason, values = detail.reason, dict(detail.metadata)
        elif isinstance(detail, error_details_pb2.BadRequest):
            violations = [Violation(v.field, v.reason, v.description) for v in detail.field_violations]
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after = detail.retry_delay.ToNanoseconds() / 1e9
    rebuilt = kind(reason, status.message, violations=violations, retry_after=retry_after)
    rebuilt.metadata = values
    return rebuilt


@contextmanager
def errors() -> Any:
    """Calls made inside raise `ServiceError` instead of grpc's own error."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from(error) from None


def _unpack(packed: PackedAny) -> Any:
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.RetryInfo,
    ):
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            return detail
    return None


class _Errors(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Turns what a handler raises into a status."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith("/backpack."):
            return handler
        if handler.request_streaming:
            raise NotImplementedError("no method of ours streams requests yet")
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, details.method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _guard_unary(handler.unary_unary, details.method),
            handler.request_deserializer,
            handler.response_serializer,
        )


def _guard_unary(method: Any, name: str) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await method(request, context)
        except Exception as error:
            await _abort(context, error, name)

    return guarded


def _guard_stream(method: Any, name: str) -> Any:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in method(request, context):
                yield response
        except Exception as error:
            await _abort(context, error, name)

    return guarded


async def _abort(context: Any, error: Exception, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, PatchError):
        error = from_patch_error(error)
    if isinstance(error, grpc.RpcError):
        error = error_from(error)
    if not isinstance(error, ServiceError):
        log.error("handler failed", method=method, exc_info=error)
        error = Internal("INTERNAL", "an internal error; the server's log has more")
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


# ---------------------------------------------------------------- servers and channels


@dataclass(frozen=True, slots=True)
class Service:
    """A servicer and what registers it: the generated `add_…_to_server` and the service's full name."""

    name: str
    add: Callable[[Any, Any], None]
    servicer: object


class Server:
    """A started grpc.aio server with health and reflection."""

    def __init__(self, server: grpc.aio.Server, address: str, checks: health.aio.HealthServicer) -> None:
        self._server, self.address, self._health = server, address, checks

    async def set_serving(self, serving: bool, service: str = "") -> None:
        status = health_pb2.HealthCheckResponse
        await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace: float = 5.0) -> None:
        """Take nothing new, let running calls finish for `grace` seconds, then end them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)

    async def wait(self) -> None:
        await self._server.wait_for_termination()


async def start(services: Iterable[Service], address: str) -> Server:
    """Serve on host:port (port 0: a free one) or unix:path. Raises OSError if the address is taken."""
    services = list(services)
    server = grpc.aio.server(interceptors=[_Errors()], options=_SERVER_OPTIONS)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for service in services:
        service.add(service.servicer, server)
    names = [*(s.name for s in services), health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(names, server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        raise OSError(f"can't listen on {address}: is another server there?") from None
    await server.start()
    bound = address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
    started = Server(server, bound, checks)
    for name in ("", *(s.name for s in services)):
        await started.set_serving(True, name)
    return started


def channel(address: str) -> grpc.aio.Channel:
    """A channel to one of our servers, with retries of reads and keepalive."""
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


def sync_channel(address: str) -> grpc.Channel:
    """The same for a caller without an event loop."""
    return grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
