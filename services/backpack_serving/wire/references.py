"""Positions, release references, refusals and canary tallies ↔ messages."""

from __future__ import annotations

from collections.abc import Iterable

from backpack_proto.v1 import inference_pb2
from backpack_proto.v1 import sync_pb2 as pb

from backpack_serving.errors import InvalidRequest
from backpack_serving.references import CanaryTally, Position, ReaderKind, Refusal, ReleaseRef

KINDS = {pb.READER_KIND_GATEWAY: ReaderKind.GATEWAY, pb.READER_KIND_REPLICA: ReaderKind.REPLICA}
KIND_NUMBERS = {kind: number for number, kind in KINDS.items()}

MOST_REQUESTS = 2**53
"""Most requests of one tally, so that the sum over all readers fits into a message, too."""


def read_position(message: inference_pb2.Position) -> Position:
    return Position(message.epoch, message.revision)


def write_position(position: Position) -> inference_pb2.Position:
    return inference_pb2.Position(epoch=position.epoch, revision=position.revision)


def read_ref(message: pb.ReleaseRef) -> ReleaseRef:
    return ReleaseRef(message.number, message.digest)


def write_ref(release: ReleaseRef) -> pb.ReleaseRef:
    return pb.ReleaseRef(number=release.number, digest=release.digest)


def read_refusals(refusals: Iterable[pb.Refusal]) -> tuple[Refusal, ...]:
    return tuple(Refusal(r.tenant, r.channel, r.release_digest, r.reason, r.message, r.final) for r in refusals)


def write_refusal(refusal: Refusal) -> pb.Refusal:
    return pb.Refusal(
        tenant=refusal.tenant,
        channel=refusal.channel,
        release_digest=refusal.digest,
        reason=refusal.reason,
        message=refusal.message,
        final=refusal.final,
    )


def read_tally(tally: pb.Tally) -> CanaryTally:
    """Read a tally. Raises InvalidRequest for impossible counts."""
    counts = tally.requests, tally.errors, tally.non_finite
    if not MOST_REQUESTS >= counts[0] >= counts[1] >= counts[2] >= 0:
        text = "{} requests, {} failed, {} not numbers; each 0 to the one before it".format(*counts)
        raise InvalidRequest.at("report.tallies", "OUT_OF_RANGE", text)
    return CanaryTally(tally.tenant, tally.channel, tally.release_digest, *counts)


def write_tally(tally: CanaryTally) -> pb.Tally:
    return pb.Tally(
        tenant=tally.tenant,
        channel=tally.channel,
        release_digest=tally.digest,
        requests=tally.requests,
        errors=tally.errors,
        non_finite=tally.non_finite,
    )
