"""What requests ask of their logits before a token is drawn. As in vLLM: biases, ends that come too early and forbidden
words, then penalties, then `min_p`; and what a text's grammar allows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from backpack_serving.engine.sequence import Sequence as Text
from backpack_serving.sampling import SamplingParams


def change(
    logits: Tensor,
    prompt: Sequence[int],
    made: Sequence[int],
    sampling: SamplingParams,
    ends: Collection[int],
    allowed: Collection[int] | None = None,
) -> Tensor:
    """Logits [V] for the token behind `prompt` and `made`, as they are drawn from. `ends` are the ids that end a text,
    `allowed` those that its grammar allows, if it has one. All are −∞ if none is left.

    The reference that tests hold `change_all` to; the engine doesn't call it.
    """
    out = logits.clone()
    for token, bias in sampling.logit_bias:
        out[token] += bias
    only_ends = allowed is not None and set(allowed) <= set(ends)
    for token in _forbidden(made, sampling, () if only_ends else ends):
        out[token] = -math.inf
    if allowed is not None:
        out[[token for token in range(len(out)) if token not in allowed]] = -math.inf
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
    rows = [n for n, text in enumerate(texts) if text.grammar or text.request.sampling.changes_logits]
    if not rows:
        return logits
    biases, forbidden, repeated, taken = _Cells(), _Cells(), _Cells(), _Cells()
    outside = _Outside(logits.shape)
    for row in rows:
        text, sampling = texts[row], texts[row].request.sampling
        if text.grammar:
            outside.add(row, text.grammar.allowed())
        if sampling.logit_bias:
            biases.add(row, *zip(*sampling.logit_bias, strict=True))
        if sampling.min_tokens or sampling.bad_words:
            made = text.tokens[len(text.request.prompt) :]
            early = () if outside.all_but(row, ends) else ends
            forbidden.add(row, tuple(_forbidden(made, sampling, early)), -math.inf)
        if sampling.repetition_penalty != 1:
            repeated.add(row, text.seen_tokens()[0], sampling.repetition_penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            tokens, counts = text.seen_tokens()
            penalties = sampling.frequency_penalty * counts + sampling.presence_penalty
            taken.add(row, tokens[counts > 0], penalties[counts > 0])
    out = outside.removed_from(logits)
    flat = out.view(-1)
    if where := biases.of(out):
        flat[where[0]] += where[1]
    if where := forbidden.of(out):
        flat[where[0]] = where[1]
    if where := repeated.of(out):
        now = flat[where[0]]
        flat[where[0]] = torch.where(now > 0, now / where[1], now * where[1])
    if where := taken.of(out):
        flat[where[0]] -= where[1]
    samplings = {row: texts[row].request.sampling for row in rows}
    truncated = [row for row, each in samplings.items() if each.min_p and each.temperature]
    if truncated:
        gaps = [samplings[row].temperature * math.log(samplings[row].min_p) for row in truncated]
        some = out[truncated]
        least = some.amax(1, keepdim=True) + torch.tensor(gaps, device=out.device)[:, None]
        out[truncated] = some.masked_fill_(some < least, -math.inf)
    return out


def _forbidden(made: Sequence[int], sampling: SamplingParams, ends: Collection[int]) -> Iterator[int]:
    """Tokens that may not come next: ends while the text is too short (and its grammar allows more), and the last
    token of a forbidden word."""
    if len(made) < sampling.min_tokens:
        yield from ends
    for *first, last in sampling.bad_words:
        if not first or list(made[-len(first) :]) == first:
            yield last


class _Cells:
    """Places of logits [B, V] and a value for each. A place may occur twice where its values are the same, as those of
    forbidden tokens are."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._tokens: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(self, row: int, tokens: ArrayLike, values: ArrayLike) -> None:
        """Places of one row; a single value is that of all of them."""
        self._rows.append(row)
        self._tokens.append(np.asarray(tokens, np.int64))
        self._values.append(np.broadcast_to(np.asarray(values, np.float32), self._tokens[-1].shape))

    def of(self, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """Places in the flat logits and values, on their device; None if there are none."""
        if not any(map(len, self._tokens)):
            return None
        starts = np.multiply(self._rows, logits.shape[1])
        places = np.concatenate([start + tokens for start, tokens in zip(starts, self._tokens, strict=True)])
        values = torch.from_numpy(np.concatenate(self._values)).to(logits)
        return torch.from_numpy(places).to(logits.device), values


class _Outside:
    """Places of logits [B, V] that grammars don't allow. Nothing is made until there is a grammar."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = shape
        self._mask: np.ndarray | None = None

    def add(self, row: int, allowed: np.ndarray) -> None:
        if self._mask is None:
            self._mask = np.zeros(self._shape, np.bool_)
        np.logical_not(allowed, out=self._mask[row])

    def all_but(self, row: int, tokens: Collection[int]) -> bool:
        """Whether none but these is allowed in a row."""
        if self._mask is None or not self._mask[row].any():
            return False
        others = ~self._mask[row]
        others[list(tokens)] = False
        return not others.any()

    def removed_from(self, logits: Tensor) -> Tensor:
        """A copy of logits that is −∞ at these places."""
        if self._mask is None:
            return logits.clone(memory_format=torch.contiguous_format)
        return logits.masked_fill(torch.from_numpy(self._mask).to(logits.device), -math.inf).contiguous()
