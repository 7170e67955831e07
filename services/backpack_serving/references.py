"""Values that the rooms exchange: positions of the store, release references, pins, and what readers report.

A leaf: it imports nothing of ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

LIVE = "live"
"""The channel that every tenant has, and that a request gets which names none."""

CANARY = ":canary"
"""After a channel's name in a request: the release of its canary, whatever the request's key."""

NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
"""What tenants, patches and channels may be called."""

NAME_WRITTEN = "1 to 63 of a-z, 0-9 and -, starting with a letter"


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where the store stood. Positions of an epoch only rise; a restore from backup starts a new epoch."""

    epoch: int = 0
    revision: int = 0

    def __str__(self) -> str:
        return f"{self.epoch}.{self.revision}"


@dataclass(frozen=True, slots=True)
class ReleaseRef:
    """A release by its number, which people use, and its digest, which says what it is."""

    number: int
    digest: str


@dataclass(frozen=True, slots=True)
class Pin:
    """The release that a request gets, and the position of the store at which that was so.

    `staleness` is how many seconds old that knowledge was; `canary`: it is the channel's canary. `draft` is the digest
    of the edits that the request adds to the release, "" if it adds none.
    """

    tenant: str
    channel: str
    release: int
    digest: str
    epoch: int
    revision: int
    canary: bool = False
    staleness: float = 0.0
    draft: str = ""

    @property
    def ref(self) -> ReleaseRef:
        return ReleaseRef(self.release, self.digest)


class ReaderKind(StrEnum):
    """Which part of the store a reader is told of: gateways all of it, replicas no keys."""

    GATEWAY = "gateway"
    REPLICA = "replica"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a reader doesn't take a release; `channel` is "" for one that no channel points at yet.

    `final`: trying again can't help. The others are tried again by the reader itself.
    """

    tenant: str
    channel: str
    digest: str
    reason: str
    message: str
    final: bool = True

    @property
    def key(self) -> tuple[str, str]:
        return self.tenant, self.channel


@dataclass(frozen=True, slots=True)
class CanaryTally:
    """How a gateway's requests under a canary went, since it knows of it."""

    tenant: str
    channel: str
    digest: str
    requests: int
    errors: int
    non_finite: int = 0
