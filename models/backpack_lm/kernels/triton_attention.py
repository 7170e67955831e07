"""Attention of single new tokens over their slots' caches, in Triton.

A program takes one token and one head: it scores the token against itself, then passes once over the older
positions, keys and values together, rescaling its sums when it meets a higher score (online softmax). The first
head of a group writes the token's own key and value; no program reads them back. Heads of a group read the same
keys and values at about the same time: from the cache, but for the first.

Never run on a GPU yet: tests run it in Triton's interpreter, and compile it for two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from backpack_lm.kernels.caches import LANES


def attend_single(
    qkv: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, spans: Tensor, scale: float, out: Tensor
) -> None:
    """Write keys [pages, G, P/16, w, 16] and values [pages, G, P, w] of single new tokens; attention into out
    [N, H·w].

    `spans` [B, 3] int64: each one's row of qkv [N, (H + 2·G)·w], its slot, its position.
    """
    _, groups, size, width = values.shape
    heads = out.shape[1] // width
    attend[(len(spans), heads)](
        qkv, keys, values, page_table, spans, scale, out,
        heads, groups, page_table.shape[1], size, width, triton.next_power_of_2(width), LANES,
    )  # fmt: skip


@triton.jit
def attend(
    qkv, keys, values, page_table, spans, scale, out,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, PAGES: tl.constexpr, SIZE: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_UP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    span, head = tl.program_id(0), tl.program_id(1)
    token, slot, position = tl.load(spans + span * 3), tl.load(spans + span * 3 + 1), tl.load(spans + span * 3 + 2)
    c = tl.arange(0, WIDTH_UP)
    inside = c < WIDTH
    group = head // (HEADS // GROUPS)
    new = qkv + token * (HEADS + 2 * GROUPS) * WIDTH + c
    query = tl.load(new + head * WIDTH, mask=inside, other=0.0).to(tl.float32) * scale
    key = tl.load(new + (HEADS + group) * WIDTH, mask=inside, other=0.0)
    value = tl.load(new + (HEADS + GROUPS + group) * WIDTH, mask=inside, other=0.0)
    page_table += slot * PAGES
    keys += group * SIZE * WIDTH
    values += group * SIZE * WIDTH
    if head % (HEADS // GROUPS) == 0:
        page, at = tl.load(page_table + position // SIZE).to(tl.int64), position % SIZE
        page *= GROUPS * SIZE * WIDTH
        tl.store(keys + page + (at // TILE) * WIDTH * TILE + c * TILE + at % TILE, key, mask=inside)
        tl.store(values + page + at * WIDTH + c, value, mask=inside)

    peak, weights, sums = tl.sum(key.to(tl.float32) * query, 0), 1.0, value.to(tl.float32)
    for start in range(0, position, 4 * TILE):
        t = start + tl.arange(0, 4 * TILE)
        older = t < position
        page = tl.load(page_table + t // SIZE, mask=older, other=0).to(tl.int64) * (GROUPS * SIZE * WIDTH)
        tile = page + (t % SIZE // TILE) * (WIDTH * TILE) + t % TILE
        at = tile[None, :] + c[:, None] * TILE
        some = tl.load(keys + at, mask=inside[:, None] & older[None, :], other=0.0).to(tl.float32)
        score = tl.where(older, tl.sum(some * query[:, None], 0), -float("inf"))
        higher = tl.maximum(peak, tl.max(score, 0))
        weight, shrink = tl.exp(score - higher), tl.exp(peak - higher)
        at = (page + (t % SIZE) * WIDTH)[:, None] + c[None, :]
        some = tl.load(values + at, mask=older[:, None] & inside[None, :], other=0.0).to(tl.float32)
        sums = sums * shrink + tl.sum(some * weight[:, None], 0)
        weights, peak = weights * shrink + tl.sum(weight, 0), higher
    tl.store(out + (token * HEADS + head) * WIDTH + c, (sums / weights).to(out.dtype.element_ty), mask=inside)
