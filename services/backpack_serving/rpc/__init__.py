"""The mechanics of gRPC: servers, channels, metadata, errors as statuses and back. Nobody else imports grpc."""

from backpack_serving.auth.presented import bearer, certificate_names
from backpack_serving.rpc.channel import SMALL, channel, sync_channel
from backpack_serving.rpc.drain import drained, draining, wait_at_most
from backpack_serving.rpc.listening import check as check_address
from backpack_serving.rpc.metadata import Context, identify, metadata, with_key, with_request_id
from backpack_serving.rpc.probe import serving
from backpack_serving.rpc.server import Server, Service, Watcher, start
from backpack_serving.rpc.status import errors, refusal_of, to_status

__all__ = [
    "SMALL",
    "Context",
    "Server",
    "Service",
    "Watcher",
    "bearer",
    "certificate_names",
    "channel",
    "check_address",
    "drained",
    "draining",
    "errors",
    "identify",
    "metadata",
    "refusal_of",
    "serving",
    "start",
    "sync_channel",
    "to_status",
    "wait_at_most",
    "with_key",
    "with_request_id",
]
