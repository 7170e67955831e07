"""Logits → tokens, seeded per request: the same request draws the same tokens in any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backpack_lm.kernels import DrawParams
from backpack_lm.kernels.noise import log_exponentials
from torch import Tensor

from backpack_serving.engine.sequence import LogProbability
from backpack_serving.sampling import SamplingParams

Draw = Callable[[Tensor, Sequence[DrawParams]], Tensor]
"""`Kernels.draw`."""

Logs = Callable[[Tensor, Sequence[int], int], tuple[Tensor, Tensor, Tensor]]
"""`Kernels.log_probabilities`."""


def choose(logits: Tensor, sampling: SamplingParams, position: int) -> int:
    """One token from logits [V], drawn as argmax_y (logit_y/temperature − log e_y), e_y exponential.

    That is Gumbel's trick. The noise e is a function of (seed, position) and the token alone, so neither the batch
    nor the order of requests can change it. Nor can rounding, but for the rarest ties: inverting the cumulative
    distribution, where every rounding error moves thousands of borders, drew other tokens in a long text.

    This is the definition; the engine draws a batch's tokens by `choose_all`.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    kept = _kept(logits, sampling)
    noise = log_exponentials([_seed(sampling)], [position], kept)[0]
    return int(kept[(logits[kept] / sampling.temperature - noise).argmax()])


def choose_all(
    logits: Tensor, samplings: Sequence[SamplingParams], positions: Sequence[int], draw: Draw
) -> list[int | None]:
    """`choose` for each row of logits [B, V] at once. None: the row isn't numbers."""
    params = [
        DrawParams(s.temperature, _seed(s) if s.temperature else 0, position, s.top_k, s.top_p)
        for s, position in zip(samplings, positions, strict=True)
    ]
    return [token if token >= 0 else None for token in draw(logits, params).tolist()]


def _kept(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """The tokens that may be drawn: the top_k likeliest, of those the smallest set of mass top_p."""
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    limit = min(sampling.top_k or len(logits), len(logits))
    mass = (ordered[:limit].double() / sampling.temperature).softmax(-1)
    # Keep tokens while those before them have less than top_p: at least one is always kept.
    before = mass.cumsum(-1) - mass
    return tokens[:limit][(before < sampling.top_p) | (sampling.top_p == 1)]


def _seed(sampling: SamplingParams) -> int:
    assert sampling.seed is not None, "requests are given a seed at admission"
    return sampling.seed


def log_probability(logits: Tensor, token: int, alternatives: int) -> LogProbability:
    """Natural log-probability of a token under logits [V] at temperature 1, with the top alternatives.

    This is the definition; the engine has a batch's by `log_probabilities`.
    """
    logs = logits.double().log_softmax(-1)
    top = logs.topk(min(alternatives, len(logs)))
    return LogProbability(float(logs[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def log_probabilities(
    logits: Tensor, tokens: Sequence[int | None], samplings: Sequence[SamplingParams], logs: Logs
) -> list[LogProbability | None]:
    """`log_probability` for each row of logits [B, V] at once. None: it wasn't asked for, or there is no token."""
    found: list[LogProbability | None] = [None] * len(logits)
    asked = [
        (n, token, sampling.log_probabilities)
        for n, (token, sampling) in enumerate(zip(tokens, samplings, strict=True))
        if token is not None and sampling.log_probabilities is not None
    ]
    if not asked:
        return found
    rows, chosen, counts = zip(*asked, strict=True)
    most = min(max(counts), logits.shape[1])
    parts = logs(logits if len(rows) == len(logits) else logits[list(rows)], chosen, most)
    for n, count, own, likeliest, theirs in zip(rows, counts, *(part.tolist() for part in parts), strict=True):
        found[n] = LogProbability(own, tuple(zip(likeliest[:count], theirs[:count], strict=True)))
    return found
