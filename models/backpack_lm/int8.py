"""int8: whole numbers from −127 to 127, and for each group of them a float32 that they are multiplied by.

Of weights, and of what they are multiplied with, a group are `BLOCK` inputs; of a sense table it is a row, which then
is its d values and behind them the 4 bytes of its scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Inputs of a product that share a scale, as in kernels/cpp/product.h."""

SCALE = 4
"""Bytes behind the values of a row of a sense table."""

_CHUNK = 4096
"""Rows of a table that are quantised at a time."""


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """values [..., n] as int8 [..., n], rounded to the nearest even, with the scales of the groups of n [...] float32.

    The largest of a group becomes ±127. The scale of one that holds NaN or ±∞ is NaN or ∞, so no finite numbers come
    of it.
    """
    peak = values.float().abs().amax(-1)
    inverse = torch.where(peak > 1e-30, 127 / peak, 0.0)
    # In double, rounded once: as by the instruction that multiplies and adds at once.
    rounded = (values.double() * inverse.double()[..., None]).round().nan_to_num(0.0, 0.0, 0.0)
    return rounded.to(torch.int8), peak / 127


def round_in_blocks(values: Tensor) -> Tensor:
    """values [..., n] as a product of int8 reads them, float32: quantised in groups of `BLOCK`, the last one shorter."""
    count = values.shape[-1]
    small, scales = quantise(F.pad(values.float(), (0, -count % BLOCK)).unflatten(-1, (-1, BLOCK)))
    return (small * scales[..., None]).flatten(-2)[..., :count]


def stored_width(width: int, dtype: torch.dtype) -> int:
    """Elements of a stored row of `width` values."""
    return width + SCALE if dtype is torch.int8 else width


def store(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Sense vectors [..., d] as a table of that dtype stores them, [..., stored_width(d)]."""
    if dtype is not torch.int8:
        return rows.to(dtype)
    out = torch.empty(*rows.shape[:-1], stored_width(rows.shape[-1], dtype), dtype=dtype)
    flat, to = rows.reshape(-1, rows.shape[-1]), out.view(-1, out.shape[-1])
    for part, row in zip(flat.split(_CHUNK), to.split(_CHUNK), strict=True):
        small, scales = quantise(part)
        row[:, :-SCALE], row[:, -SCALE:] = small, scales[:, None].view(torch.int8)
    return out


def restore(stored: Tensor) -> Tensor:
    """The sense vectors [..., d] of stored rows, float32: of float32 ones the rows themselves."""
    if stored.dtype is not torch.int8:
        return stored.float()
    scales = stored[..., -SCALE:].contiguous().view(torch.float32)  # [..., 1]
    return stored[..., :-SCALE] * scales
