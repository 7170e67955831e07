"""What long commands say of their progress where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from backpack_serving.cli import experiment

from tests.conftest import Clock

HALF_MINUTES = (("2 of 8", "2 minutes"), ("4 of 8", "80 s"), ("6 of 8", "40 s"))


@pytest.mark.parametrize(
    ("items", "total", "says"),
    [
        (range(8), None, [f"words: {done}, about {left} left" for done, left in HALF_MINUTES]),
        ((n for n in range(4)), None, ["words: 2 after 40 s", "words: 4 after 80 s"]),
        (range(3), 100, ["words: 2 of 100, about 33 minutes left"]),
    ],
)
def test_a_line_every_half_minute_says_how_far_it_is(
    items: Iterable[int],
    total: int | None,
    says: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    clock = Clock()
    monkeypatch.setattr("backpack_serving.cli.experiment.time.monotonic", lambda: clock.now)
    with experiment.ProgressWatch() as watch:
        for _ in watch(items, "words", total):
            clock.now += 20
    lines = capsys.readouterr().err.splitlines()
    assert lines == says


def test_a_short_loop_says_nothing(capsys: Any) -> None:
    with experiment.ProgressWatch() as watch:
        assert list(watch(range(3), "words")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
