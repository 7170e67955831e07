"""A replica of a store with many channels: they are staged, and looked through, in many short turns of the loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backpack_lm.patch import Cell, ScaleEdit, TopicEdit
from backpack_serving.inference.release_cache import CHANGES_A_TURN, ReleaseCache
from backpack_serving.inference.release_files import ReleaseFiles
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.references import Position, ReleaseRef
from backpack_serving.sync.state import ChannelState, StateView

from tests.inference.test_release_cache import Shelf
from tests.sync.test_server_stream import Turns
from tests.waiting import eventually


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def make(served: ServedModel, shelf: Shelf, tmp_path: Path) -> Callable[..., ReleaseCache]:
    def make(capacity: int = 0, tenant_bytes: int = 2**26) -> ReleaseCache:
        return ReleaseCache(served, shelf.fetch, ReleaseFiles(tmp_path), capacity, tenant_bytes)

    return make


def _at(digest: str, tenant: str = "acme", name: str = "live") -> ChannelState:
    return ChannelState(tenant, name, ReleaseRef(1, digest))


def _halved(token: int) -> tuple[ScaleEdit, ...]:
    return (ScaleEdit((Cell(token, 1),), 0.5),)


def _many(digests: list[str], count: int) -> list[ChannelState]:
    """Channels of fifty tenants, each at one of these releases."""
    return [_at(digests[n % len(digests)], f"t{n % 50}", f"c{n}") for n in range(count)]


async def test_many_channels_are_staged_and_settled_in_many_short_turns_of_the_loop(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty thousand at once held a replica's streams for seconds. Counted in channels, not by a clock."""
    releases, turns, units = make(capacity=0), Turns(), Counter[int]()
    digests = [shelf.put(served, _halved(token)) for token in (5, 6, 7)]

    def counted(method: str) -> None:
        original = getattr(ReleaseCache, method)

        def count(self: ReleaseCache, *args: Any) -> Any:
            units[turns.now] += 1
            return original(self, *args)

        monkeypatch.setattr(ReleaseCache, method, count)

    for method in ("_stage", "_worth_keeping", "_unstage"):
        counted(method)
    channels = _many(digests, 20 * CHANGES_A_TURN)
    with turns.counted():
        for position, some in enumerate((channels[:-1], channels), 1):
            assert await releases.stage(tuple(channels)) == ()
            releases.swapped(StateView().changed(Position(1, position), some))
            assert set(digests) <= releases.resident(), "nothing is dropped meanwhile"
            await eventually(lambda: not releases.settling)
    assert units.total() > 4 * len(channels)
    assert max(units.values()) <= 2 * CHANGES_A_TURN
    assert releases.needed == releases.resident() == set(digests)
    releases.swapped(StateView().changed(Position(1, 3), _many(digests[:1], len(channels))))
    await eventually(lambda: not releases.settling)
    assert releases.needed == releases.resident() == {digests[0]}, "and what no channel is at goes"


async def test_a_view_that_comes_while_the_last_one_is_looked_through_counts(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    releases = make(capacity=0)
    digests = [shelf.put(served, _halved(token)) for token in (5, 6, 7)]
    channels = [_many([digest], 5 * CHANGES_A_TURN) for digest in digests]
    view = StateView()
    for position, some in enumerate(channels, 1):
        assert await releases.stage(tuple(some)) == ()
        view = view.changed(Position(1, position), some)
        releases.swapped(view)
        assert digests[position - 1] in releases.resident()
    await eventually(lambda: not releases.settling)
    assert releases.needed == releases.resident() == {digests[2]}


async def test_a_tenants_bytes_bound_many_channels_that_replace_each_other(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    """What is replaced doesn't count, though it is counted at first, in order to look through few channels."""
    topics = [shelf.put(served, (TopicEdit((7, n), 2),)) for n in range(8, 12)]
    probe = make()
    async with probe.use("acme", topics[0]) as overlay:
        size = overlay.nbytes
    releases = make(tenant_bytes=2 * size)
    assert await releases.stage(tuple(_at(topics[0], name=f"c{n}") for n in range(30))) == ()
    moved = tuple(_at(topics[1 + n // 15], name=f"c{n}") for n in range(30))
    refusals = await releases.stage(moved[:15])
    assert refusals == ()
    assert {r.reason for r in await releases.stage(moved[15:29])} == {"TENANT_TOO_LARGE"}, "c29 is at the first still"
    assert (
        await releases.stage((_at(topics[1], name="c29"), *(_at(topics[1], name=f"c{n}") for n in range(15, 29)))) == ()
    )
    assert await releases.stage(moved[15:]) == ()
