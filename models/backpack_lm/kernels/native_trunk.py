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
from backpack_lm.kernels.trunk import PreparedLayer, TrunkWeights

PARTS = ("qkv", "attention", "proj", "fc", "out", "residual and norm", "sense weights")
"""What `NativeTrunk.seconds` counts, as in cpp/trunk.h."""


class NativeTrunk:
    """The same as `CachedTrunk`, to the last bit, for weights whose products are all the library's own."""

    def __init__(
        self,
        library: ctypes.CDLL,
        caches: Caches,
        weights: TrunkWeights,
        pages: structs.PageTable,
        spans: SpanArray,
    ) -> None:
        """`spans` is shared with the kernels, whose other operations read the same spans in the same step."""
        self._weights, self._caches, self._spans = weights, caches, spans
        self._dtype, kind = caches.dtype, name(caches.dtype)
        self._compute = getattr(library, f"trunk_int8_{kind}" if caches.table.dtype is torch.int8 else f"trunk_{kind}")
        self.seconds = torch.zeros(len(PARTS), dtype=torch.float64)
        """What each of `PARTS` has taken so far."""
        config, trunk, layers = weights.config, weights.config.trunk, weights.layers
        shape, queried, keyed = trunk.layer, *config.read_layers
        self._layers = (structs.LayerTable * len(layers))(
            *(self._layer_table(n, layer) for n, layer in enumerate(layers))
        )
        taps = self._taps()
        self._tapped = (structs.Tap * len(taps))(*taps)
        matrices = weights.together, *(weights.separate or (None, None))
        self._state = structs.TrunkState(
            self._layers, self._tapped, *map(_matrix, matrices), _norm(weights.first),
            at(weights.tokens), _address(weights.positions), _address(weights.turns), _address(weights.sense_turns),
            at(caches.sense_keys), at(self.seconds), pages,
            len(layers), trunk.width, shape.heads, shape.kv_heads, shape.head_width, shape.inner, shape.gated,
            config.num_senses, config.sense_head_width, len(taps), len(queried), len(keyed), trunk.epsilon,
        )  # fmt: skip
        self._scratch = _scratch_of(weights)

    def __call__(self, new: StepInput, spans: Sequence[TokenSpan]) -> Tensor:
        config, count = self._weights.config, len(new.tokens)
        tokens = structs.NewTokens(at(new.tokens), at(new.slots), at(new.positions))
        scratch = torch.empty(count, self._scratch)
        queries = torch.empty(count, config.num_senses, config.sense_head_width, dtype=self._dtype)
        self._compute(
            ctypes.byref(self._state), ctypes.byref(tokens), count, self._spans.pointer(spans), len(spans),
            at(scratch), at(queries),
        )  # fmt: skip
        return queries

    def _taps(self) -> list[structs.Tap]:
        """The states that the sense weights read, by their layers; none if all is made from the last."""
        if self._weights.together is not None:
            return []
        queried, keyed = self._weights.config.read_layers
        return [
            structs.Tap(_norm(self._weights.norms.get(layer)), layer, _index(queried, layer), _index(keyed, layer))
            for layer in sorted({*queried, *keyed})
        ]

    def _layer_table(self, n: int, layer: PreparedLayer) -> structs.LayerTable:
        products = (_matrix(product) for product in (layer.qkv, layer.proj, layer.fc, layer.out))
        norms = (_norm(layer.middle), _norm(layer.after))
        return structs.LayerTable(*products, *norms, at(self._caches.keys[n]), at(self._caches.values[n]), layer.scale)


def _scratch_of(weights: TrunkWeights) -> int:
    """Floats of a new token's scratch, as cpp/trunk.h divides it."""
    config, d = weights.config, weights.config.n_embd
    layer, keyed = config.trunk.layer, config.num_senses * config.sense_head_width
    widest = max(layer.qkv_width, (2 if layer.gated else 1) * layer.inner, 2 * keyed)
    states = 0 if weights.together is not None else sum(map(len, config.read_layers)) * d
    return 2 * d + max(d, layer.heads * layer.head_width) + widest + layer.gated * layer.inner + states


def _index(layers: tuple[int, ...], layer: int) -> int:
    return layers.index(layer) if layer in layers else -1


def _matrix(linear: Linear | None) -> structs.Matrix:
    if linear is None:
        return structs.Matrix()
    assert isinstance(linear, Product), f"{linear} isn't the library's"
    return structs.Matrix(at(linear.packed), at(linear.bias))


def _norm(norm: nn.Module | None) -> structs.Norm:
    if norm is None:
        return structs.Norm()
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    return structs.Norm(at(norm.weight), at(norm.bias) if isinstance(norm, nn.LayerNorm) else None)


def _address(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else at(tensor)
