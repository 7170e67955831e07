"""Refusals as google.rpc.Status, with ErrorInfo, BadRequest, QuotaFailure and RetryInfo, and back again."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import grpc
from backpack_lm.patch import Violation
from google.protobuf.any_pb2 import Any as PackedAny
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from backpack_serving.errors import BY_CODE, DOMAIN, Internal, Quota, ServiceError, Unavailable


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
    if error.quotas:
        failure = error_details_pb2.QuotaFailure()
        for quota in error.quotas:
            failure.violations.add(subject=quota.subject, description=quota.description)
        details.append(failure)
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
    if status is None and code == "CANCELLED":
        # A server that stops ends so what reached it and no handler yet (github.com/grpc/grpc/issues/41785). A
        # call that we cancel ourselves raises CancelledError instead.
        return Unavailable("TRANSPORT", "the server stopped before it took the call", retry_after=0.1)
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
        error_details_pb2.QuotaFailure,
        error_details_pb2.RetryInfo,
    ):
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            return detail
    return None
