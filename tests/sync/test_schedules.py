"""Seeded schedules of everything that can go wrong between the service and its readers."""

from __future__ import annotations

import pytest

from tests.sync.simulator import Dice, World


def run(seed: int, dice: Dice | None = None, seconds: float = 20) -> World:
    world = World(seed, dice=dice)
    world.trouble(seconds)
    world.settle()
    return world


@pytest.mark.parametrize("seed", range(60))
def test_p6_p9_readers_hold_what_the_history_says_and_catch_up(seed: int) -> None:
    world = run(seed)
    assert world.history.head.revision > 20
    assert world.counts["Ack"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(30))
def test_p6_p9_readers_hold_what_the_history_says_and_catch_up_thousands(hundred: int) -> None:
    for seed in range(1000 + 100 * hundred, 1100 + 100 * hundred):
        run(seed)
