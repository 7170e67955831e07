"""int8: whole numbers from −127 to 127, and for each `BLOCK` of them a float32 that they are multiplied by.

A block of a weight, and of what it is multiplied with, are inputs of a product. A row of a sense table is its d values
and behind them the scales of its blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""As in kernels/cpp/vectors.h."""

_SCALE = 4  # bytes
_CHUNK = 4096
"""Rows of a table that are quantised at a time."""


def quantise(values: Tensor, limit: int = 127) -> tuple[Tensor, Tensor]:
    """values [..., n] in blocks, the last one filled up with zeros: whole numbers [..., blocks, BLOCK] float32, rounded
    to the nearest even, and what they are multiplied by, [..., blocks] float32.

    The greatest of a block becomes ±`limit`. The scale of one that holds NaN or ±∞ is NaN or ∞, so that no finite
    numbers come of it.
    """
    blocks = F.pad(values.float(), (0, -values.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    peak = blocks.abs().amax(-1)
    # Not `limit / peak`, which torch computes as limit · (1 / peak), rounded twice.
    inverse = torch.where(peak > 1e-30, torch.full_like(peak, limit) / peak, 0.0)
    # In double, rounded once: as by the instruction that multiplies and adds at once.
    rounded = (blocks.double() * inverse.double()[..., None]).round().nan_to_num(0.0, 0.0, 0.0)
    return rounded.float(), peak / limit


def round_in_blocks(values: Tensor, limit: int = 127) -> Tensor:
    """What is left of values [..., n] when they are quantised, float32."""
    whole, scales = quantise(values, limit)
    return (whole * scales[..., None]).flatten(-2)[..., : values.shape[-1]]


def stored_width(width: int, dtype: torch.dtype) -> int:
    """Elements of a stored row of `width` values."""
    return width + _SCALE * -(-width // BLOCK) if dtype is torch.int8 else width


def store(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Sense vectors [..., d] as a table of that dtype stores them, [..., stored_width(d)]."""
    if dtype is not torch.int8:
        return rows.to(dtype)
    width = rows.shape[-1]
    out = torch.empty(*rows.shape[:-1], stored_width(width, dtype), dtype=dtype)
    flat, to = rows.reshape(-1, width), out.view(-1, out.shape[-1])
    for part, row in zip(flat.split(_CHUNK), to.split(_CHUNK), strict=True):
        whole, scales = quantise(part)
        row[:, :width] = whole.flatten(1)[:, :width]
        row[:, width:] = scales.flatten().view(torch.int8).view(len(row), out.shape[-1] - width)
    return out


def restore(stored: Tensor) -> Tensor:
    """The sense vectors [..., d] of stored rows, float32: of float32 ones the rows themselves."""
    if stored.dtype is not torch.int8:
        return stored.float()
    count = -(-stored.shape[-1] // (BLOCK + _SCALE))
    width = stored.shape[-1] - count * _SCALE
    scales = stored[..., width:].flatten().clone().view(torch.float32).view(*stored.shape[:-1], count)  # aligned
    whole = stored[..., :width].float()
    if width % BLOCK:
        return whole * scales.repeat_interleave(BLOCK, -1)[..., :width]
    return whole.view(*scales.shape, BLOCK).mul_(scales[..., None]).flatten(-2)
