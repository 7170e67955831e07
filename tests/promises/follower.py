"""A reader over real gRPC and a real disk that writes down what it was told."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path

from backpack_serving import rpc, tasks
from backpack_serving.sync.known import Kind, Position, Steering, View
from backpack_serving.sync.known_good import KnownGood
from backpack_serving.sync.link import Link
from backpack_serving.sync.messages import Refusal, Tally
from backpack_serving.sync.reader import Reader
from backpack_serving.wire import sync as wire


@dataclass
class Follower:
    """`seen` is every view that it had, over all its lives; `early` those that held before they were on disk.

    `slow` is its staging, in seconds.
    """

    kind: Kind
    address: str
    key: str
    file: Path
    fingerprint: str
    slow: float = 0.0
    seen: list[View] = field(default_factory=list)
    early: list[Position] = field(default_factory=list)

    async def start(self) -> None:
        self._channel = rpc.channel(self.address)
        self.reader = Reader(self.kind, f"{random.getrandbits(64):x}", "follower", self.fingerprint)
        self.link = Link(self._channel, self.key, self.reader, self, self.file)
        self.link.restore()
        self._task = asyncio.create_task(self.link.run())

    async def stop(self) -> None:
        await tasks.end(self._task)
        await self._channel.close()

    @property
    def on_disk(self) -> View:
        kept = KnownGood(self.file).read()
        return wire.read_view(kept.payload) if kept else View()

    async def stage(self, work: tuple[Steering, ...]) -> tuple[Refusal, ...]:
        await asyncio.sleep(self.slow)
        return ()

    def swapped(self, view: View) -> None:
        self.seen.append(view)
        if self.on_disk.position < view.position:
            self.early.append(view.position)

    def resident(self) -> frozenset[str]:
        return frozenset()

    def tallies(self) -> tuple[Tally, ...]:
        return ()
