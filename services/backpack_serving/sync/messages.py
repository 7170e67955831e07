"""The messages of the sync protocol, independent of gRPC.

reader                                            service
Hello{incarnation, fingerprint, position, …}  →
                                              ←   Snapshot{nonce} or Delta{nonce}, one at a time
Ack{nonce}, or Nack{nonce, reason per channel} →
                                              ←   Bookmark, each second: nothing up to here is missing
Report, each second                           →
                                              ←   ResyncRequired: say Hello again
"""

from __future__ import annotations

from dataclasses import dataclass

from backpack_serving.references import CanaryTally, Position, ReaderKind, Refusal
from backpack_serving.sync.state import StateEntry

BOOKMARK_SECONDS = REPORT_SECONDS = 1.0

SILENCE = 5.0
"""Seconds without a message after which either end considers a stream dead (half-open connections)."""


@dataclass(frozen=True, slots=True)
class Hello:
    """`incarnation` is drawn when the process starts. `whole` asks for a snapshot instead of a delta."""

    kind: ReaderKind
    incarnation: str
    name: str
    fingerprint: str
    position: Position
    whole: bool = False
    digests: frozenset[str] = frozenset()
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class Ack:
    nonce: int


@dataclass(frozen=True, slots=True)
class Nack:
    """Everything was applied except these."""

    nonce: int
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class ReaderReport:
    """A heartbeat: current refusals, tallies of channels with a canary, and how many releases are ready."""

    refusals: tuple[Refusal, ...] = ()
    tallies: tuple[CanaryTally, ...] = ()
    releases: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole state at a position."""

    nonce: int
    position: Position
    changes: tuple[StateEntry, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """The changes after `base`, up to and including `position`."""

    nonce: int
    base: Position
    position: Position
    changes: tuple[StateEntry, ...]


@dataclass(frozen=True, slots=True)
class Bookmark:
    """Nothing up to this position is missing."""

    position: Position


@dataclass(frozen=True, slots=True)
class ResyncRequired:
    reason: str


FromReader = Hello | Ack | Nack | ReaderReport
ToReader = Snapshot | Delta | Bookmark | ResyncRequired
