"""Systems whose parts can be taken away one by one, with a proxy before the intervention service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backpack_serving import rpc
from backpack_serving.gateway import bootstrap as gateway
from backpack_serving.inference import directory, replica
from backpack_serving.interventions import bootstrap as interventions
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings

from tests.e2e.conftest import ANYWHERE, System
from tests.promises.proxy import FaultProxy


@dataclass
class Apart:
    """Interventions, and a gateway and a replica that reach them through a proxy only."""

    settings: Settings
    control: interventions.InterventionService
    directory_server: rpc.Server
    proxy: FaultProxy
    replica: replica.Replica | None = None
    gateway: gateway.Gateway | None = None

    def __post_init__(self) -> None:
        self._channels: list[Any] = []
        self._open: list[System] = []

    @property
    def seen(self) -> Settings:
        """Settings of those behind the proxy."""
        return self.settings.model_copy(update={"interventions_address": self.proxy.address})

    async def start(self) -> None:
        """A replica and a gateway; returns when the gateway knows of the replica."""
        channels = [rpc.channel(self.proxy.address), rpc.channel(self.directory_server.address)]
        self._channels += channels
        self.replica = await replica.start(self.seen, replica.report_to(channels[1]), channels[0], Metrics())
        self.gateway = await gateway.start(self.seen, Metrics())
        while not self.gateway.router.size:
            await asyncio.sleep(0.02)

    async def end(self) -> None:
        """The replica and the gateway stop; what they had on disk stays."""
        for part in (self.gateway, self.replica):
            if part:
                await part.stop()
        self.gateway = self.replica = None
        for channel in self._channels:
            await channel.close()
        self._channels.clear()

    def system(self) -> System:
        """Stubs: of the gateway as it is now, and of interventions without the proxy."""
        assert self.gateway is not None
        system = System(self.gateway.address, self.control.address, self.settings)
        self._open.append(system)
        return system

    async def stop(self) -> None:
        for system in self._open:
            await system.close()
        await self.end()
        await self.proxy.stop()
        await self.directory_server.stop()
        await self.control.stop()


@asynccontextmanager
async def apart(state: Path, **more: Any) -> AsyncIterator[Apart]:
    settings = Settings(state=state, threads=1, **{**ANYWHERE, "slots": 4, "drain": 1.0, **more})
    control = await interventions.start(settings, Metrics())
    directory_server = await directory.serve(settings, Metrics())
    addresses = {"interventions_address": control.address, "directory_address": directory_server.address}
    settings = settings.model_copy(update=addresses)
    parts = Apart(settings, control, directory_server, await FaultProxy(control.address).start())
    try:
        await parts.start()
        yield parts
    finally:
        await parts.stop()
