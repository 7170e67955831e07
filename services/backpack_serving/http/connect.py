"""Our services as Connect, gRPC-Web and JSON: whatever a proto has is called under /SERVICE/METHOD.

No code is generated: messages, methods and their kinds come from the descriptors that gRPC's code has, too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from backpack_proto.v1 import inference_pb2, interventions_pb2, sync_pb2
from connectrpc.code import Code
from connectrpc.codec import Codec
from connectrpc.compat import google_protobuf_binary_codec, google_protobuf_json_codec
from connectrpc.errors import ConnectError, ErrorDetail
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.request import RequestContext
from connectrpc.server import ConnectASGIApplication, Endpoint
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from protobuf.wkt import Any as Packed
from starlette.exceptions import HTTPException

from backpack_serving import rpc
from backpack_serving.errors import InvalidRequest, ServiceError
from backpack_serving.http import caller
from backpack_serving.http.calls import App, Receive, Scope, Send, current

OF_GATEWAYS = (inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],)
OF_INTERVENTIONS = (
    *interventions_pb2.DESCRIPTOR.services_by_name.values(),
    sync_pb2.DESCRIPTOR.services_by_name["FleetService"],
)
"""What clients call. SyncService and DirectoryService are for our own parts."""

MESSAGE_BYTES = 2 * rpc.SMALL
"""Most bytes of a message: a chunk of an upload has a MiB, and a third more as JSON. Gateways take less."""


def services(gateway: Any, interventions: Any) -> Connect:
    """All services of clients, forwarded on these channels."""
    return Connect(dict.fromkeys(OF_GATEWAYS, gateway) | dict.fromkeys(OF_INTERVENTIONS, interventions))


class Connect:
    """An ASGI application for `services`, each with the channel that its calls go on."""

    def __init__(self, services: Mapping[ServiceDescriptor, Any]) -> None:
        endpoints: dict[str, Any] = dict(
            _endpoint(method, channel) for service, channel in services.items() for method in service.methods
        )
        self.paths = frozenset(endpoints)
        codecs = map(_Codec, [google_protobuf_binary_codec(), google_protobuf_json_codec(ignore_unknown_fields=False)])
        self._app: App = _Application(
            service=None, endpoints=lambda _: endpoints, read_max_bytes=MESSAGE_BYTES, codecs=codecs
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in self.paths:
            raise HTTPException(404)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        kind = headers.get(b"content-type", "")
        if kind.partition(";")[0] in ("application/grpc", "application/grpc+proto", "application/grpc+json"):
            text = "gRPC is served on the gateway's and the intervention service's own addresses; here is gRPC-Web"
            raise InvalidRequest("NOT_HERE", text)
        caller.credential({"authorization": headers.get(b"authorization", "")})  # before a body is read
        await self._app(scope, receive, send)


class _Codec:
    """Another codec, whose refusals are counted as those of calls are."""

    def __init__(self, codec: Codec[Any, Any]) -> None:
        self.name, self.encode, self._decode = codec.name, codec.encode, codec.decode

    def decode(self, data: bytes | bytearray, message_class: type[Any]) -> Any:
        try:
            message = self._decode(data, message_class)
            if self.name() == "json" and "sampling" in message_class.DESCRIPTOR.fields_by_name:
                _check_biases(data, message)
            return message
        except (DecodeError, ParseError, UnicodeDecodeError, RecursionError) as error:
            refusal = InvalidRequest("NOT_A_MESSAGE", f"what was sent isn't this method's message: {error}")
            current().refused(refusal)
            raise ConnectError(Code.INVALID_ARGUMENT, refusal.message) from None


def _check_biases(data: bytes | bytearray, message: Any) -> None:
    """Raises ParseError if one token has two biases: "5" and "05" are two keys of JSON, and one of a message."""
    if not message.sampling.logit_bias:
        return
    sampling = json.loads(data)["sampling"]
    given = sampling.get("logitBias") or sampling["logit_bias"]
    if len(given) > len(message.sampling.logit_bias):
        raise ParseError("sampling.logitBias: two keys name one token; write ids without a zero before them")


class _Application(ConnectASGIApplication[None]):
    path = ""


def _endpoint(method: MethodDescriptor, channel: Any) -> tuple[str, Endpoint[Any, Any]]:
    """The path of a method, and what forwards its calls."""
    service = method.containing_service
    path = f"/{service.full_name}/{method.name}"
    takes, gives = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    kind = ("stream" if method.client_streaming else "unary") + ("_stream" if method.server_streaming else "_unary")
    forward = getattr(channel, kind)(path, takes.SerializeToString, gives.FromString)

    async def unary(request: Any, context: RequestContext[Any, Any]) -> Any:
        with _connect_errors(context):
            return await forward(request, **_forwarding_options(context))

    async def stream(request: Any, context: RequestContext[Any, Any]) -> AsyncIterator[Any]:
        with _connect_errors(context):
            call = forward(request, **_forwarding_options(context))
            try:
                async for response in call:
                    yield response
            finally:
                call.cancel()

    kinds = {
        "unary_unary": (StreamType.UNARY, Endpoint.unary, unary),
        "unary_stream": (StreamType.SERVER_STREAM, Endpoint.server_stream, stream),
        "stream_unary": (StreamType.CLIENT_STREAM, Endpoint.client_stream, unary),
    }
    stream_type, make, function = kinds[kind]
    info = MethodInfo(
        name=method.name,
        service_name=service.full_name,
        input=takes,
        output=gives,
        idempotency_level=IdempotencyLevel.UNKNOWN,
        stream_type=stream_type,
    )
    return path, make(info, function)  # type: ignore[operator]


def _forwarding_options(context: RequestContext[Any, Any]) -> dict[str, Any]:
    """Metadata and deadline of the call that is made for this one."""
    headers = {"authorization": context.request_headers.get("authorization", "") or ""}
    remaining = context.timeout_ms
    return {"metadata": caller.metadata(headers), "timeout": None if remaining is None else max(0.0, remaining / 1000)}


@contextmanager
def _connect_errors(context: RequestContext[Any, Any]) -> Iterator[None]:
    """Raise a ServiceError as Connect's, with our details, and its reason as a header for people."""
    try:
        with rpc.errors():
            yield
    except asyncio.CancelledError:
        call = current()
        if not call.ended:
            raise
        raise _connect_error(call.drained(), context) from None
    except ServiceError as error:
        current().refused(error)
        raise _connect_error(error, context) from None


def _connect_error(error: ServiceError, context: RequestContext[Any, Any]) -> ConnectError:
    context.response_headers["backpack-reason"] = error.reason
    details = [
        ErrorDetail(Packed(type_url=detail.type_url, value=detail.value)) for detail in rpc.to_status(error).details
    ]
    return ConnectError(Code(error.code.lower()), error.message, details)
