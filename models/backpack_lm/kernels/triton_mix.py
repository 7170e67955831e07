"""The sense mix in Triton, with releases' topics and their annealing.

    weigh   for a prediction and a sense: the scores of all positions, their peak and Σ exp(score − peak); and how
            far the newest token's own cell is annealed
    mix     for a prediction and 16 positions: gather the senses by their row numbers, bring their annealing up to
            date, weighted sum with α times the multipliers
    total   the sums of a prediction's positions, in their order

Programs read no more than the valid positions, and no two write the same place: a prediction gives the same bits
in any batch. The grids cover the whole context, so they depend on the number of predictions alone: a launch can be
captured and played again.

Never run on a GPU yet: tests run it in Triton's interpreter, and compile it for two.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from backpack_lm.kernels.caches import LANES, Caches

FIELDS = 5
"""Numbers of a prediction: slot, length, fresh, how many topics, address of what `topics.describe` gives."""

BLOCK, AT_ONCE = 16, 8
"""Positions of one program of `mix`, and how many of them it has in registers."""

SPAN = 256
"""Dimensions of one program of `total`."""


class Mix:
    """The three kernels over caches, with the buffers between them."""

    def __init__(self, caches: Caches) -> None:
        self._caches = caches
        slots, self._context, self._senses = caches.rows.shape
        width = self._width = caches.table.shape[1]
        self._whole = triton.next_power_of_2(width)

        def empty(*shape: int) -> Tensor:
            return torch.empty(slots, *shape, dtype=torch.float32, device=caches.table.device)

        self._scores, self._norms = empty(self._senses, self._context), empty(self._senses, 2)
        self._parts = empty(self._context // BLOCK, width)

    def __call__(self, queries: Tensor, predictions: Tensor) -> Tensor:
        """o [B, d] float32 for queries [B, k, d/k] and predictions [B, 5] int64; at most as many as slots."""
        c, count, head = self._caches, len(queries), queries.shape[-1]
        queries = queries.contiguous()
        out = torch.empty(count, self._width, dtype=torch.float32, device=queries.device)
        weigh[(count, self._senses)](
            queries, c.sense_keys, c.page_table, c.table, c.embedding, c.ids, c.rows, c.annealed_sum, predictions,
            self._scores, self._norms, 1 / math.sqrt(head),
            self._context, c.page_size, self._senses, head, triton.next_power_of_2(head),
            self._width, self._whole, LANES,
        )  # fmt: skip
        mix[(count, self._context // BLOCK)](
            c.table, c.embedding, c.ids, c.rows, c.annealed_sum, predictions, self._scores, self._norms, self._parts,
            self._context, self._senses, self._width, self._whole, BLOCK, AT_ONCE, num_warps=warps(self._width),
        )  # fmt: skip
        total[(count, triton.cdiv(self._width, SPAN))](
            predictions, self._parts, out, self._context, self._width, SPAN, BLOCK
        )
        return out


def warps(width: int) -> int:
    """Warps of a program of `mix`: its 8 vectors and as many sums, float32, have to fit into their registers."""
    return max(1, min(16, int(triton.next_power_of_2(width)) // 128))


@triton.jit
def topic(address, n, tokens, sense, SENSES: tl.constexpr):
    """Of the n-th topic at an address: δ of cells, the scale of its annealing, whether it is annealed."""
    numbers = address.to(tl.pointer_type(tl.float32)) + n * 8
    levels = tl.load(address.to(tl.pointer_type(tl.int64)) + n * 4).to(tl.pointer_type(tl.uint8))
    target = tl.load(numbers + 2 + tl.load(levels + tokens * SENSES + sense).to(tl.int32))
    annealed = tl.load(numbers.to(tl.pointer_type(tl.int32)) + 7) != 0
    return target, tl.load(numbers + 6), annealed


@triton.jit
def weigh(
    queries, sense_keys, page_table, table, embedding, ids, rows, annealed_sum, predictions, scores, norms, scale,
    CONTEXT: tl.constexpr, SIZE: tl.constexpr, SENSES: tl.constexpr, HEAD: tl.constexpr, HEAD_UP: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_UP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    b, sense = tl.program_id(0), tl.program_id(1)
    prediction = predictions + b * 5
    slot, length, fresh = tl.load(prediction), tl.load(prediction + 1), tl.load(prediction + 2)
    topics, address = tl.load(prediction + 3), tl.load(prediction + 4)

    c = tl.arange(0, HEAD_UP)
    query = tl.load(queries + (b * SENSES + sense) * HEAD + c, mask=c < HEAD, other=0.0).to(tl.float32) * scale
    keys = sense_keys + sense * HEAD * SIZE
    page_table += slot * (CONTEXT // SIZE)
    peak, sums = -float("inf"), 0.0
    for start in range(0, length, 4 * TILE):
        t = start + tl.arange(0, 4 * TILE)
        page = tl.load(page_table + t // SIZE, mask=t < length, other=0).to(tl.int64) * (SENSES * HEAD * SIZE)
        tile = page + (t % SIZE // TILE) * (HEAD * TILE) + t % TILE
        at = tile[None, :] + c[:, None] * TILE
        inside = (c < HEAD)[:, None] & (t < length)[None, :]
        key = tl.load(keys + at, mask=inside, other=0.0).to(tl.float32)
        score = tl.where(t < length, tl.sum(key * query[:, None], 0), -float("inf"))
        tl.store(scores + (b * SENSES + sense) * CONTEXT + t, score, mask=t < length)
        higher = tl.maximum(peak, tl.max(score, 0))
        sums = sums * tl.exp(peak - higher) + tl.sum(tl.exp(score - higher), 0)
        peak = higher
    tl.store(norms + (b * SENSES + sense) * 2, peak)
    tl.store(norms + (b * SENSES + sense) * 2 + 1, sums)

    if (fresh != 0) & (topics > 0):
        first = slot * CONTEXT
        cell = (first + length - 1) * SENSES + sense
        changeable = 0  # a multiplier of 1 stays 1, however far the cell is annealed
        for n in range(topics):
            target, _, annealed = topic(address, n, tl.load(ids + first + length - 1), sense, SENSES)
            changeable += (annealed & (target != 1.0)).to(tl.int32)
        dot_sum = 0.0
        if changeable > 0:
            d = tl.arange(0, WIDTH_UP)
            row = tl.load(rows + cell).to(tl.int64)
            vector = tl.load(table + row * WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32)
            for start in range(0, length, TILE):
                t = start + tl.arange(0, TILE)
                tokens = tl.load(ids + first + t, mask=t < length, other=0).to(tl.int64)
                inside = (t < length)[:, None] & (d < WIDTH)[None, :]
                e = tl.load(embedding + tokens[:, None] * WIDTH + d[None, :], mask=inside, other=0.0)
                dot_sum += tl.sum(tl.maximum(tl.sum(e.to(tl.float32) * vector[None, :], 1), 0.0), 0)
        tl.store(annealed_sum + cell, dot_sum)


@triton.jit
def mix(
    table, embedding, ids, rows, annealed_sum, predictions, scores, norms, parts,
    CONTEXT: tl.constexpr, SENSES: tl.constexpr, WIDTH: tl.constexpr, WIDTH_UP: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    b, block = tl.program_id(0), tl.program_id(1)
    prediction = predictions + b * 5
    slot, length, fresh = tl.load(prediction), tl.load(prediction + 1), tl.load(prediction + 2)
    if block * BLOCK < length:
        topics, address = tl.load(prediction + 3), tl.load(prediction + 4)
        d = tl.arange(0, WIDTH_UP)
        inside = d < WIDTH
        newest = tl.load(ids + slot * CONTEXT + length - 1).to(tl.int64)
        e = tl.load(embedding + newest * WIDTH + d, mask=inside & (topics > 0), other=0.0).to(tl.float32)
        sums = tl.zeros([AT_ONCE, WIDTH_UP], tl.float32)
        for start in range(block * BLOCK, tl.minimum(length, (block + 1) * BLOCK), AT_ONCE):
            t = start + tl.arange(0, AT_ONCE)
            valid, older, places = t < length, t < length - 1, slot * CONTEXT + t
            tokens = tl.load(ids + places, mask=valid, other=0)
            some = valid[:, None] & inside[None, :]
            for sense in range(SENSES):
                at = b * SENSES + sense
                score = tl.load(scores + at * CONTEXT + t, mask=valid, other=-float("inf"))
                weight = tl.exp(score - tl.load(norms + at * 2)) / tl.load(norms + at * 2 + 1)
                row = tl.load(rows + places * SENSES + sense, mask=valid, other=0).to(tl.int64)
                vector = tl.load(table + row[:, None] * WIDTH + d[None, :], mask=some, other=0.0).to(tl.float32)
                if topics > 0:
                    cells = annealed_sum + places * SENSES + sense
                    dot_sum = tl.load(cells, mask=valid, other=0.0)
                    if fresh != 0:
                        dot_sum += tl.where(older, tl.maximum(tl.sum(vector * e[None, :], 1), 0.0), 0.0)
                        tl.store(cells, dot_sum, mask=older)
                    for n in range(topics):
                        target, scale, annealed = topic(address, n, tokens, sense, SENSES)
                        keep = tl.sigmoid(6.0 - scale * dot_sum) * (1.0 + t / 100.0)
                        weight *= tl.where(annealed, keep * target + (1.0 - keep), target)
                sums += vector * weight[:, None]
        part = parts + (b * (CONTEXT // BLOCK) + block) * WIDTH
        tl.store(part + d, tl.sum(sums, 0), mask=inside)


@triton.jit
def total(predictions, parts, out, CONTEXT: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    b, d = tl.program_id(0), tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    sums = tl.zeros([SPAN], tl.float32)
    for block in range((tl.load(predictions + b * 5 + 1) + BLOCK - 1) // BLOCK):
        part = parts + (b * (CONTEXT // BLOCK) + block) * WIDTH
        sums += tl.load(part + d, mask=d < WIDTH, other=0.0)
    tl.store(out + b * WIDTH + d, sums, mask=d < WIDTH)
