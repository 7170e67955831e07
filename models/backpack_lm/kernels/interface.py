"""The operations, as the engine calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from backpack_lm.kernels.caches import Caches, DrawParams, MixSpan, StepInput, TokenSpan
from backpack_lm.model import Backpack


class Linear(Protocol):
    """x [N, in] → [N, out], in the kernels' dtype; followed by GPT-2's gelu if it was made with it."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


class Compute(Protocol):
    """New tokens → the sense weights' queries [N, k, w], with all caches of the trunk filled."""

    def __call__(self, new: StepInput, spans: Sequence[TokenSpan], /) -> Tensor: ...


class Kernels(Protocol):
    """Operations over a step's N new tokens. All share one device and dtype; `caches` is what they write."""

    name: str
    caches: Caches

    def trunk(self, model: Backpack) -> Compute:
        """A model's trunk and sense weights, on the caches' device and in their dtype."""

    def linear(self, weight: Tensor, bias: Tensor, gelu: bool = False, int16_inputs: bool = False) -> Linear:
        """A layer with weight [out, in] and bias [out], in whatever form is fastest here. Where weights are int8, x is
        rounded to 8 bits; with `int16_inputs` to 16."""

    def head(self, embedding: Tensor) -> Linear:
        """o [B, d] float32 → logits [B, V] float32 under E [V, d]."""

    def append_tokens(self, new: StepInput, spans: Sequence[TokenSpan]) -> None:
        """Write ids and rows of new tokens into their slots."""

    def residual_norm(self, x: Tensor, delta: Tensor | None, norm: nn.Module) -> Tensor:
        """x += delta, in place, x [N, d] float32; then LayerNorm(x) or RMSNorm(x) in the kernels' dtype."""

    def rotate(self, qkv: Tensor, positions: Tensor, turns: Tensor, heads: int) -> None:
        """Turn the first `heads` heads of qkv [N, (H + 2G)·w], in place: those of queries and keys, each token's by
        the angles of its position, cosines and sines `turns` [T, 2, w/2]."""

    def attend(self, qkv: Tensor, layer: int, spans: Sequence[TokenSpan], scale: float) -> Tensor:
        """Write keys and values of new tokens qkv [N, (H + 2G)·w], H heads in G groups that share keys and values; each
        token's attention over its slot, [N, H·w]."""

    def gate(self, wide: Tensor) -> Tensor:
        """silu of the first half of [N, 2·inner] times the second: [N, inner]."""

    def mix(self, queries: Tensor, predictions: Sequence[MixSpan]) -> Tensor:
        """o [B, d] float32 = Σ_j Σ_l α[l,j] m[l,j] C(x_j)_l for queries [B, k, w], α a softmax over the slot."""

    def draw(self, logits: Tensor, params: Sequence[DrawParams]) -> Tensor:
        """argmax_y (logit_y / temperature − log e_y) for each row of logits [G, V], e from `noise.py`, over the
        tokens that may be drawn; argmax_y logit_y at temperature 0. −1 for a row with NaN or +∞, or with nothing
        else than −∞."""

    def log_probabilities(self, logits: Tensor, chosen: Sequence[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
        """log softmax of logits [G, V] that are numbers, in float64: of a chosen token of each row [G], and the
        `count` likeliest tokens with theirs, the likeliest first [G, count]."""

    def update_annealing(self, prediction: MixSpan, start: int) -> None:
        """Count the tokens from `start` to `prediction.length` in the slot's annealing."""
