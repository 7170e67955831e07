"""The mechanics of gRPC: servers, channels, metadata, errors as statuses and back. Nobody else imports grpc."""

from backpack_serving.rpc.channel import SERVICE_CONFIG, channel, sync_channel
from backpack_serving.rpc.metadata import Context, bearer, certificate_names, metadata, with_key, with_request_id
from backpack_serving.rpc.server import SMALL, Server, Service, Watcher, drained, start
from backpack_serving.rpc.status import error_from, errors, to_status

__all__ = [
    "SERVICE_CONFIG",
    "SMALL",
    "Context",
    "Server",
    "Service",
    "Watcher",
    "bearer",
    "certificate_names",
    "channel",
    "drained",
    "error_from",
    "errors",
    "metadata",
    "start",
    "sync_channel",
    "to_status",
    "with_key",
    "with_request_id",
]
