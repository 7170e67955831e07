"""Products of the compiled library, their weights packed in the order in which they are read."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack_lm.kernels.huge_pages import Room

GROUP = 48
"""Outputs of one pass, as in cpp/product.h."""


class Product:
    """x [N, in] → x·Wᵀ + b [N, out] by cpp/product.h, for weight [out, in]."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Tensor,
        bias: Tensor,
        gelu: bool,
        dtype: torch.dtype,
        result: torch.dtype,
        room: Room,
    ) -> None:
        self._compute = getattr(library, f"product_{name(dtype)}_{name(result)}")
        (self._outer, given), step = weight.shape, 4 // dtype.itemsize
        self._inner = -(-given // step) * step
        self._added = self._inner - given
        self._gelu, self._dtype, self._result = gelu, dtype, result
        whole = -(-self._outer // GROUP) * GROUP
        padded, self.bias = torch.zeros(whole, self._inner, dtype=dtype), torch.zeros(whole)
        padded[: self._outer, :given], self.bias[: self._outer] = weight.detach(), bias.detach()
        # [out/48, in/s, 48, s] with s values in 4 bytes
        self.packed = room.copy(padded.view(-1, GROUP, self._inner // step, step).transpose(1, 2))

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        if self._added:  # inputs that fill up the last 4 bytes
            x = F.pad(x, (0, self._added))
        out = torch.empty(len(x), self._outer, dtype=self._result)
        self._compute(at(x), len(x), at(self.packed), at(self.bias), self._inner, self._outer, self._gelu, at(out))
        return out


def at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
