"""Channels, what became of them, and how far replicas and gateways (readers of the store) are with it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from backpack_proto.v1 import inference_pb2, sync_pb2
from backpack_proto.v1 import interventions_pb2 as pb

from backpack_serving.client.records import last, time
from backpack_serving.references import Position

Wait = Literal["none", "quorum", "all"]
"""For whom to wait: more than half of the connected replicas, and of the gateways, or all of them."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A release that `permille` of a thousand request keys get: those that the salt picks."""

    release: int
    digest: str
    permille: int
    salt: str


@dataclass(frozen=True, slots=True)
class Channel:
    """Which release requests get. `previous` is where a rollback goes, `etag` is another after every change.

    `canary_ended` is why the service ended the last canary, if it did. `judgement` is what was known, when the channel
    moved last, of the release that it moved to: what that does to ordinary text, and whether this was allowed.
    """

    name: str
    release: int
    digest: str
    previous: int | None
    generation: int
    etag: str
    moved: datetime
    canary: Canary | None
    canary_ended: str
    judgement: str = ""

    @property
    def id(self) -> str:
        return last(self.name)

    @classmethod
    def of(cls, m: pb.Channel) -> Channel:
        canary = None
        if m.HasField("canary"):
            canary = Canary(m.canary.release, m.canary.release_digest, m.canary.permille, m.canary.salt)
        return cls(
            m.name,
            m.release,
            m.release_digest,
            m.previous_release if m.HasField("previous_release") else None,
            m.generation,
            m.etag,
            time(m.update_time),
            canary,
            m.canary_abort_reason,
            m.judgement,
        )


@dataclass(frozen=True, slots=True)
class Rollout:
    """How many of the connected readers hold a change. `complete`: as many as were waited for.

    `refusals` say who refuses it, and why.
    """

    complete: bool
    replicas: int
    replicas_holding: int
    gateways: int
    gateways_holding: int
    refusals: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """What became of a channel. `rollout` is how far that has come, if it was waited for.

    `at` is where the store stands with it: given as `since` to a call about text, that isn't answered with less.
    """

    channel: Channel
    at: Position
    rollout: Rollout | None

    @classmethod
    def of(cls, m: Any) -> Move:
        """Of the answer to any call that moves a channel."""
        rollout, r = None, m.rollout
        if m.HasField("rollout"):
            counts = r.replicas, r.replicas_acked, r.gateways, r.gateways_acked
            rollout = Rollout(r.complete, *counts, tuple(r.refusals))
        return cls(Channel.of(m.channel), _position(m.position), rollout)


@dataclass(frozen=True, slots=True)
class Hold:
    """How a reader stands to a release of a channel, or to its canary's.

    `kind` is "replica" or "gateway". `state` is "acked" (its requests get it), "staged" (it is ready), "nacked"
    (refused) or "stale" (behind, or not `connected`); `why` it isn't "acked". `at` is how far the reader is.
    `retried`: it is refused for now, and the reader itself tries again.
    """

    reader: str
    kind: str
    release: int
    digest: str
    canary: bool
    state: str
    why: str
    at: Position
    connected: bool
    retried: bool = False

    @classmethod
    def of(cls, m: sync_pb2.Hold) -> Hold:
        state = sync_pb2.HoldState.Name(m.state).removeprefix("HOLD_STATE_").lower()
        why = f"{m.reason}: {m.message}" if m.reason else ""
        at = _position(m.position)
        return cls(
            m.reader,
            _reader_kind(m.kind),
            m.release,
            m.release_digest,
            m.canary,
            state,
            why,
            at,
            m.connected,
            m.retried,
        )


@dataclass(frozen=True, slots=True)
class Tally:
    """Requests under a canary, as gateways counted them, and how many of them failed."""

    requests: int
    failed: int


@dataclass(frozen=True, slots=True)
class Status:
    """A channel, who holds its releases (replicas first), and how its canary does, if it has one."""

    channel: Channel
    holds: tuple[Hold, ...]
    tally: Tally | None

    def held(self, wait: Wait) -> bool:
        """Whether as many of the connected replicas, and of the gateways, hold all its releases as `wait` says."""
        return all(_enough(wait, len(g), sum(hold.state == "acked" for hold in g)) for g in self._groups())

    def refused(self, wait: Wait) -> tuple[Hold, ...]:
        """Who refuses a release for good, if so many do that it can't be held by as many as `wait` says."""
        for group in self._groups():
            nacked = tuple(hold for hold in group if hold.state == "nacked" and not hold.retried)
            if nacked and not _enough(wait, len(group), len(group) - len(nacked)):
                return nacked
        return ()

    def _groups(self) -> list[list[Hold]]:
        """Connected readers of each kind, by release."""
        connected = [hold for hold in self.holds if hold.connected]
        return [
            [hold for hold in connected if (hold.kind, hold.canary) == (kind, canary)]
            for kind in ("replica", "gateway")
            for canary in ((False, True) if self.channel.canary else (False,))
        ]

    @classmethod
    def of(cls, m: sync_pb2.GetRolloutResponse) -> Status:
        tally = Tally(m.canary.requests, m.canary.errors) if m.HasField("canary") else None
        return cls(Channel.of(m.channel), tuple(map(Hold.of, m.holds)), tally)


@dataclass(frozen=True, slots=True)
class Reader:
    """A replica or a gateway. `silence` is since when it wasn't heard, in seconds; `at` is how far it is.

    `releases` are ready to be served, `refusals` aren't, and why. `why` it isn't `connected`.
    """

    name: str
    kind: str
    connected: bool
    at: Position
    silence: float
    releases: int
    refusals: tuple[str, ...]
    why: str

    @classmethod
    def of(cls, m: sync_pb2.ReaderStatus) -> Reader:
        refusals = (f"{r.tenant}/{r.channel} {r.release_digest[:12]}: {r.reason}: {r.message}" for r in m.refusals)
        silence = m.silence.ToMilliseconds() / 1000
        at = _position(m.position)
        why = f"{m.reason}: {m.message}" if m.reason else ""
        return cls(m.reader, _reader_kind(m.kind), m.connected, at, silence, m.releases, tuple(refusals), why)


@dataclass(frozen=True, slots=True)
class Fleet:
    """Where the store stands, and all that read it, replicas first."""

    at: Position
    readers: tuple[Reader, ...]

    @classmethod
    def of(cls, m: sync_pb2.ListReadersResponse) -> Fleet:
        return cls(_position(m.position), tuple(map(Reader.of, m.readers)))


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A replica as a gateway's router sees it: its slots, the requests that it runs and that wait, and the tokens that
    it has to read or make for them, by its own report.

    `sent` are the tokens of requests that this gateway has in flight there; `load`, by which the router chooses, is
    tokens in flight for each slot. `usable`: requests are sent there.
    """

    id: str
    address: str
    slots: int
    running: int
    queued: int
    tokens: int
    sent: int
    load: float
    draining: bool
    usable: bool

    @classmethod
    def of(cls, m: inference_pb2.ReplicaLoad) -> ReplicaLoad:
        r = m.replica
        reported = r.id, r.address, r.slots, r.running, r.queued, r.tokens_in_flight
        return cls(*reported, m.sent, m.load, r.draining, m.usable)


def _enough(wait: Wait, total: int, acked: int) -> bool:
    """As the service counts when it waits for a move."""
    match wait:
        case "quorum":
            return 2 * acked > total
        case "all":
            return 0 < total == acked
    return True


def _position(m: Any) -> Position:
    return Position(m.epoch, m.revision)


def _reader_kind(number: int) -> str:
    return "gateway" if number == sync_pb2.READER_KIND_GATEWAY else "replica"
