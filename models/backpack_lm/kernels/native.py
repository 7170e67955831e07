"""The operations on a CPU: our own library, and oneDNN's packed products where they are the faster ones.

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

from backpack_lm.kernels.build import NotBuilt, library
from backpack_lm.kernels.caches import LANES, Caches, Prediction, Run
from backpack_lm.kernels.seam import Linear
from backpack_lm.kernels.topics import describe
from backpack_lm.overlay import TopicMultipliers

__all__ = ["NativeKernels", "NotBuilt"]

GROUPS = 32
"""Of tokens, of which each is a unit of work of the mix, as in cpp/mix.h."""

GROUP = 48
"""Outputs of one pass of a product, as in cpp/product.h."""


class _Mix(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("table", "embedding", "rows", "ids", "previous", "following", "satisfied"),
                *("alpha", "parts", "starts", "words", "topics"),
            )
        ),
        *((name, ctypes.c_int) for name in ("senses", "width", "context", "vocabulary")),
    )


class NativeKernels:
    """Raises NotBuilt if there is no library and no compiler to make it, or the caches aren't on a CPU."""

    def __init__(self, caches: Caches) -> None:
        if caches.table.device.type != "cpu":
            raise NotBuilt(f"the caches are on {caches.table.device}")
        self._library = library()
        self.caches = caches
        self._dtype = caches.table.dtype
        kind = _name(self._dtype)
        self.name = f"native {kind}"
        self._attend, self._mix, self._satisfy, self._residual_norm = (
            getattr(self._library, f"{name}_{kind}") for name in ("attend", "mix", "satisfy", "residual_norm")
        )
        self._state, self._held = self._mixing()
        self._topics: WeakKeyDictionary[TopicMultipliers, bytes] = WeakKeyDictionary()
        self._runs: tuple[Sequence[Run], np.ndarray] = (), np.empty(0)

    def linear(self, weight: Tensor, bias: Tensor, gelu: bool = False) -> Linear:
        if own := self._product(weight, bias, gelu, self._dtype):
            return own
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(self._dtype).contiguous(), 32)
        bias = bias.detach().to(self._dtype)
        apply = torch.ops.mkldnn._linear_pointwise.default
        how, what = ("gelu", "tanh") if gelu else ("none", "")
        return lambda x: apply(x, packed, bias, how, [], what)

    def head(self, embedding: Tensor) -> Linear:
        none = torch.zeros(len(embedding))
        if own := self._product(embedding, none, False, torch.float32):
            return own
        linear = self.linear(embedding, none)
        return lambda o: linear(o.to(self._dtype)).float()

    def _product(self, weight: Tensor, bias: Tensor, gelu: bool, result: torch.dtype) -> Linear | None:
        """A layer by cpp/product.h, its weights packed in the order of reading; None where oneDNN is faster."""
        apply = getattr(self._library, f"product_{_name(self._dtype)}_{_name(result)}", None)
        (outer, inner), step = weight.shape, 4 // self._dtype.itemsize
        amx = self._dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        if apply is None or amx or inner % step:
            return None
        whole = -(-outer // GROUP) * GROUP
        padded, start = torch.zeros(whole, inner, dtype=self._dtype), torch.zeros(whole)
        padded[:outer], start[:outer] = weight.detach(), bias.detach()
        packed = padded.view(-1, GROUP, inner // step, step).transpose(1, 2).contiguous()  # [out/48, in/s, 48, s]

        def linear(x: Tensor) -> Tensor:
            x, out = x.to(self._dtype), torch.empty(len(x), outer, dtype=result)
            apply(_at(x), len(x), _at(packed), _at(start), inner, outer, gelu, _at(out))
            return out

        return linear

    def residual_norm(self, x: Tensor, delta: Tensor | None, norm: nn.LayerNorm) -> Tensor:
        out = torch.empty(x.shape, dtype=self._dtype)
        epsilon = ctypes.c_float(norm.eps)
        old = None if delta is None else _at(delta)
        self._residual_norm(_at(x), old, _at(norm.weight), _at(norm.bias), epsilon, *x.shape, _at(out))
        return out

    def attend(self, qkv: Tensor, layer: int, runs: Sequence[Run], scale: float) -> Tensor:
        keys, values = self.caches.keys[layer], self.caches.values[layer]
        _, heads, context, width = values.shape
        out = torch.empty(len(qkv), heads * width, dtype=self._dtype)
        if runs is not self._runs[0]:  # the same for all layers of a step
            self._runs = runs, np.array([(r.token, r.slot, r.position, r.count) for r in runs], dtype=np.int32)
        table = self._runs[1]
        self._attend(
            _at(qkv), _at(keys), _at(values), table.ctypes.data_as(ctypes.c_void_p), len(runs),
            heads, width, context, ctypes.c_float(scale), _at(out),
        )  # fmt: skip
        return out

    def mix(self, queries: Tensor, predictions: Sequence[Prediction]) -> Tensor:
        rows, topics = self._describe(predictions)
        out = torch.empty(len(predictions), self.caches.table.shape[1])
        queries = queries.contiguous()
        self._mix(
            self._with(topics), rows.ctypes.data_as(ctypes.c_void_p), len(predictions), _at(queries),
            _at(self.caches.sense_keys), queries.shape[-1], _at(out),
        )  # fmt: skip
        return out

    def draw(self, logits: Tensor, temperatures: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
        drawn = torch.empty(len(logits), dtype=torch.int32)
        keys, places = np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.int32)
        self._library.draw_float32(
            _at(logits.contiguous()), *logits.shape, _at(temperatures), keys.ctypes.data_as(ctypes.c_void_p),
            places.ctypes.data_as(ctypes.c_void_p), _at(drawn),
        )  # fmt: skip
        return drawn

    def satisfy(self, prediction: Prediction, start: int) -> None:
        rows, topics = self._describe([prediction])
        self._satisfy(self._with(topics), rows.ctypes.data_as(ctypes.c_void_p), start)

    def _mixing(self) -> tuple[_Mix, tuple[Tensor, ...]]:
        """What the mix works on but for topics, and the buffers in it."""
        c = self.caches
        (slots, context, senses), width = c.rows.shape, c.table.shape[1]
        alpha = torch.empty(slots, context, -(-senses // LANES) * LANES)
        parts = torch.empty(slots, GROUPS, width)
        starts, words = (torch.empty(slots, n, dtype=torch.int32) for n in (GROUPS + 1, 2 * context))
        tensors = (c.table, c.embedding, c.rows, c.ids, c.previous, c.following, c.satisfied)
        buffers = (alpha, parts, starts, words)
        pointers = (_at(tensor) for tensor in (*tensors, *buffers))
        return _Mix(*pointers, None, senses, width, context, len(c.embedding)), buffers

    def _with(self, topics: bytes) -> object:
        self._state.topics = ctypes.cast(ctypes.c_char_p(topics), ctypes.c_void_p)
        return ctypes.byref(self._state)

    def _describe(self, predictions: Sequence[Prediction]) -> tuple[np.ndarray, bytes]:
        """Predictions [B, 5] and their topics, as cpp/mix.h's `Row` and `Topic`."""
        rows: list[tuple[int, ...]] = []
        topics: list[bytes] = []
        for p in predictions:
            rows.append((p.slot, p.length, p.fresh, len(p.topics), len(topics)))
            for topic in p.topics:
                if topic not in self._topics:
                    self._topics[topic] = describe(topic)
                topics.append(self._topics[topic])
        return np.array(rows, dtype=np.int32), b"".join(topics)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
