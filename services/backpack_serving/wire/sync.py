"""The watch of the intervention service, and the pin, as the gateway understands them."""

from __future__ import annotations

from backpack_proto.v1 import inference_pb2, interventions_pb2

from backpack_serving.errors import PreconditionFailed
from backpack_serving.gateway.book import Known, KnownChannel, KnownKey, KnownTenant, Pinned
from backpack_serving.keys import Principal, Verifier
from backpack_serving.wire.control import ROLES


def read_change(change: interventions_pb2.Change) -> Known:
    """Raises PreconditionFailed for a kind that this gateway doesn't know: it can't go on without it."""
    match change.WhichOneof("kind"):
        case "tenant":
            return KnownTenant(change.tenant.tenant)
        case "key":
            key = change.key
            principal = Principal(key.tenant, key.key, frozenset(ROLES[role] for role in key.roles))
            return KnownKey(principal, Verifier(key.salt, key.verifier), key.revoked)
        case "channel":
            c = change.channel
            return KnownChannel(c.tenant, c.channel, c.release, c.release_digest)
        case kind:
            raise PreconditionFailed("UNKNOWN_CHANGE", f"unknown kind of change: {kind}; upgrade the gateway")


def write_pin(pinned: Pinned) -> bytes:
    return inference_pb2.Pin(
        tenant=pinned.tenant,
        channel=pinned.channel,
        release=pinned.release,
        release_digest=pinned.digest,
        epoch=pinned.epoch,
        revision=pinned.revision,
    ).SerializeToString()
