"""The denominators of topic scores are the greatest products, and no damaged file's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backpack_lm import denominators
from backpack_lm.denominators import ProgressLog, compute
from torch import Tensor

V, K, D = 50, 3, 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one; and blocks of 7 tokens and 20 words."""
    monkeypatch.setattr(denominators, "folder", lambda name: tmp_path)
    monkeypatch.setattr(denominators, "CELLS", 7 * K)
    monkeypatch.setattr(denominators, "WORDS", 20)
    return tmp_path


class Senses:
    """Random vectors, and how often they were asked for."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.rows, self.embedding = torch.randn(V, K, D, generator=draw), torch.randn(V, D, generator=draw)
        self.asked = 0

    def __call__(self, part: slice) -> Tensor:
        self.asked += 1
        return self.rows[part]

    @property
    def greatest(self) -> Tensor:
        return (self.rows @ self.embedding.t()).amax(-1)

    def compute(self, progress: Callable[[int, int], None] | None = None) -> Tensor:
        return compute(self, (V, K), self.embedding, "model.float32", progress)


@pytest.fixture
def senses() -> Senses:
    return Senses()


def test_they_are_the_greatest_products_of_all_words(senses: Senses) -> None:
    torch.testing.assert_close(compute(senses, (V, K), senses.embedding), senses.greatest)


def test_rounded_products_only_say_which_word_it_is(senses: Senses, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 itself is off by as much as 0.4 %."""
    monkeypatch.setattr(denominators, "WORTH_ROUNDING", 0)
    monkeypatch.setattr(denominators.processor, "multiplies_bfloat16", lambda: True)
    found = compute(senses, (V, K), senses.embedding)
    off = (found - senses.greatest).abs() / senses.greatest
    assert off.max() < 0.01
    assert off.median() < 1e-6


def test_what_was_computed_is_read(senses: Senses) -> None:
    first = senses.compute()
    assert senses.asked == 8
    assert torch.equal(senses.compute(), first)
    assert senses.asked == 8


def test_stopped_work_is_gone_on_with(senses: Senses) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, of: int) -> None:
        if done >= 21:
            raise Stopped

    with pytest.raises(Stopped):
        senses.compute(stop)
    assert senses.asked == 3
    torch.testing.assert_close(senses.compute(), senses.greatest)
    assert senses.asked == 8


@pytest.mark.parametrize("length", [5, 300, 301])
def test_a_file_that_was_cut_off_is_gone_on_with_from_its_last_whole_block(
    senses: Senses, cache: Path, length: int
) -> None:
    senses.compute()
    file = cache / "model.float32"
    file.write_bytes(file.read_bytes()[:length])
    torch.testing.assert_close(senses.compute(), senses.greatest)
    torch.testing.assert_close(senses.compute(), senses.greatest)
    assert senses.asked == 8 + 8 - length // (4 * 7 * K + 32)


def test_a_damaged_block_is_computed_again(senses: Senses, cache: Path) -> None:
    senses.compute()
    file = cache / "model.float32"
    data = bytearray(file.read_bytes())
    data[130] ^= 1
    file.write_bytes(data)
    torch.testing.assert_close(senses.compute(), senses.greatest)


def test_where_nothing_can_be_kept_they_are_computed_all_the_same(
    senses: Senses, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> Path:
        raise PermissionError(name)

    monkeypatch.setattr(denominators, "folder", refuse)
    torch.testing.assert_close(senses.compute(), senses.greatest)


def test_a_full_disk_ends_nothing(senses: Senses, cache: Path) -> None:
    """Neither one that takes nothing, nor one that took a little."""
    (cache / "model.float32").symlink_to("/dev/full")
    torch.testing.assert_close(senses.compute(), senses.greatest)


def test_how_long_it_takes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """From the rate so far; not after each block, nor of what is over in seconds."""
    times = iter((0.0, 10.0, 11.0, 40.0, 89.0))
    told = ProgressLog(lambda: next(times))
    for done in (100, 200, 210, 500, 990):  # the first were there already
        told(done, 1000)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
        "20 %, about 80 seconds left",
        "50 %, about 50 seconds left",
    ]
    assert told.seconds_left == pytest.approx(1.0)
