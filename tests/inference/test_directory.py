"""Who lives: reports, silence, and what watchers see."""

from __future__ import annotations

import asyncio

from backpack_proto.v1.directory_pb2 import Replica
from backpack_serving.inference.directory import SILENCE, Directory

from tests.conftest import Clock


def _ids(replicas: list[Replica]) -> list[str]:
    return [replica.id for replica in replicas]


async def test_the_silent_are_dropped() -> None:
    clock = Clock()
    directory = Directory(clock)
    directory.report(Replica(id="a"))
    clock.now = SILENCE - 1
    directory.report(Replica(id="b"))
    assert _ids(directory.replicas()) == ["a", "b"]
    clock.now = SILENCE + 1
    assert _ids(directory.replicas()) == ["b"]


async def test_watchers_learn_of_a_change_at_once() -> None:
    directory = Directory()
    watch = directory.watch()
    assert await anext(watch) == []
    following = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    directory.report(Replica(id="a", running=1))
    assert _ids(await asyncio.wait_for(following, 60)) == ["a"]
    await watch.aclose()
