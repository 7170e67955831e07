"""The operations on a CPU: our own library, and oneDNN's packed products where they are the faster ones (AMX).

The library is compiled once for a machine, from cpp/ by its C++ compiler, and kept in a cache folder. Its
results, like those of oneDNN's packed products, don't depend on what else is in a batch, to the last bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from backpack_lm import processor
from backpack_lm.config import BackpackConfig
from backpack_lm.kernels import structs
from backpack_lm.kernels.build import NotBuilt, library
from backpack_lm.kernels.caches import LANES, Caches, DrawParams, MixSpan, StepInput, TokenSpan
from backpack_lm.kernels.huge_pages import Room, give_back_freed
from backpack_lm.kernels.interface import Compute, Linear
from backpack_lm.kernels.native_trunk import NativeTrunk
from backpack_lm.kernels.products import Product, at, name
from backpack_lm.kernels.topics import describe
from backpack_lm.kernels.trunk import CachedTrunk, TrunkWeights
from backpack_lm.model import Backpack
from backpack_lm.overlay import TopicMultipliers

__all__ = ["NativeKernels", "NotBuilt"]

GROUPS = 32
"""Of tokens, of which each is a unit of work of the mix, as in cpp/words.h."""


class NativeKernels:
    """Raises NotBuilt if there is no library and no compiler to make it, or the caches aren't on a CPU."""

    def __init__(self, caches: Caches) -> None:
        if caches.table.device.type != "cpu":
            raise NotBuilt(f"the caches are on {caches.table.device}")
        self._library = library()
        self.caches = caches
        self._dtype, self._int8 = caches.dtype, caches.table.dtype is torch.int8
        self._packs = caches.table.dtype is torch.bfloat16 and processor.onednn_packs_bfloat16()
        kind = name(self._dtype)
        weighted = f"int8_{kind}" if self._int8 else kind
        self.name = f"native {weighted}"
        self._attend, self._residual_norm, self._rotate, self._gate = (
            getattr(self._library, f"{what}_{kind}") for what in ("attend", "residual_norm", "rotate", "gate")
        )
        self._mix, self._update_annealing = (
            getattr(self._library, f"{what}_{weighted}") for what in ("mix", "update_annealing")
        )
        self._pages = structs.PageTable(at(caches.page_table), caches.page_table.shape[1], caches.page_size)
        self._state, self._buffers = self._mixing()
        targets = (at(tensor) for tensor in (caches.ids, caches.rows, caches.previous, caches.following))
        self._append_targets = structs.AppendTargets(*targets, caches.rows.shape[2], caches.rows.shape[1])
        self._topics: WeakKeyDictionary[TopicMultipliers, bytes] = WeakKeyDictionary()
        self._spans = structs.SpanArray()
        self._weights = Room()

    def linear(self, weight: Tensor, bias: Tensor, gelu: bool = False, int16_inputs: bool = False) -> Linear:
        made = self._linear(weight, bias, gelu, int16_inputs)
        give_back_freed()  # what the conversion took: together as much as the model
        return made

    def _linear(self, weight: Tensor, bias: Tensor, gelu: bool, int16_inputs: bool) -> Linear:
        if self._int8:
            return Product.int8(self._library, weight, bias, gelu, int16_inputs, self._dtype, self._weights)
        if not self._packs:
            return Product.of(self._library, weight, bias, gelu, self._dtype, self._dtype, self._weights)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(self._dtype).contiguous(), 32)
        bias = bias.detach().to(self._dtype)
        apply = torch.ops.mkldnn._linear_pointwise.default
        activation, variant = ("gelu", "tanh") if gelu else ("none", "")
        return lambda x: apply(x, packed, bias, activation, [], variant)

    def head(self, embedding: Tensor) -> Linear:
        none = torch.zeros(len(embedding))
        if self._int8:
            return Product.int8(self._library, embedding, none, False, True, torch.float32, self._weights)
        if not self._packs:
            return Product.of(self._library, embedding, none, False, self._dtype, torch.float32, self._weights)
        linear = self.linear(embedding, none)
        return lambda o: linear(o.to(self._dtype)).float()

    def trunk(self, model: Backpack) -> Compute:
        if not self.has_trunk(model.config):
            return CachedTrunk(self, model)
        return NativeTrunk(self._library, self.caches, TrunkWeights.prepare(self, model), self._pages, self._spans)

    def has_trunk(self, config: BackpackConfig) -> bool:
        """Whether the library computes a trunk in one call: all products are its own, and no input is padded."""
        layer = config.trunk.layer
        inputs = config.n_embd, layer.heads * layer.head_width, layer.inner
        whole = self._int8 or all(width * self._dtype.itemsize % 4 == 0 for width in inputs)
        return not self._packs and whole

    def append_tokens(self, new: StepInput, spans: Sequence[TokenSpan]) -> None:
        self._library.append_tokens_int32(
            ctypes.byref(self._append_targets), self._spans.pointer(spans), len(spans), at(new.tokens), at(new.rows)
        )

    def residual_norm(self, x: Tensor, delta: Tensor | None, norm: nn.Module) -> Tensor:
        assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        assert norm.eps is not None
        out = torch.empty(x.shape, dtype=self._dtype)
        epsilon, old = ctypes.c_float(norm.eps), None if delta is None else at(delta)
        bias = at(norm.bias) if isinstance(norm, nn.LayerNorm) else None
        self._residual_norm(at(x), old, at(norm.weight), bias, epsilon, *x.shape, at(out))
        return out

    def rotate(self, qkv: Tensor, positions: Tensor, turns: Tensor, heads: int) -> None:
        self._rotate(at(qkv), *qkv.shape, heads, 2 * turns.shape[2], at(turns), at(positions))

    def gate(self, wide: Tensor) -> Tensor:
        out = torch.empty(len(wide), wide.shape[1] // 2, dtype=self._dtype)
        self._gate(at(wide), *out.shape, at(out))
        return out

    def attend(self, qkv: Tensor, layer: int, spans: Sequence[TokenSpan], scale: float) -> Tensor:
        keys, values = self.caches.keys[layer], self.caches.values[layer]
        _, groups, _, width = values.shape
        heads = qkv.shape[1] // width - 2 * groups
        out = torch.empty(len(qkv), heads * width, dtype=self._dtype)
        self._attend(
            at(qkv), at(keys), at(values), ctypes.byref(self._pages), self._spans.pointer(spans), len(spans),
            heads, groups, width, ctypes.c_float(scale), at(out),
        )  # fmt: skip
        return out

    def mix(self, queries: Tensor, predictions: Sequence[MixSpan]) -> Tensor:
        rows, topics = self._describe(predictions)
        out = torch.empty(len(predictions), self.caches.embedding.shape[1])
        queries = queries.contiguous()
        self._mix(
            self._with(topics), rows.ctypes.data_as(ctypes.c_void_p), len(predictions), at(queries),
            at(self.caches.sense_keys), queries.shape[-1], at(out),
        )  # fmt: skip
        return out

    def draw(self, logits: Tensor, params: Sequence[DrawParams]) -> Tensor:
        drawn, logits = torch.empty(len(logits), dtype=torch.int32), logits.contiguous()
        rows = np.array([(d.seed, d.top_p, d.position, d.top_k, d.temperature) for d in params], structs.DRAW_PARAMS)
        self._library.draw_float32(at(logits), *logits.shape, rows.ctypes.data_as(ctypes.c_void_p), at(drawn))
        return drawn

    def log_probabilities(self, logits: Tensor, chosen: Sequence[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
        own, logits = torch.empty(len(logits), dtype=torch.float64), logits.contiguous()
        tokens = torch.empty(len(logits), count, dtype=torch.int32)
        logs = torch.empty(len(logits), count, dtype=torch.float64)
        choice = torch.tensor(chosen, dtype=torch.int32)
        self._library.log_probabilities_float32(
            at(logits), *logits.shape, at(choice), count, at(own), at(tokens), at(logs)
        )
        return own, tokens, logs

    def update_annealing(self, prediction: MixSpan, start: int) -> None:
        rows, topics = self._describe([prediction])
        self._update_annealing(self._with(topics), rows.ctypes.data_as(ctypes.c_void_p), start)

    def _mixing(self) -> tuple[structs.MixState, tuple[Tensor, ...]]:
        """The mix's state without topics, and the buffers that it points to."""
        c = self.caches
        (slots, context, senses), width = c.rows.shape, c.embedding.shape[1]
        alpha = torch.empty(slots, context, -(-senses // LANES) * LANES)
        parts = torch.empty(GROUPS, slots, width)
        starts, words = (torch.empty(slots, n, dtype=torch.int32) for n in (GROUPS + 1, 2 * context))
        tensors = (c.table, c.embedding, c.rows, c.ids, c.previous, c.following, c.annealed_sum, alpha, parts)
        lists = structs.Lists(at(starts), at(words), context, len(c.embedding))
        addresses = (at(tensor) for tensor in tensors)
        state = structs.MixState(*addresses, lists, None, self._pages, senses, width, context, slots)
        return state, (alpha, parts, starts, words)

    def _with(self, topics: bytes) -> object:
        self._state.topics = ctypes.cast(ctypes.c_char_p(topics), ctypes.c_void_p)
        return ctypes.byref(self._state)

    def _describe(self, predictions: Sequence[MixSpan]) -> tuple[np.ndarray, bytes]:
        """Predictions [B, 5] and their topics, as `structs.PREDICTION` and `structs.TOPIC`."""
        rows: list[tuple[int, ...]] = []
        topics: list[bytes] = []
        for p in predictions:
            rows.append((p.slot, p.length, p.fresh, len(p.topics), len(topics)))
            for topic in p.topics:
                if topic not in self._topics:
                    self._topics[topic] = describe(topic)
                topics.append(self._topics[topic])
        return np.array(rows, dtype=np.int32), b"".join(topics)
