"""Drawing tokens in Triton: the noise of `noise.py` and its greatest sum with the logits, in one launch.

In torch's operations the noise of a token is some hundred passes over [G, V] of 64 bits.

Never run on a GPU yet: tests run it in Triton's interpreter, and compile it for two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 256
"""Blocks of noise that a program makes at once: four tokens each."""


def draw(logits: Tensor, kept: Tensor | None, noise_keys: Tensor, temperatures: Tensor) -> Tensor:
    """Tokens [G] int64, as `Kernels.draw` says, of logits [G, V], and of those that are `kept` [G, V] alone.

    `noise_keys` [G, 2] int64 are seeds, the 64 bits of each, and positions; `temperatures` [G] float32 temperatures.
    """
    logits, chosen = logits.contiguous(), noise_keys.new_empty(len(noise_keys))
    choose[(len(noise_keys),)](
        logits, logits if kept is None else kept, noise_keys, temperatures, chosen,
        logits.shape[1], kept is not None, COUNTERS, num_warps=8,
    )  # fmt: skip
    return chosen


@triton.jit
def log_exponential(word):
    """log e for e = −log(1 − v), v = (word + ½)/2³²."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), 1.0 - 1.0 / 16777216.0)
    rest = 1.0 - v
    # What rounding took from 1 − v is given back (Kahan): small e, which decide, are exact.
    e = tl.where(rest == 1.0, v, tl.log(rest) * v / tl.where(rest == 1.0, 1.0, rest - 1.0))
    return tl.log(e)


@triton.jit
def take(best, token, wrong, row, may, y, word, temperature, COUNT: tl.constexpr, TRUNCATED: tl.constexpr):
    """The better of what was best and tokens y; how many of their logits are no numbers is added up."""
    inside = y < COUNT
    logit = tl.load(row + y, mask=inside, other=-float("inf")).to(tl.float32)
    wrong += tl.where(logit < float("inf"), 0, 1)
    value = tl.where(
        temperature > 0, logit / tl.where(temperature > 0, temperature, 1.0) - log_exponential(word), logit
    )
    if TRUNCATED:
        value = tl.where(tl.load(may + y, mask=inside, other=0) != 0, value, -float("inf"))
    better = value > best
    return tl.where(better, value, best), tl.where(better, y, token), wrong


@triton.jit
def choose(
    logits, kept, noise_keys, temperatures, chosen,
    COUNT: tl.constexpr, TRUNCATED: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row, may, temperature = logits + b * COUNT, kept + b * COUNT, tl.load(temperatures + b)
    seed = tl.load(noise_keys + 2 * b).to(tl.uint64)
    zero = tl.zeros([COUNTERS], tl.uint32)
    low, high = zero + (seed & 0xFFFFFFFF).to(tl.uint32), zero + (seed >> 32).to(tl.uint32)
    position = zero + tl.load(noise_keys + 2 * b + 1).to(tl.uint32)
    best = tl.full([COUNTERS], -float("inf"), tl.float32)
    token, wrong = tl.full([COUNTERS], COUNT, tl.int32), tl.zeros([COUNTERS], tl.int32)
    for start in range(0, COUNT, 4 * COUNTERS):
        counter = start // 4 + tl.arange(0, COUNTERS)
        y = counter // 16 * 64 + counter % 16
        w0, w1, w2, w3 = tl.philox_impl(counter.to(tl.uint32), position, zero, zero, low, high)
        best, token, wrong = take(best, token, wrong, row, may, y, w0, temperature, COUNT, TRUNCATED)
        best, token, wrong = take(best, token, wrong, row, may, y + 16, w1, temperature, COUNT, TRUNCATED)
        best, token, wrong = take(best, token, wrong, row, may, y + 32, w2, temperature, COUNT, TRUNCATED)
        best, token, wrong = take(best, token, wrong, row, may, y + 48, w3, temperature, COUNT, TRUNCATED)
    first = tl.min(tl.where(best == tl.max(best, 0), token, COUNT), 0)  # of equal ones
    nothing = (tl.sum(wrong, 0) > 0) | (tl.max(best, 0) == -float("inf"))
    tl.store(chosen + b, tl.where(nothing, -1, first).to(tl.int64))
