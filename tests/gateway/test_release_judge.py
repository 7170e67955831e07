"""In which order a gateway has new releases judged."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from backpack_serving.gateway import release_judge
from backpack_serving.gateway.release_judge import MOST_MISSED, NOTHING, ReleaseJudge
from backpack_serving.references import Pin, Position, ReleaseRef
from backpack_serving.sync.state import RecentRelease, StateView


class Store:
    """A view that moves when a test says so, and releases that are called by their numbers."""

    def __init__(self) -> None:
        self.client, self._moved = SimpleNamespace(view=StateView()), asyncio.Event()

    def next_view(self) -> asyncio.Event:
        return self._moved

    def make(self, *releases: tuple[str, int]) -> None:
        changes = [RecentRelease(tenant, ReleaseRef(number, f"{number:064x}")) for tenant, number in releases]
        self.client.view = self.client.view.changed(Position(1, 1), changes)
        self._moved.set()
        self._moved = asyncio.Event()

    async def pin(self, tenant: str, numbers: list[int]) -> list[Pin]:
        if tenant == "broken":
            raise RuntimeError("a mistake of ours")
        return [Pin(tenant, "", number, f"{number:064x}", 1, 1) for number in numbers]


async def judged_after(store: Store, monkeypatch: pytest.MonkeyPatch, *changes: list[tuple[str, int]]) -> list[str]:
    judge: Any = ReleaseJudge(store, store, None, None, "key")  # type: ignore[arg-type]
    order: list[str] = []

    async def judge_and_report(pin: Pin) -> None:
        order.append(f"{pin.tenant}{pin.release}")

    judge._judge_and_report = judge_and_report
    monkeypatch.setattr(release_judge, "DELAY", 0.0)
    running = asyncio.create_task(judge.run())
    await asyncio.sleep(0)
    for change in changes:
        store.make(*change)
        for _ in range(100):
            await asyncio.sleep(0)
    running.cancel()
    return order


async def test_a_tenant_that_makes_many_releases_does_not_hold_up_another(monkeypatch: pytest.MonkeyPatch) -> None:
    order = await judged_after(Store(), monkeypatch, [("a", 4), ("b", 1)])
    assert order == ["a4", "b1", "a3", "a2", "a1"]


async def test_each_release_once_and_of_a_burst_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    store.make(("a", 5))
    order = await judged_after(store, monkeypatch, [("a", 5)], [("a", 7)], [("a", 7)], [("a", 40)])
    assert order == ["a7", "a6", *(f"a{number}" for number in range(40, 40 - MOST_MISSED, -1))]


async def test_a_release_whose_caller_left_is_judged_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_judge, "DELAY", 0.0)
    monkeypatch.setattr(release_judge, "LOOK_AGAIN", 0.01)
    store, judged = Store(), asyncio.Event()
    judge: Any = ReleaseJudge(store, store, None, None, "key")  # type: ignore[arg-type]

    async def judge_and_report(pin: Pin) -> None:
        judged.set()

    judge._judge_and_report = judge_and_report
    running = asyncio.create_task(judge.run())
    (pin,) = await store.pin("a", [1])
    assert judge.claim(pin), "a caller asks for it"
    store.make(("a", 1))
    await asyncio.sleep(0.05)
    assert not judged.is_set()
    judge.give_up(pin, again=True)
    async with asyncio.timeout(5):
        await judged.wait()
    running.cancel()


async def test_a_tenant_whose_release_takes_long_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_judge, "DELAY", 0.0)
    store, order, for_ever = Store(), [], asyncio.Event()
    judge: Any = ReleaseJudge(store, store, None, None, "key")  # type: ignore[arg-type]

    async def judge_and_report(pin: Pin) -> None:
        order.append(f"{pin.tenant}{pin.release}")
        if pin.tenant == "slow":
            await for_ever.wait()

    judge._judge_and_report = judge_and_report
    running = asyncio.create_task(judge.run())
    await asyncio.sleep(0)
    store.make(("slow", 2), ("b", 1))
    for _ in range(100):
        await asyncio.sleep(0)
    assert order == ["slow2", "b1"], "and the slow tenant's other release waits"
    running.cancel()


async def test_a_mistake_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    order = await judged_after(Store(), monkeypatch, [("broken", 1)], [("a", 1)])
    assert order == ["a1"]


def test_what_needs_no_judgement_is_claimed_by_nobody() -> None:
    judge = ReleaseJudge(None, None, None, None, "key")  # type: ignore[arg-type]
    release = Pin("a", "", 1, "11" * 32, 1, 1)
    assert judge.claim(release)
    assert not judge.claim(release)
    judge.give_up(release)
    assert judge.claim(release)
    assert not judge.claim(Pin("a", "", 2, NOTHING, 1, 1))
    assert not judge.claim(Pin("a", "", 3, "22" * 32, 1, 1, draft="33" * 32))
