"""Products of the compiled library, their weights packed in the order in which they are read."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack_lm.int8 import BLOCK
from backpack_lm.kernels.huge_pages import Room

GROUP = 48
"""Outputs of one pass, as in cpp/product.h."""


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """x [N, in] → x·Wᵀ + b [N, out] by cpp/product.h: x is read in `dtype`, y written in `result`."""

    compute: Any
    packed: Tensor
    bias: Tensor
    inner: int
    outer: int
    gelu: bool
    dtype: torch.dtype
    result: torch.dtype

    @classmethod
    def of(
        cls,
        library: ctypes.CDLL,
        weight: Tensor,
        bias: Tensor,
        gelu: bool,
        dtype: torch.dtype,
        result: torch.dtype,
        room: Room,
    ) -> Product:
        """For weight [out, in], kept in `dtype`, in `room`."""
        compute = getattr(library, f"product_{name(dtype)}_{name(result)}")
        (outer, given), step = weight.shape, 4 // dtype.itemsize
        inner = -(-given // step) * step
        padded = _whole_groups(weight.detach().to(dtype), inner - given)
        # [out/48, in/s, 48, s] with s values in 4 bytes
        packed = room.copy(padded.unflatten(1, (-1, step)).unflatten(0, (-1, GROUP)).transpose(1, 2))
        return cls(compute, packed, _padded(bias), inner, outer, gelu, dtype, result)

    @classmethod
    def int8(
        cls,
        library: ctypes.CDLL,
        weight: Tensor,
        bias: Tensor,
        gelu: bool,
        int16_inputs: bool,
        dtype: torch.dtype,
        room: Room,
    ) -> Product:
        """For weight [out, in], kept in int8, from `dtype` to `dtype`; x is rounded to 8 bits, or with `int16_inputs`
        to 16."""
        kind = "product_of_int16" if int16_inputs else "product"
        compute = getattr(library, f"{kind}_int8_{name(dtype)}_{name(dtype)}")
        outer, inner = weight.shape
        return cls(compute, _in_blocks(library, weight, room), _padded(bias), inner, outer, gelu, dtype, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.inner > x.shape[1]:  # inputs that fill up the last 4 bytes
            x = F.pad(x, (0, self.inner - x.shape[1]))
        out = torch.empty(len(x), self.outer, dtype=self.result)
        self.compute(at(x), len(x), at(self.packed), at(self.bias), self.inner, self.outer, self.gelu, at(out))
        return out


def _whole_groups(weight: Tensor, inputs: int = 0) -> Tensor:
    """A weight [out, in] or a bias [out, 1], filled up with zeros to whole groups of outputs, and by so many inputs;
    itself if nothing is missing: torch would copy it."""
    missing = -len(weight) % GROUP
    return F.pad(weight, (0, inputs, 0, missing)) if missing or inputs else weight


def _padded(bias: Tensor) -> Tensor:
    return _whole_groups(bias.detach().float()[:, None])[:, 0].contiguous()


def _in_blocks(library: ctypes.CDLL, weight: Tensor, room: Room) -> Tensor:
    """A weight [out, in], quantised as by int8.py, as blocks of 48 outputs by 64 inputs, [out/48, in/64, 3264] uint8:
    each is the float32 scales of its outputs and then its weights plus 128, four of one output beside each other."""
    outer, inner = weight.shape
    packed = room.empty(-(-outer // GROUP), -(-inner // BLOCK), GROUP * (4 + BLOCK), dtype=torch.uint8)
    given = weight.detach().float().contiguous()
    library.pack_int8(at(given), outer, inner, at(packed))
    return packed


def at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
