"""P6: what readers are told over real streams is the event table: in order, whole, without gaps, never back."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from backpack_lm.manifest import Manifest
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError
from backpack_serving.interventions import bootstrap as interventions
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.event_history import EventHistory
from backpack_serving.interventions.service import Interventions
from backpack_serving.observability.metrics import Metrics
from backpack_serving.references import Position, ReaderKind
from backpack_serving.settings import Settings
from backpack_serving.sync.state import StateView

from tests.conftest import free_port
from tests.e2e.conftest import System, copy
from tests.promises.follower import Follower
from tests.promises.proxy import FaultProxy
from tests.waiting import eventually


def _states(settings: Settings) -> dict[Position, StateView]:
    """What the event table amounts to after each of its events."""
    store = open_store(settings.database_url)
    try:
        journal = EventHistory(Interventions(store, Manifest.read(settings.model).shape), page=1)
        view, states = StateView(), {}
        while (page := journal.since(view.position.revision)) is not None and page.position > view.position:
            view = view.changed(page.position, page.changes)
            states[page.position] = view
        return states
    finally:
        store.close()


def _validate(follower: Follower, states: dict[Position, StateView]) -> int:
    """Every view is the event table's at its position, and none is older than the one before it."""
    assert not follower.early, f"held before they were on disk: {follower.early}"
    at = Position()
    for view in follower.seen:
        assert view.position >= at, f"back from {at} to {view.position}"
        at = view.position
        if at == Position():
            continue
        expected = states[at]
        assert view.channels == expected.channels, f"{follower.kind} at {at}"
        if follower.kind is ReaderKind.GATEWAY:
            assert (view.keys, view.tenants) == (expected.keys, expected.tenants)
        else:
            assert not view.keys
    return len(follower.seen)


async def _writes(settings: Settings, count: int, draw: random.Random) -> None:
    """Tenants, keys, releases, channels that move; what is refused for lack of a service is tried again."""
    system = System(settings.interventions_address, settings.interventions_address, settings)
    keys: list[Any] = []

    async def one(turn: int) -> bool:
        if not keys or draw.random() < 0.1:
            name = f"w{turn}"
            await system.tenants.CreateTenant(ipb.CreateTenantRequest(tenant_id=name), metadata=system.admin)
            request = ipb.CreateApiKeyRequest(parent=f"tenants/{name}", roles=[ipb.ROLE_RELEASER])
            key = rpc.with_key((await system.tenants.CreateApiKey(request, metadata=system.admin)).secret)
            await system.patches.CreatePatch(ipb.CreatePatchRequest(patch_id="p"), metadata=key)
            await system.release(key, copy("king", draw.choice(("ship", "nurse", "sea"))))
            keys.append(key)
        else:
            await system.activate(draw.choice(keys), draw.randint(0, 1), draw.choice(("live", "beta")))
        return True

    for turn in range(count):
        for attempt in range(200):
            try:
                with rpc.errors():
                    await one(turn * 1000 + attempt)
                break
            except ServiceError as error:
                assert error.code in ("UNAVAILABLE", "ABORTED"), error
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.02)
    await system.close()


async def _story(tmp_path: Path, writes: int) -> list[int]:
    settings = Settings(state=tmp_path, drain=0.2, interventions_address=f"127.0.0.1:{free_port()}")
    control = await interventions.start(settings, Metrics())
    proxies = [await FaultProxy(settings.interventions_address).start() for _ in range(4)]
    fingerprint, key = Manifest.read(settings.model).fingerprint, settings.key_for("replica")
    kinds = [ReaderKind.GATEWAY, ReaderKind.REPLICA, ReaderKind.GATEWAY, ReaderKind.REPLICA]
    followers = [
        Follower(kind, proxy.address, key, tmp_path / f"reader-{n}", fingerprint, slow=0.3 if n == 3 else 0.0)
        for n, (kind, proxy) in enumerate(zip(kinds, proxies, strict=True))
    ]
    for follower in followers:
        await follower.start()
    writing = asyncio.create_task(_writes(settings, writes, random.Random(5)))
    turn = seen = 0
    while not writing.done():
        turn += 1
        await asyncio.sleep(0.3)
        if len(followers[0].seen) > seen:  # a slow machine may need longer than a turn to connect again
            seen = len(followers[0].seen)
            proxies[0].reset()
        if turn % 4 == 0:  # a reader that is paused, and one that starts again from its disk
            proxies[1].half_open()
            asyncio.get_running_loop().call_later(0.8, proxies[1].heal)
            await followers[2].stop()
            await followers[2].start()
        if turn == 5:
            await control.stop()
            control = await interventions.start(settings, Metrics())
    await writing
    head = Position(1, 0)
    for proxy in proxies:
        proxy.heal()

    async def caught_up() -> bool:
        nonlocal head
        positions = {follower.client.view.position for follower in followers}
        head = max(positions)
        return len(positions) == 1

    await eventually(caught_up)
    await asyncio.sleep(1.5)
    await eventually(caught_up)
    for part in (*followers, *proxies, control):
        await part.stop()
    states = await asyncio.to_thread(_states, settings)
    assert head == max(states), "they stopped short of the event table's end"
    return [_validate(follower, states) for follower in followers]


async def test_p6_what_readers_saw_is_the_event_table_through_resets_pauses_and_restarts(tmp_path: Path) -> None:
    views = await _story(tmp_path, 60)
    assert min(views) >= 3, views
    assert max(views) > 20, views


@pytest.mark.slow
async def test_p6_what_readers_saw_is_the_event_table_longer(tmp_path: Path) -> None:
    views = await _story(tmp_path, 1500)
    assert min(views[:3]) > 100, views
