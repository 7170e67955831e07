"""Numbers as int8 in blocks that share a scale."""

from __future__ import annotations

import pytest
import torch
from backpack_lm.int8 import BLOCK, quantise, restore, round_in_blocks, store, stored_width


@pytest.mark.parametrize("width", [1, 60, 64, 65, 768])
def test_what_is_restored_is_off_by_half_a_step_of_its_block_at_most(width: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 5, width) * torch.logspace(-3, 3, 15).view(3, 5, 1)
    stored = store(rows, torch.int8)
    assert stored.shape == (3, 5, stored_width(width, torch.int8))
    found = restore(stored)
    assert found.shape == rows.shape
    for start in range(0, width, BLOCK):
        part = rows[..., start : start + BLOCK]
        step = part.abs().amax(-1, keepdim=True) / 127
        assert bool(((found[..., start : start + BLOCK] - part).abs() <= 0.5001 * step).all())
    assert torch.equal(found, round_in_blocks(rows))
    torch.testing.assert_close(restore(store(found, torch.int8)), found, rtol=1e-6, atol=0)


def test_zeros_stay_zeros_and_no_rows_none() -> None:
    assert not restore(store(torch.zeros(2, 70), torch.int8)).any()
    assert restore(store(torch.empty(0, 70), torch.int8)).shape == (0, 70)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_no_finite_numbers_come_of_a_block_that_has_others(wrong: float) -> None:
    rows = torch.ones(2, 2 * BLOCK)
    rows[0, 3] = wrong
    found = restore(store(rows, torch.int8))
    assert not found[0, :BLOCK].isfinite().any()
    torch.testing.assert_close(found[0, BLOCK:], rows[0, BLOCK:])
    torch.testing.assert_close(found[1], rows[1])


def test_other_dtypes_are_stored_as_they_are() -> None:
    rows = torch.randn(4, 7)
    assert restore(store(rows, torch.float32)).data_ptr() == rows.data_ptr()
    assert torch.equal(restore(store(rows, torch.bfloat16)), rows.bfloat16().float())
    assert stored_width(7, torch.bfloat16) == 7


def test_rounding_is_to_the_nearest_even() -> None:
    whole, scales = quantise(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert whole[0, 0, :6].tolist() == [127, 0, 2, 2, 0, -2]
    assert scales.tolist() == [[1.0]]
