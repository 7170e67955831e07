"""The trunk in one call of the compiled library: of a step at batch 1, half was Python between its operations."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from backpack_lm.kernels.build import library
from backpack_lm.kernels.caches import StepInput, TokenSpan
from backpack_lm.kernels.interface import Linear
from backpack_lm.kernels.products import Product, name
from backpack_lm.kernels.trunk import CachedTrunk, Layer
from backpack_lm.model import Backpack

if TYPE_CHECKING:
    from backpack_lm.kernels.native import NativeKernels

PARTS = ("qkv", "attention", "proj", "fc", "out", "residual and LayerNorm", "sense weights")
"""What `NativeTrunk.seconds` counts, as in cpp/trunk.h."""


class _Pair(ctypes.Structure):
    """Weights and bias, or gain and bias."""

    _fields_ = (("first", ctypes.c_void_p), ("second", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((field, _Pair) for field in ("qkv", "proj", "fc", "out", "middle", "after")),
        *(("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("scale", ctypes.c_float)),
    )


class _Trunk(ctypes.Structure):
    _fields_ = (
        *(("layers", ctypes.POINTER(_Layer)), ("sense_weights", _Pair), ("first", _Pair)),
        *((field, ctypes.c_void_p) for field in ("tokens", "positions", "sense_keys", "seconds")),
        *((field, ctypes.c_int) for field in ("count", "width", "heads", "senses", "context")),
        ("epsilon", ctypes.c_float),
    )


class _New(ctypes.Structure):
    _fields_ = tuple((field, ctypes.c_void_p) for field in ("tokens", "slots", "positions"))


class NativeTrunk(CachedTrunk):
    """For kernels whose products are all the library's own."""

    kernels: NativeKernels

    def __init__(self, kernels: NativeKernels, model: Backpack) -> None:
        """For a model for which `kernels.has_trunk`."""
        super().__init__(kernels, model)
        caches, config = kernels.caches, model.config
        self._dtype = caches.table.dtype
        self._compute = getattr(library(), f"trunk_{name(self._dtype)}")
        self.seconds = torch.zeros(len(PARTS), dtype=torch.float64)
        """What each of `PARTS` has taken so far."""
        self._layers = (_Layer * len(self.layers))(
            *(self._layer_table(n, layer) for n, layer in enumerate(self.layers))
        )
        self._state = _Trunk(
            self._layers, _packed_product(self.sense_weights), _norm_pointers(self.first),
            self.tokens.data_ptr(), self.positions.data_ptr(), caches.sense_keys.data_ptr(),
            self.seconds.data_ptr(),
            len(self.layers), config.n_embd, config.n_head, config.num_senses, caches.ids.shape[1],
            self.first.eps,
        )  # fmt: skip

    def __call__(self, new: StepInput, runs: Sequence[TokenSpan]) -> Tensor:
        config, count = self.config, len(new.tokens)
        places = _New(new.tokens.data_ptr(), new.slots.data_ptr(), new.positions.data_ptr())
        scratch = torch.empty(count, 7 * config.n_embd)
        queries = torch.empty(count, config.num_senses, config.sense_head_width, dtype=self._dtype)
        self._compute(
            ctypes.byref(self._state), ctypes.byref(places), count, self.kernels.described(runs), len(runs),
            ctypes.c_void_p(scratch.data_ptr()), ctypes.c_void_p(queries.data_ptr()),
        )  # fmt: skip
        return queries

    def _layer_table(self, n: int, layer: Layer) -> _Layer:
        products = (_packed_product(p) for p in (layer.qkv, layer.proj, layer.fc, layer.out))
        keys, values = self.kernels.caches.keys[n], self.kernels.caches.values[n]
        norms = (_norm_pointers(layer.middle), _norm_pointers(layer.after))
        return _Layer(*products, *norms, keys.data_ptr(), values.data_ptr(), layer.scale)


def _packed_product(linear: Linear) -> _Pair:
    assert isinstance(linear, Product), f"{linear} isn't the library's"
    return _Pair(linear.packed.data_ptr(), linear.bias.data_ptr())


def _norm_pointers(norm: nn.LayerNorm) -> _Pair:
    return _Pair(norm.weight.data_ptr(), norm.bias.data_ptr())
