"""Logits → tokens, seeded per request: the same request draws the same tokens in any batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from backpack_serving.engine.sampling import Sampling
from backpack_serving.engine.sequence import LogProbability


def choose(logits: Tensor, sampling: Sampling, position: int) -> int:
    """One token from logits [V], drawn as argmax_y (logit_y/temperature − log e_y), e_y exponential.

    That is Gumbel's trick. The noise e is a function of (seed, position) and the token alone, so neither the batch
    nor the order of requests can change it. Nor can rounding, but for the rarest ties: inverting the cumulative
    distribution, where every rounding error moves thousands of borders, drew other tokens in a long text.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.double() / sampling.temperature
    noise = _noise(sampling, position, len(logits))
    if not _truncates(sampling):
        return int((scaled - noise).argmax())
    values, tokens = scaled.topk(min(sampling.top_k or len(logits), len(logits)))
    if sampling.top_p < 1.0:
        # Keep tokens while those before them have less than top_p: at least one is always kept.
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        values = values.masked_fill(before >= sampling.top_p, float("-inf"))
    return int(tokens[(values - noise[tokens]).argmax()])


def choose_all(logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """`choose` for each row of logits [B, V]; the greedy rows of a batch, by far the most common, together."""
    best = logits.argmax(-1).tolist()
    return [
        best[n] if sampling.temperature == 0 else choose(logits[n], sampling, positions[n])
        for n, sampling in enumerate(samplings)
    ]


def _truncates(sampling: Sampling) -> bool:
    return bool(sampling.top_k) or sampling.top_p < 1.0


def _noise(sampling: Sampling, position: int, size: int) -> Tensor:
    """log e_y for every token y [size]."""
    assert sampling.seed is not None, "requests are given a seed at admission"
    # An explicit type: a list with a seed of 2⁶³ or more would become floats, and seeds would collide.
    key = np.array([sampling.seed, position], dtype=np.uint64)
    drawn = np.random.Generator(np.random.Philox(key=key)).standard_exponential(size, dtype=np.float32)
    return torch.from_numpy(drawn).clamp_(min=2**-24).log_()  # 0 is a rounding of what is small


def log_probability(logits: Tensor, token: int, alternatives: int) -> LogProbability:
    """Natural log-probability of a token under logits [V] at temperature 1, with the top alternatives."""
    logs = logits.double().log_softmax(-1)
    top = logs.topk(alternatives)
    return LogProbability(float(logs[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
