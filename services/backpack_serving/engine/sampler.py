"""Logits → tokens, seeded per request: the same request draws the same tokens in any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from backpack_lm.kernels.noise import log_exponentials
from torch import Tensor

from backpack_serving.engine.sampling import Sampling
from backpack_serving.engine.sequence import LogProbability

Draw = Callable[[Tensor, Sequence[float], Sequence[int], Sequence[int]], Tensor]
"""`Kernels.draw`."""

LIKELY = 1024
"""Tokens among which the smallest set of mass top_p is looked for first; seldom it isn't among them."""


def choose(logits: Tensor, sampling: Sampling, position: int) -> int:
    """One token from logits [V], drawn as argmax_y (logit_y/temperature − log e_y), e_y exponential.

    That is Gumbel's trick. The noise e is a function of (seed, position) and the token alone, so neither the batch
    nor the order of requests can change it. Nor can rounding, but for the rarest ties: inverting the cumulative
    distribution, where every rounding error moves thousands of borders, drew other tokens in a long text.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    kept = _kept(logits, sampling)
    noise = log_exponentials([_seed(sampling)], [position], kept)[0]
    return int(kept[(logits[kept] / sampling.temperature - noise).argmax()])


def choose_all(
    logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int], draw: Draw
) -> list[int | None]:
    """`choose` for each row of logits [B, V] at once, but for those that truncate. None: the row isn't numbers."""
    # A row that truncates is looked through all the same, for the greatest: then it is known to be numbers.
    temperatures = [0.0 if _truncates(s) else s.temperature for s in samplings]
    seeds = [_seed(s) if heat else 0 for s, heat in zip(samplings, temperatures, strict=True)]
    chosen: list[int | None] = []
    for n, token in enumerate(draw(logits, temperatures, seeds, positions).tolist()):
        if token >= 0 and temperatures[n] != samplings[n].temperature:
            token = choose(logits[n], samplings[n], positions[n])
        chosen.append(None if token < 0 else token)
    return chosen


def _truncates(sampling: Sampling) -> bool:
    return bool(sampling.top_k) or sampling.top_p < 1.0


def _kept(logits: Tensor, sampling: Sampling) -> Tensor:
    """The tokens that may be drawn [n]: the top_k likeliest, of those the smallest set of mass top_p."""
    if not _truncates(sampling):
        return torch.arange(len(logits), device=logits.device)
    limit = min(sampling.top_k or len(logits), len(logits))
    if sampling.top_p == 1.0:
        return logits.topk(limit).indices
    scaled = logits.double() / sampling.temperature
    total = None if sampling.top_k else scaled.logsumexp(-1)
    for size in dict.fromkeys((min(limit, LIKELY), limit)):
        values, tokens = scaled.topk(size)
        mass = (values - (values.logsumexp(-1) if total is None or size == limit else total)).exp()
        # Keep tokens while those before them have less than top_p: at least one is always kept.
        before = mass.cumsum(-1) - mass
        if size == limit or (total is not None and float(before[-1] + mass[-1]) >= sampling.top_p):
            return tokens[before < sampling.top_p]
    raise AssertionError("the last size is all there are")


def _seed(sampling: Sampling) -> int:
    assert sampling.seed is not None, "requests are given a seed at admission"
    return sampling.seed


def log_probability(logits: Tensor, token: int, alternatives: int) -> LogProbability:
    """Natural log-probability of a token under logits [V] at temperature 1, with the top alternatives."""
    logs = logits.double().log_softmax(-1)
    top = logs.topk(min(alternatives, len(logs)))
    return LogProbability(float(logs[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
