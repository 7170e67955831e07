"""Attention of single new tokens over their slots' caches, in Triton.

A program takes one token and one head: it scores the token against itself, then passes once over the older
positions, keys and values together, rescaling its sums when it meets a higher score (online softmax). It writes
the token's own key and value but never reads them back.

Never run on a GPU yet: tests run it in Triton's interpreter, and compile it for two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from backpack_lm.kernels.caches import LANES


def attend_single(qkv: Tensor, keys: Tensor, values: Tensor, spans: Tensor, scale: float, out: Tensor) -> None:
    """Write keys [S, H, T/16, w, 16] and values [S, H, T, w] of single new tokens; attention into out [N, d].

    `spans` [G, 3] int64: each one's row of qkv [N, 3·d], its slot, its position.
    """
    _, heads, context, width = values.shape
    attend[(len(spans), heads)](
        qkv, keys, values, spans, scale, out, heads, context, width, triton.next_power_of_2(width), LANES
    )


@triton.jit
def attend(
    qkv, keys, values, spans, scale, out,
    HEADS: tl.constexpr, CONTEXT: tl.constexpr, WIDTH: tl.constexpr, WIDTH_UP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    span, head = tl.program_id(0), tl.program_id(1)
    token, slot, position = tl.load(spans + span * 3), tl.load(spans + span * 3 + 1), tl.load(spans + span * 3 + 2)
    c = tl.arange(0, WIDTH_UP)
    inside = c < WIDTH
    new = qkv + (token * 3 * HEADS + head) * WIDTH + c
    query = tl.load(new, mask=inside, other=0.0).to(tl.float32) * scale
    key = tl.load(new + HEADS * WIDTH, mask=inside, other=0.0)
    value = tl.load(new + 2 * HEADS * WIDTH, mask=inside, other=0.0)
    keys += (slot * HEADS + head) * WIDTH * CONTEXT
    values += (slot * HEADS + head) * WIDTH * CONTEXT
    tl.store(keys + (position // TILE) * WIDTH * TILE + c * TILE + position % TILE, key, mask=inside)
    tl.store(values + position * WIDTH + c, value, mask=inside)

    peak, weights, sums = tl.sum(key.to(tl.float32) * query, 0), 1.0, value.to(tl.float32)
    for start in range(0, position, 4 * TILE):
        t = start + tl.arange(0, 4 * TILE)
        older = t < position
        at = (t // TILE)[None, :] * (WIDTH * TILE) + c[:, None] * TILE + (t % TILE)[None, :]
        some = tl.load(keys + at, mask=inside[:, None] & older[None, :], other=0.0).to(tl.float32)
        score = tl.where(older, tl.sum(some * query[:, None], 0), -float("inf"))
        higher = tl.maximum(peak, tl.max(score, 0))
        weight, shrink = tl.exp(score - higher), tl.exp(peak - higher)
        at = t[:, None] * WIDTH + c[None, :]
        some = tl.load(values + at, mask=older[:, None] & inside[None, :], other=0.0).to(tl.float32)
        sums = sums * shrink + tl.sum(some * weight[:, None], 0)
        weights, peak = weights * shrink + tl.sum(weight, 0), higher
    tl.store(out + (token * HEADS + head) * WIDTH + c, (sums / weights).to(out.dtype.element_ty), mask=inside)
