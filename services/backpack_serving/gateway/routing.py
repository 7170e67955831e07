"""Routes a request to the less loaded of two replicas drawn at random (Mitzenmacher 2001)."""

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
"""Seconds without calls for a replica that failed one, unless it reports something new before."""


@dataclass(slots=True, eq=False)
class Target:
    """A replica as this gateway sees it. `sent` counts the tokens of requests that this gateway has in flight there."""

    replica: directory_pb2.Replica
    channel: Any
    stub: inference_pb2_grpc.InferenceServiceStub
    sent: int = 0
    lost_until: float = float("-inf")

    @property
    def load(self) -> float:
        """Tokens in flight per slot: the replica's report or our own count, whichever is higher."""
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
        """Ids of all listed replicas, usable or not."""
        return set(self._targets)

    def targets(self) -> list[tuple[Target, bool]]:
        """All listed replicas, by their ids, each with whether requests are sent there now."""
        usable = set(self._usable(()))
        return [(target, target in usable) for _, target in sorted(self._targets.items())]

    def update(self, replicas: Iterable[directory_pb2.Replica]) -> None:
        """Replace the list of replicas. A lost replica is usable again once its report changes."""
        seen = {replica.id: replica for replica in replicas if replica.model_fingerprint == self._fingerprint}
        targets: dict[str, Target] = {}
        for name, replica in seen.items():
            if target := self._targets.get(name):
                if target.replica != replica:
                    target.lost_until = float("-inf")
                target.replica = replica
            else:
                # gRPC must not retry here: the gateway asks another replica at once instead.
                channel = rpc.channel(replica.address, self._tls, repeats=False)
                target = Target(replica, channel, inference_pb2_grpc.InferenceServiceStub(channel))
            targets[name] = target
        # One assignment: a scrape reads it in another thread. Running calls keep the channel of a removed replica.
        self._targets = targets

    async def close(self) -> None:
        """Close the channels to replicas; calls that still run end."""
        for target in self._targets.values():
            await target.channel.close()

    @contextmanager
    def lease(self, tokens: int, without: Iterable[Target] = ()) -> Iterator[Target]:
        """Choose a replica, other than `without`, for a request of so many tokens. Raises Unavailable without one."""
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
        """Skip a replica that failed a call, until its report changes or for LOST_SECONDS."""
        target.lost_until = self._clock() + LOST_SECONDS

    def _usable(self, without: Iterable[Target]) -> Iterator[Target]:
        excluded, now = list(without), self._clock()
        for target in self._targets.values():
            if not target.replica.draining and target.lost_until <= now and target not in excluded:
                yield target
