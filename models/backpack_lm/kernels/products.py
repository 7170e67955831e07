"""Products of the compiled library, their weights packed in the order in which they are read."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack_lm.int8 import BLOCK, quantise

GROUP = 48
"""Outputs of one pass, as in cpp/product.h."""


class Product:
    """x [N, in] → x·Wᵀ + b [N, out] by cpp/product.h, for weight [out, in].

    x is read in `dtype`, and returned as `result`; weights are in `dtype` too, or int8.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Tensor,
        bias: Tensor,
        gelu: bool,
        dtype: torch.dtype,
        result: torch.dtype,
        int8: bool = False,
    ) -> None:
        kind = f"{name(dtype)}_{name(result)}"
        self._compute = getattr(library, f"product_int8_{kind}" if int8 else f"product_{kind}")
        (self._outer, given), step = weight.shape, 1 if int8 else 4 // dtype.itemsize
        self._inner = -(-given // step) * step
        self._added = self._inner - given
        self._gelu, self._dtype, self._result = gelu, dtype, result
        whole = -(-self._outer // GROUP) * GROUP
        self.bias = torch.zeros(whole)
        self.bias[: self._outer] = bias.detach()
        if int8:
            self.packed = packed_blocks(weight.detach())
            return
        padded = torch.zeros(whole, self._inner, dtype=dtype)
        padded[: self._outer, :given] = weight.detach()
        # [out/48, in/s, 48, s] with s values in 4 bytes
        self.packed = padded.view(-1, GROUP, self._inner // step, step).transpose(1, 2).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        if self._added:  # inputs that fill up the last 4 bytes
            x = F.pad(x, (0, self._added))
        out = torch.empty(len(x), self._outer, dtype=self._result)
        self._compute(at(x), len(x), at(self.packed), at(self.bias), self._inner, self._outer, self._gelu, at(out))
        return out


def packed_blocks(weight: Tensor) -> Tensor:
    """A weight [out, in] as blocks of 48 outputs by 64 inputs [out/48, in/64, 3264] uint8, each the float32 scales of
    its outputs and then its weights, four of one output beside each other, plus 128."""
    outer, inner = weight.shape
    blocks = []
    for rows in F.pad(weight.float(), (0, -inner % BLOCK, 0, -outer % GROUP)).split(GROUP * 64):
        small, scales = quantise(rows.view(-1, GROUP, rows.shape[1] // BLOCK, BLOCK))  # [G, 48, B, 64], [G, 48, B]
        weights = (small.view(torch.uint8) ^ 128).unflatten(-1, (-1, 4)).permute(0, 2, 3, 1, 4)
        blocks.append(torch.cat([scales.mT.contiguous().view(torch.uint8), weights.flatten(2)], -1))
    return torch.cat(blocks)


def at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
