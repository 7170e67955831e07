"""A sense table along one direction: one pass over it as it is stored, without a copy in float32."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from backpack_lm.int8 import restore
from backpack_lm.kernels.build import NotBuilt, library
from backpack_lm.kernels.products import at, name

CHUNK = 16_384
"""Rows that torch reads at a time, where there is no library."""


def project(rows: Tensor, direction: Tensor) -> Tensor:
    """v·direction for each row v of a table on a CPU: rows [..., stored_width(d)] as stored, direction [d] float32 →
    [...] float32. By the library, or by torch where there is none."""
    try:
        compiled = library()
    except NotBuilt:
        return project_plainly(rows, direction)
    rows, direction = rows.contiguous(), direction.float().contiguous()
    out = torch.empty(rows.shape[:-1])
    scan = getattr(compiled, f"project_{name(rows.dtype)}")
    count = ctypes.c_int64(out.numel())
    scan(at(rows), count, len(direction), at(direction), torch.get_num_threads(), at(out))
    return out


def project_plainly(rows: Tensor, direction: Tensor) -> Tensor:
    """The same by torch alone: the oracle."""
    parts = rows.flatten(0, -2).split(CHUNK)
    return torch.cat([restore(part) @ direction.float() for part in parts]).view(rows.shape[:-1])
