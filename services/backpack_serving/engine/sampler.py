"""Logits → tokens, seeded per request: the same request draws the same tokens in any batch."""

from __future__ import annotations

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
    assert sampling.seed is not None, "requests are given a seed at admission"
    uniform = float(np.random.Generator(np.random.Philox(key=[sampling.seed, position])).random())
    scaled = logits.double() / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1.0:
        return _draw(scaled.softmax(-1), uniform)
    count = min(sampling.top_k or len(logits), len(logits))
    values, tokens = scaled.topk(count)
    probabilities = values.softmax(-1)
    if sampling.top_p < 1.0:
        # Keep tokens while those before them have less than top_p: at least one is always kept.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(tokens[_draw(probabilities, uniform)])


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
