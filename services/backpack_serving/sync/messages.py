"""What the two ends say to each other, whatever carries it.

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
"""Seconds without a message after which either end takes a stream for dead, as one is that is half open."""


@dataclass(frozen=True, slots=True)
class Hello:
    """`incarnation` is drawn when the process starts. `whole`: send everything, not what came after `position`."""

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
    """All of it was applied, but for these."""

    nonce: int
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class ReaderReport:
    """A sign of life. `refusals` are all that stand now, `tallies` those of channels with a canary, `releases` how
    many are ready to be served.
    """

    refusals: tuple[Refusal, ...] = ()
    tallies: tuple[CanaryTally, ...] = ()
    releases: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything, as of a position."""

    nonce: int
    position: Position
    changes: tuple[StateEntry, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What changed after `base`, up to and including `position`."""

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
