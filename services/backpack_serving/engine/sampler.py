"""Logits → tokens, seeded per request: the same request draws the same tokens in any batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from backpack_serving.engine.sampling import Sampling
from backpack_serving.engine.sequence import LogProbability


def choose(logits: Tensor, sampling: Sampling, position: int) -> int:
    """One token from logits [V], drawn by inverse transform from the truncated distribution.

    The random number is a function of (seed, position) alone, so neither the batch nor the order of
    requests can change it. Tokens are taken likeliest first where the distribution is truncated.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.double() / sampling.temperature
    uniform = _uniform(sampling, position)
    if not _truncates(sampling):
        return _draw(scaled.softmax(-1), uniform)
    count = min(sampling.top_k or len(logits), len(logits))
    values, tokens = scaled.topk(count)
    probabilities = values.softmax(-1)
    if sampling.top_p < 1.0:
        # Keep tokens while those before them have less than top_p: at least one is always kept.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(tokens[_draw(probabilities, uniform)])


def choose_all(logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """`choose` for each row of logits [B, V]; rows that are greedy, and rows of the whole vocabulary, together."""
    tokens = [0] * len(samplings)
    greedy = [n for n, s in enumerate(samplings) if s.temperature == 0]
    whole = [n for n, s in enumerate(samplings) if s.temperature != 0 and not _truncates(s)]
    for n, token in zip(greedy, logits[greedy].argmax(-1).tolist(), strict=True):
        tokens[n] = token
    if whole:
        temperatures = torch.tensor([samplings[n].temperature for n in whole], dtype=torch.float64)
        cumulative = (logits[whole].double() / temperatures[:, None]).softmax(-1).cumsum_(-1)
        uniforms = torch.tensor([_uniform(samplings[n], positions[n]) for n in whole], dtype=torch.float64)
        places = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)
        for n, place in zip(whole, places.flatten().tolist(), strict=True):
            # Behind the last, by rounding: let the careful way decide.
            tokens[n] = place if place < logits.shape[1] else choose(logits[n], samplings[n], positions[n])
    for n, sampling in enumerate(samplings):
        if sampling.temperature != 0 and _truncates(sampling):
            tokens[n] = choose(logits[n], sampling, positions[n])
    return tokens


def _truncates(sampling: Sampling) -> bool:
    return bool(sampling.top_k) or sampling.top_p < 1.0


def _uniform(sampling: Sampling, position: int) -> float:
    assert sampling.seed is not None, "requests are given a seed at admission"
    # An explicit type: a list with a seed of 2⁶³ or more would become floats, and seeds would collide.
    key = np.array([sampling.seed, position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def _draw(weights: Tensor, uniform: float) -> int:
    cumulative = weights.cumsum(-1)
    place = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    # Rounding may leave the target at the very end, behind tokens of weight zero.
    return place if place < len(weights) else int(weights.nonzero()[-1])


def log_probability(logits: Tensor, token: int, alternatives: int) -> LogProbability:
    """Natural log-probability of a token under logits [V] at temperature 1, with the top alternatives."""
    logs = logits.double().log_softmax(-1)
    top = logs.topk(alternatives)
    return LogProbability(float(logs[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
