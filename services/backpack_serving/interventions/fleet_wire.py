"""Readers, holdings and rollouts ↔ messages."""

from __future__ import annotations

import json
from typing import Any

from backpack_proto.v1 import interventions_pb2, sync_pb2

from backpack_serving.errors import InvalidRequest
from backpack_serving.interventions.fleet import HoldState, Place, ReaderStatus, ReleaseHolding, RolloutProgress
from backpack_serving.interventions.rollouts import Level
from backpack_serving.wire.references import KIND_NUMBERS, write_position, write_refusal

LEVELS = {
    interventions_pb2.WAIT_UNSPECIFIED: Level.NONE,
    interventions_pb2.WAIT_NONE: Level.NONE,
    interventions_pb2.WAIT_QUORUM: Level.QUORUM,
    interventions_pb2.WAIT_ALL: Level.ALL,
}

STATES = {
    HoldState.STAGED: sync_pb2.HOLD_STATE_STAGED,
    HoldState.ACKED: sync_pb2.HOLD_STATE_ACKED,
    HoldState.NACKED: sync_pb2.HOLD_STATE_NACKED,
    HoldState.STALE: sync_pb2.HOLD_STATE_STALE,
}

WAIT_SECONDS, LONGEST_WAIT = 10.0, 60.0


def read_wait(request: Any) -> tuple[Level, float]:
    """The readers that a change waits for, and the longest wait in seconds. Raises InvalidRequest."""
    if request.wait not in LEVELS:
        raise InvalidRequest.at("wait", "UNKNOWN_VALUE", f"{request.wait}; use NONE, QUORUM or ALL")
    seconds = WAIT_SECONDS
    if request.HasField("wait_timeout"):
        seconds = request.wait_timeout.ToNanoseconds() / 1e9
        if not 0 <= seconds <= LONGEST_WAIT:
            raise InvalidRequest.at("wait_timeout", "OUT_OF_RANGE", f"{seconds:g} s; 0 to {LONGEST_WAIT:g} s")
    return LEVELS[request.wait], seconds


def write_rollout(rollout: RolloutProgress, level: Level) -> interventions_pb2.Rollout:
    return interventions_pb2.Rollout(
        complete=level.reached(rollout),
        replicas=rollout.replicas.total,
        replicas_acked=rollout.replicas.acked,
        gateways=rollout.gateways.total,
        gateways_acked=rollout.gateways.acked,
        refusals=[f"{name}: {refusal.reason}: {refusal.message}" for name, refusal in rollout.refusals],
    )


def write_place(reader: ReaderStatus) -> str:
    """Where a reader is in the list of all, for a page token."""
    return json.dumps(reader.place)


def read_place(text: str) -> Place:
    """Raises InvalidRequest for a text that isn't of `write_place`."""
    try:
        gateway, name, incarnation = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        gateway = name = incarnation = None
    if isinstance(gateway, bool) and isinstance(name, str) and isinstance(incarnation, str):
        return gateway, name, incarnation
    raise InvalidRequest.at("page_token", "BAD_PAGE_TOKEN", f"{text[:40]!r} is not from a page of this list")


def write_hold(hold: ReleaseHolding) -> sync_pb2.Hold:
    return sync_pb2.Hold(
        reader=hold.reader,
        kind=KIND_NUMBERS[hold.kind],
        incarnation=hold.incarnation,
        release=hold.release.number,
        release_digest=hold.release.digest,
        canary=hold.canary,
        state=STATES[hold.state],
        reason=hold.why.reason if hold.why else "",
        message=hold.why.message if hold.why else "",
        position=write_position(hold.position),
        connected=hold.connected,
        retried=hold.state is HoldState.NACKED and hold.refusal is not None and not hold.refusal.final,
    )


def write_reader(reader: ReaderStatus, silence: float) -> sync_pb2.ReaderStatus:
    away = reader.out_of_touch(silence)
    status = sync_pb2.ReaderStatus(
        reader=reader.hello.name,
        kind=KIND_NUMBERS[reader.hello.kind],
        incarnation=reader.hello.incarnation,
        connected=reader.connected,
        position=write_position(reader.server.acked),
        releases=reader.releases,
        refusals=map(write_refusal, reader.server.refusals.values()),
        reason=away.reason if away else "",
        message=away.message if away else "",
    )
    status.silence.FromMicroseconds(round(silence * 1e6))
    return status
