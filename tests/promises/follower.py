"""A reader over real gRPC and a real disk that writes down what it was told."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path

from backpack_serving import rpc, tasks
from backpack_serving.references import CanaryTally, Position, ReaderKind, Refusal
from backpack_serving.sync import wire as wire
from backpack_serving.sync.client import SyncClient
from backpack_serving.sync.snapshot_file import SnapshotFile
from backpack_serving.sync.state import Stageable, StateView
from backpack_serving.sync.transport import SyncTransport


@dataclass
class Follower:
    """`seen` is every view that it had, over all its lives; `early` those that held before they were on disk.

    `slow` is its staging, in seconds.
    """

    kind: ReaderKind
    address: str
    key: str
    file: Path
    fingerprint: str
    slow: float = 0.0
    seen: list[StateView] = field(default_factory=list)
    early: list[Position] = field(default_factory=list)

    async def start(self) -> None:
        self._channel = rpc.channel(self.address)
        self.client = SyncClient(self.kind, f"{random.getrandbits(64):x}", "follower", self.fingerprint)
        self.transport = SyncTransport(self._channel, self.key, self.client, self, self.file)
        self.transport.restore()
        self._task = asyncio.create_task(self.transport.run())

    async def stop(self) -> None:
        await tasks.end(self._task)
        await self._channel.close()

    @property
    def on_disk(self) -> StateView:
        kept = SnapshotFile(self.file).read()
        return wire.read_view(kept.payload) if kept else StateView()

    async def stage(self, work: tuple[Stageable, ...]) -> tuple[Refusal, ...]:
        await asyncio.sleep(self.slow)
        return ()

    def swapped(self, view: StateView) -> None:
        self.seen.append(view)
        if self.on_disk.position < view.position:
            self.early.append(view.position)

    def resident(self) -> frozenset[str]:
        return frozenset()

    def tallies(self) -> tuple[CanaryTally, ...]:
        return ()
