"""Which replica runs a request: the less loaded of two drawn at random (Mitzenmacher 2001)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from backpack_proto.v1 import directory_pb2, inference_pb2_grpc

from backpack_serving import rpc
from backpack_serving.auth.tls import Tls
from backpack_serving.errors import Unavailable

LOST_SECONDS = 1.0
"""How long a replica that failed a call gets no other: one that is idle may have nothing new to report."""


@dataclass(slots=True, eq=False)
class Target:
    """A replica as this gateway sees it. `sent` are tokens that it has asked for and not got yet."""

    replica: directory_pb2.Replica
    channel: Any
    stub: inference_pb2_grpc.InferenceServiceStub
    sent: int = 0
    lost_until: float = float("-inf")

    @property
    def load(self) -> float:
        """Tokens in flight per slot: what it reported, or what we alone know of, whichever is more."""
        return max(self.replica.tokens_in_flight, self.sent) / max(1, self.replica.slots)


class Router:
    """The replicas that serve this gateway's model."""

    def __init__(self, fingerprint: str, tls: Tls | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._fingerprint, self._tls, self._clock = fingerprint, tls, clock
        self._targets: dict[str, Target] = {}

    @property
    def size(self) -> int:
        return sum(1 for _ in self._usable(()))

    def replicas(self) -> set[str]:
        """Ids of all that the directory lists, usable now or not."""
        return set(self._targets)

    def update(self, replicas: Iterable[directory_pb2.Replica]) -> None:
        """Take in what the directory says. A lost replica that has something new to report is back."""
        seen = {replica.id: replica for replica in replicas if replica.model_fingerprint == self._fingerprint}
        targets: dict[str, Target] = {}
        for name, replica in seen.items():
            if target := self._targets.get(name):
                if target.replica != replica:
                    target.lost_until = float("-inf")
                target.replica = replica
            else:
                # Nothing is repeated there: another replica is asked instead, and at once.
                channel = rpc.channel(replica.address, self._tls, repeats=False)
                target = Target(replica, channel, inference_pb2_grpc.InferenceServiceStub(channel))
            targets[name] = target
        # At once: a scrape counts them from its own thread. Calls in progress keep the channel of one that went.
        self._targets = targets

    async def close(self) -> None:
        """Close the channels to replicas, with the calls that run."""
        for target in self._targets.values():
            await target.channel.close()

    @contextmanager
    def lease(self, tokens: int, without: Iterable[Target] = ()) -> Iterator[Target]:
        """A replica for a request of so many tokens. Raises Unavailable if there is none."""
        usable = list(self._usable(without))
        if not usable:
            raise Unavailable("NO_REPLICA", "no replica serves this model now; try again shortly", retry_after=1.0)
        target = min(random.sample(usable, min(2, len(usable))), key=lambda t: t.load)
        target.sent += tokens
        try:
            yield target
        finally:
            target.sent -= tokens

    def lost(self, target: Target) -> None:
        """It failed a call: nothing more for it until it reports something new, or for LOST_SECONDS."""
        target.lost_until = self._clock() + LOST_SECONDS

    def _usable(self, without: Iterable[Target]) -> Iterator[Target]:
        excluded, now = list(without), self._clock()
        for target in self._targets.values():
            if not target.replica.draining and target.lost_until <= now and target not in excluded:
                yield target
