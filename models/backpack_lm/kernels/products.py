"""Products of the compiled library, their weights packed in the order in which they are read."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

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
    ) -> None:
        """Raises AttributeError if the processor hasn't what this needs, ValueError if `in` is odd."""
        self._compute = getattr(library, f"product_{name(dtype)}_{name(result)}")
        (self._outer, self._inner), step = weight.shape, 4 // dtype.itemsize
        if self._inner % step:
            raise ValueError(f"{self._inner} inputs of {dtype} are no whole number of 4 bytes")
        self._gelu, self._dtype, self._result = gelu, dtype, result
        whole = -(-self._outer // GROUP) * GROUP
        padded, self.bias = torch.zeros(whole, self._inner, dtype=dtype), torch.zeros(whole)
        padded[: self._outer], self.bias[: self._outer] = weight.detach(), bias.detach()
        # [out/48, in/s, 48, s] with s values in 4 bytes
        self.packed = padded.view(-1, GROUP, self._inner // step, step).transpose(1, 2).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        x, out = x.to(self._dtype), torch.empty(len(x), self._outer, dtype=self._result)
        self._compute(at(x), len(x), at(self.packed), at(self.bias), self._inner, self._outer, self._gelu, at(out))
        return out


def at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
