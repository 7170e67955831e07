"""What requests ask of their logits before a token is drawn. As in vLLM: biases, ends that come too early and forbidden
words, then penalties, then `min_p`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from backpack_serving.engine.sequence import Sequence as Text
from backpack_serving.sampling import SamplingParams


def change(
    logits: Tensor, prompt: Sequence[int], made: Sequence[int], sampling: SamplingParams, ends: Collection[int]
) -> Tensor:
    """Logits [V] for the token behind `prompt` and `made`, as they are drawn from. `ends` are the ids that end a text.

    This is the definition; the engine changes a batch's by `change_all`.
    """
    out = logits.clone()
    for token, bias in sampling.logit_bias:
        out[token] += bias
    for token in _forbidden(made, sampling, ends):
        out[token] = -math.inf
    for token in {*prompt, *made}:
        out[token] = (
            out[token] / sampling.repetition_penalty if out[token] > 0 else out[token] * sampling.repetition_penalty
        )
    for token, count in Counter(made).items():
        out[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    if sampling.min_p and sampling.temperature:
        out[out < out.max() + sampling.temperature * math.log(sampling.min_p)] = -math.inf
    return out


def change_all(logits: Tensor, texts: Sequence[Text], ends: Collection[int]) -> Tensor:
    """`change` for each row of logits [B, V] at once; the same tensor if nobody asks for anything."""
    rows = [n for n, text in enumerate(texts) if text.request.sampling.changes_logits]
    if not rows:
        return logits
    biases, forbidden, repeated, taken = _Cells(), _Cells(), _Cells(), _Cells()
    for row in rows:
        text, sampling = texts[row], texts[row].request.sampling
        made = text.tokens[len(text.request.prompt) :]
        if sampling.logit_bias:
            biases.add(row, *zip(*sampling.logit_bias, strict=True))
        forbidden.add(row, list(_forbidden(made, sampling, ends)), -math.inf)
        if sampling.repetition_penalty != 1:
            repeated.add(row, np.unique(text.tokens), sampling.repetition_penalty)
        if made and (sampling.frequency_penalty or sampling.presence_penalty):
            tokens, counts = np.unique(made, return_counts=True)
            taken.add(row, tokens, sampling.frequency_penalty * counts + sampling.presence_penalty)
    out = logits.clone()
    if where := biases.of(out):
        out[where[:2]] += where[2]
    if where := forbidden.of(out):
        out[where[:2]] = where[2]
    if where := repeated.of(out):
        now = out[where[:2]]
        out[where[:2]] = torch.where(now > 0, now / where[2], now * where[2])
    if where := taken.of(out):
        out[where[:2]] -= where[2]
    samplings = {row: texts[row].request.sampling for row in rows}
    truncated = [row for row, each in samplings.items() if each.min_p and each.temperature]
    if truncated:
        gaps = [samplings[row].temperature * math.log(samplings[row].min_p) for row in truncated]
        some = out[truncated]
        least = some.amax(1, keepdim=True) + torch.tensor(gaps, device=out.device)[:, None]
        out[truncated] = some.masked_fill(some < least, -math.inf)
    return out


def _forbidden(made: Sequence[int], sampling: SamplingParams, ends: Collection[int]) -> Iterator[int]:
    """Tokens that may not come next: ends while the text is too short, and the last token of a forbidden word."""
    if len(made) < sampling.min_tokens:
        yield from ends
    for *first, last in sampling.bad_words:
        if not first or list(made[-len(first) :]) == first:
            yield last


class _Cells:
    """Places of logits [B, V] and a value for each, no place twice."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._tokens: list[int] = []
        self._values: list[float] = []

    def add(self, row: int, tokens: Sequence[int] | np.ndarray, values: float | Sequence[float] | np.ndarray) -> None:
        self._rows += [row] * len(tokens)
        self._tokens += list(tokens)
        self._values += [values] * len(tokens) if isinstance(values, float) else list(values)

    def of(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows, tokens and values, on the device of logits; None if there are none."""
        if not self._rows:
            return None
        device = logits.device
        rows, tokens = torch.tensor(self._rows, device=device), torch.tensor(self._tokens, device=device)
        return rows, tokens, torch.tensor(self._values, dtype=logits.dtype, device=device)
