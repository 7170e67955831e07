"""Channels to our servers: keepalive, limits, and which calls gRPC may retry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import grpc

from backpack_serving import proxies
from backpack_serving.auth.tls import Tls
from backpack_serving.errors import InvalidRequest
from backpack_serving.rpc.credentials import channel_credentials

MESSAGE_LIMIT = 20 * 2**20
"""Largest message that a server accepts, in bytes: a revision at its size limit, and some room."""

SMALL = 2**20
"""Most bytes of an ordinary request, far more than a text of any context has. Parsing and refusing a message of 20 MiB
blocked a server's event loop for seconds, and a parsed message may take 25 times its size in memory.
"""


def too_large(size: int) -> InvalidRequest:
    """The error for a request of so many bytes."""
    return InvalidRequest("TOO_LARGE", f"a message of {size} bytes; at most {SMALL}")


BALANCED: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
"""Calls are spread over all addresses of a name."""

# gRPC may only retry reads: a second Generate would be charged and sampled twice, and gRPC doesn't know whether a write
# has a request id. A stopping server may answer CANCELLED (see `rpc.status`).
SERVICE_CONFIG = json.dumps(
    {
        **BALANCED,
        "methodConfig": [
            {
                "name": [
                    {"service": "backpack.v1.InferenceService", "method": method}
                    for method in (
                        "Score",
                        "Explain",
                        "Compare",
                        "Judge",
                        "Tokenize",
                        "ListSenses",
                        "FindSenses",
                        "MapSense",
                        "ListUses",
                        "GetModel",
                        "ListReplicas",
                    )
                ]
                + [
                    {"service": f"backpack.v1.{service}", "method": method}
                    for service, method in (
                        ("TenantService", "ListTenants"),
                        ("TenantService", "ListApiKeys"),
                        ("PatchService", "GetPatch"),
                        ("PatchService", "ListPatches"),
                        ("PatchService", "GetRevision"),
                        ("PatchService", "ListRevisions"),
                        ("ReleaseService", "GetRelease"),
                        ("ReleaseService", "ListReleases"),
                        ("ReleaseService", "GetChannel"),
                        ("ReleaseService", "ListChannels"),
                        ("AuditService", "ListAuditEntries"),
                        ("AuditService", "VerifyChain"),
                        ("FleetService", "GetRollout"),
                        ("FleetService", "ListReaders"),
                        ("SyncService", "FetchRelease"),
                        ("SyncService", "ResolveReleases"),
                    )
                ],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            }
        ],
    }
)

RECONNECT = 0.2
"""Seconds after which a channel first reconnects."""

_CHANNEL_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # By default gRPC waits up to two minutes before it reconnects: too long for a part that has restarted.
    ("grpc.initial_reconnect_backoff_ms", int(RECONNECT * 1000)),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Parts of one process must not share a connection pool: a test may restart a server on its port.
    ("grpc.use_local_subchannel_pool", 1),
)


def channel(address: str, tls: Tls | None = None, *, repeats: bool = True, client: bool = False) -> grpc.aio.Channel:
    """A channel to one of our servers, with retries of reads and keepalive; with TLS if there are authorities.

    Without `repeats` gRPC retries nothing: the caller tries another server instead. A `client` retries by itself, and
    its calls go through a proxy where gRPC's do (see `proxies`); calls between our parts never do.
    Raises ValueError if the certificates are invalid, or the address isn't encodable text.
    """
    options = _options(address, tls, repeats, client)
    if tls is None or tls.authorities is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=options)


def sync_channel(address: str, tls: Tls | None = None, *, client: bool = False) -> grpc.Channel:
    """The same channel, for a caller without an event loop."""
    options = _options(address, tls, True, client)
    if tls is None or tls.authorities is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, channel_credentials(tls), options=options)


def _options(address: str, tls: Tls | None, repeats: bool, client: bool) -> Sequence[tuple[str, Any]]:
    try:
        address.encode()
    except UnicodeEncodeError:
        why = "half a character (a lone surrogate) is in it; write host:port, as in 127.0.0.1:8470"
        raise ValueError(f"address={address!r}: {why}") from None
    config = [("grpc.service_config", json.dumps(BALANCED) if client else SERVICE_CONFIG)] if repeats else []
    named = [("grpc.ssl_target_name_override", tls.name)] if tls and tls.authorities and tls.name else []
    route = [] if client and not proxies.stays_here(address) else [proxies.DIRECT]
    return [*_CHANNEL_OPTIONS, *config, *named, *route]
