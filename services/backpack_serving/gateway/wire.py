"""What only a gateway reads and writes: pins, and releases by number."""

from __future__ import annotations

from backpack_proto.v1 import inference_pb2
from backpack_proto.v1 import sync_pb2 as pb

from backpack_serving.references import Pin, Position, ReleaseRef
from backpack_serving.wire.references import read_position, read_ref


def write_pin(pinned: Pin) -> inference_pb2.Pin:
    pin = inference_pb2.Pin(
        tenant=pinned.tenant,
        channel=pinned.channel,
        release=pinned.release,
        release_digest=pinned.digest,
        epoch=pinned.epoch,
        revision=pinned.revision,
        canary=pinned.canary,
    )
    pin.staleness.FromMicroseconds(round(pinned.staleness * 1e6))
    return pin


def read_resolved(message: pb.ResolveReleasesResponse) -> tuple[Position, list[ReleaseRef]]:
    return read_position(message.position), list(map(read_ref, message.releases))
