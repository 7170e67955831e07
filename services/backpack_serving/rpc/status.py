"""Translates errors to google.rpc.Status (ErrorInfo, BadRequest, QuotaFailure, RetryInfo) and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import structlog
from backpack_lm.patch import PatchError, Violation
from backpack_lm.visible import visible
from google.protobuf.any_pb2 import Any as PackedAny
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from backpack_serving.errors import (
    BY_CODE,
    DOMAIN,
    Expired,
    Internal,
    PreconditionFailed,
    Quota,
    ServiceError,
    Unavailable,
    from_patch_error,
)
from backpack_serving.proxies import Proxy
from backpack_serving.rpc.channel import RECONNECT

log = structlog.get_logger(__name__)

MESSAGE_BYTES, VALUE_BYTES, VIOLATIONS_BYTES = 768, 512, 2048
"""Most bytes of a message, of a metadata value, and of violations before the last one, in UTF-8.

A status travels in trailers: the message percent-encoded, and again with all details in base64. gRPC's clients
may refuse trailers of more than 8 KB, and then report RESOURCE_EXHAUSTED instead.
"""

HOPELESS = (
    "Failed to create channel",  # the address is none
    "Misformatted domain name",
    "Failed to parse port",
    "CERTIFICATE_VERIFY_FAILED",
    "WRONG_VERSION_NUMBER",  # TLS to a plaintext server
    "Hostname Verification Check failed",
)
"""Texts of connection errors that a retry won't mend: such an error gets no `retry_after`."""

WRONG_SERVER = (
    "The server at this address is another one, or of another version: "
    "text is a gateway's, patches, releases, tenants and readers are the intervention service's."
)


def to_status(error: ServiceError) -> status_pb2.Status:
    """The google.rpc.Status of an error, truncated to what trailers may hold."""
    values = {name: _truncate(value, VALUE_BYTES) for name, value in error.metadata.items()}
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=values)]
    if error.violations:
        details.append(_bad_request(error.violations))
    if error.quotas:
        failure = error_details_pb2.QuotaFailure()
        for quota in error.quotas:
            failure.violations.add(subject=quota.subject, description=quota.description)
        details.append(failure)
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(retry)
    # It may be printed on a terminal.
    message = _printable(error.message, MESSAGE_BYTES)
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def _bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    """The first violations; a last one counts those that don't fit."""
    bad = error_details_pb2.BadRequest()
    for at, violation in enumerate(violations):
        field = _truncate(violation.field, VALUE_BYTES)
        if bad.ByteSize() > VIOLATIONS_BYTES:
            bad.field_violations.add(field=field, reason="MORE", description=f"and {len(violations) - at} more")
            break
        description = _printable(violation.description, VALUE_BYTES)
        bad.field_violations.add(field=field, reason=violation.reason, description=description)
    return bad


def _printable(text: str, size: int) -> str:
    return _truncate(visible(text[: size + 1]), size)


def _truncate(text: str, size: int) -> str:
    data = text.encode()
    return text if len(data) <= size else data[: size - 3].decode(errors="ignore") + "…"


def error_from(error: grpc.RpcError) -> ServiceError:
    """The error that a server of ours sent, or the one that stands for a failed transport."""
    call: Any = error
    code = call.code().name
    kind = BY_CODE.get(code, Internal)
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the transport failed too, and its code is the one that counts
        status = None
    if status is None and code == "CANCELLED":
        # A stopping server ends calls like this that reached no handler (github.com/grpc/grpc/issues/41785). A call
        # that we cancel ourselves raises CancelledError instead.
        return Unavailable("TRANSPORT", "the server stopped before it took the call", retry_after=0.1)
    if status is None and call.details() == "Internal error from Core":
        # A server ended a call while the client was still writing, and asyncio's gRPC lost its status
        # (github.com/grpc/grpc/issues/36066).
        message = "the server ended the call before all of it was sent, and gRPC lost why; try again"
        return Unavailable("TRANSPORT", message, retry_after=0.0)
    if status is None and any(text in (call.details() or "") for text in HOPELESS):
        return Unavailable("TRANSPORT", call.details())
    if status is None and code == "UNAVAILABLE":
        return Unavailable("TRANSPORT", call.details() or code, retry_after=RECONNECT)
    if status is None and code == "UNIMPLEMENTED":
        return PreconditionFailed("WRONG_SERVER", f"{call.details()} {WRONG_SERVER}")
    if status is None:
        return kind("TRANSPORT", call.details() or code)
    reason, values, retry_after = code, {}, None
    violations: list[Violation] = []
    quotas: list[Quota] = []
    for packed in status.details:
        detail = _unpack(packed)
        if isinstance(detail, error_details_pb2.ErrorInfo):
            reason, values = detail.reason, dict(detail.metadata)
        elif isinstance(detail, error_details_pb2.BadRequest):
            violations = [Violation(v.field, v.reason, v.description) for v in detail.field_violations]
        elif isinstance(detail, error_details_pb2.QuotaFailure):
            quotas = [Quota(v.subject, v.description) for v in detail.violations]
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after = detail.retry_delay.ToNanoseconds() / 1e9
    rebuilt = kind(reason, status.message, violations=violations, quotas=quotas, retry_after=retry_after)
    rebuilt.metadata = values
    return rebuilt


def refusal_of(error: Exception, method: str) -> ServiceError:
    """The ServiceError for an exception of a method. Logs what the caller must not see."""
    if isinstance(error, PatchError):
        error = from_patch_error(error)
    if isinstance(error, grpc.RpcError):
        error = error_from(error)
    if isinstance(error, ServiceError) and error.why:
        log.error("call refused", method=method, reason=error.reason, why=error.why)
    if not isinstance(error, ServiceError):
        log.error("handler failed", method=method, exc_info=error)
        error = Internal("INTERNAL", "an internal error; the server's log has more")
    return error


@contextmanager
def errors(proxy: Proxy | None = None) -> Iterator[None]:
    """Calls inside the block raise `ServiceError` instead of grpc's own error.

    A transport error of a call through a proxy names the proxy, in its message and its metadata.
    """
    try:
        yield
    except grpc.RpcError as error:
        refusal = error_from(error)
        if proxy is not None and refusal.reason == "TRANSPORT" and isinstance(refusal, (Unavailable, Expired)):
            message = f"{refusal.message}; the call went through {proxy}, as no_proxy doesn't except its address"
            after = refusal.retry_after
            refusal = type(refusal)("TRANSPORT", message, retry_after=after, proxy=proxy.address)
        raise refusal from None


def _unpack(packed: PackedAny) -> Any:
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.QuotaFailure,
        error_details_pb2.RetryInfo,
    ):
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            return detail
    return None
