"""Weights in huge pages: copies that are whole, apart from each other, and where registers like to read."""

from __future__ import annotations

import torch
from backpack_lm.kernels import huge_pages
from backpack_lm.kernels.huge_pages import Room


def test_copies_are_whole_apart_and_aligned() -> None:
    room, draw = Room(), torch.Generator().manual_seed(0)
    kinds = ((torch.float32, (3, 5)), (torch.bfloat16, (7,)), (torch.bfloat16, (64, 96)), (torch.float32, (1, 1)))
    given = [torch.randn(shape, generator=draw).to(dtype) for dtype, shape in kinds]
    copies = [room.copy(tensor) for tensor in given]
    for tensor, copied in zip(given, copies, strict=True):
        assert torch.equal(tensor, copied)
        assert copied.is_contiguous()
        assert copied.dtype == tensor.dtype
        assert copied.data_ptr() % huge_pages.LINE == 0
    copies[0].zero_()
    assert torch.equal(given[1], copies[1])


def test_a_tensor_larger_than_a_chunk_and_one_that_is_turned() -> None:
    room = Room()
    large = torch.arange(huge_pages.CHUNK // 4 + 1, dtype=torch.int32)
    assert torch.equal(room.copy(large), large)
    turned = torch.arange(6).view(2, 3).t()
    assert room.copy(turned).is_contiguous()
    assert torch.equal(room.copy(turned), turned)
