"""Translates pins and resolved releases, which only a gateway sends and receives."""

from __future__ import annotations

from backpack_proto.v1 import inference_pb2
from backpack_proto.v1 import sync_pb2 as pb

from backpack_serving.gateway.routing import Target
from backpack_serving.references import Pin, Position, ReleaseRef
from backpack_serving.wire.references import read_position, read_ref


def write_pin(pin: Pin) -> inference_pb2.Pin:
    message = inference_pb2.Pin(
        tenant=pin.tenant,
        channel=pin.channel,
        release=pin.release,
        release_digest=pin.digest,
        epoch=pin.epoch,
        revision=pin.revision,
        canary=pin.canary,
        draft_digest=pin.draft,
    )
    message.staleness.FromMicroseconds(round(pin.staleness * 1e6))
    return message


def write_load(target: Target, usable: bool) -> inference_pb2.ReplicaLoad:
    return inference_pb2.ReplicaLoad(replica=target.replica, sent=target.sent, load=target.load, usable=usable)


def read_resolved(message: pb.ResolveReleasesResponse) -> tuple[Position, list[ReleaseRef]]:
    return read_position(message.position), list(map(read_ref, message.releases))
