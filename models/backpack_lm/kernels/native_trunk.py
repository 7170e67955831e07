"""The trunk in one call of the compiled library: at batch 1, Python between its operations took half of a step."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backpack_lm.kernels import structs
from backpack_lm.kernels.caches import Caches, StepInput, TokenSpan
from backpack_lm.kernels.interface import Linear
from backpack_lm.kernels.products import Product, at, name
from backpack_lm.kernels.structs import SpanArray
from backpack_lm.kernels.trunk import Layer, TrunkWeights

PARTS = ("qkv", "attention", "proj", "fc", "out", "residual and LayerNorm", "sense weights")
"""What `NativeTrunk.seconds` counts, as in cpp/trunk.h."""


class NativeTrunk:
    """The same as `CachedTrunk`, to the last bit, for weights whose products are all the library's own."""

    def __init__(self, library: ctypes.CDLL, caches: Caches, weights: TrunkWeights, spans: SpanArray) -> None:
        """`spans` is shared with the kernels, whose other operations read the same spans in the same step."""
        self._weights, self._caches, self._spans = weights, caches, spans
        self._dtype, kind = caches.dtype, name(caches.dtype)
        self._compute = getattr(library, f"trunk_int8_{kind}" if caches.table.dtype is torch.int8 else f"trunk_{kind}")
        self.seconds = torch.zeros(len(PARTS), dtype=torch.float64)
        """What each of `PARTS` has taken so far."""
        config, layers = weights.config, weights.layers
        self._layers = (structs.LayerTable * len(layers))(
            *(self._layer_table(n, layer) for n, layer in enumerate(layers))
        )
        self._state = structs.TrunkState(
            self._layers, _matrix(weights.sense_weights), _norm(weights.first),
            at(weights.tokens), at(weights.positions), at(caches.sense_keys), at(self.seconds),
            len(layers), config.n_embd, config.n_head, config.num_senses, caches.ids.shape[1], weights.first.eps,
        )  # fmt: skip

    def __call__(self, new: StepInput, spans: Sequence[TokenSpan]) -> Tensor:
        config, count = self._weights.config, len(new.tokens)
        tokens = structs.NewTokens(at(new.tokens), at(new.slots), at(new.positions))
        scratch = torch.empty(count, 7 * config.n_embd)
        queries = torch.empty(count, config.num_senses, config.sense_head_width, dtype=self._dtype)
        self._compute(
            ctypes.byref(self._state), ctypes.byref(tokens), count, self._spans.pointer(spans), len(spans),
            at(scratch), at(queries),
        )  # fmt: skip
        return queries

    def _layer_table(self, n: int, layer: Layer) -> structs.LayerTable:
        products = (_matrix(product) for product in (layer.qkv, layer.proj, layer.fc, layer.out))
        norms = (_norm(layer.middle), _norm(layer.after))
        return structs.LayerTable(*products, *norms, at(self._caches.keys[n]), at(self._caches.values[n]), layer.scale)


def _matrix(linear: Linear) -> structs.Matrix:
    assert isinstance(linear, Product), f"{linear} isn't the library's"
    return structs.Matrix(at(linear.packed), at(linear.bias))


def _norm(norm: nn.LayerNorm) -> structs.Norm:
    return structs.Norm(at(norm.weight), at(norm.bias))
