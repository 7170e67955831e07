"""The cells (token, sense) of the whole vocabulary that raise or lower given words most.

What a cell does to the logits of words, whatever the text, is its score C(x)_l · r, where r is the mean of E[y] over
the words minus that over the words that they are set against. Set against all words, what raises every logit alike,
and so no probability, has no score. In given prompts a cell adds α·m·C(x)_l · r to them
(attribution.py), summed over the positions at which its token stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from backpack_lm.attribution import attribute_along
from backpack_lm.kernels.scan import project
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable


class Effect(Enum):
    """What cells are looked for: those that raise the words, those that lower them, or both, by magnitude."""

    RAISE = 1
    LOWER = -1
    BOTH = 0

    def size(self, values: Tensor) -> Tensor:
        """How much of this effect values have; what has none of it is 0 or less."""
        return values.abs() if self is Effect.BOTH else values * self.value


@dataclass(frozen=True, slots=True)
class RankedCell:
    """A cell with its score, and in which share of a million tokens its token occurs, if that is known.

    With prompts, `contribution` is what it adds in all of them, and `prompts` counts those in which it has the effect.
    `edited`: the release replaces it, or its topics multiply it by another number than 1.
    """

    token: int
    sense: int
    score: float
    frequency: float | None
    edited: bool
    contribution: float | None = None
    prompts: int = 0


class CellSearch:
    """A search under one overlay: `read` each prompt, if there are any, then ask for cells, best first.

    `against` None is all words of the vocabulary; `frequencies` [V] are occurrences in a million tokens. A score has
    the multipliers of the overlay's topics as they are before they anneal: how far they do depends on a text.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Backpack,
        table: SenseTable,
        overlay: Overlay,
        words: Sequence[int],
        against: Sequence[int] | None = (),
        effect: Effect = Effect.RAISE,
        frequencies: Tensor | None = None,
    ) -> None:
        self._model, self._table, self._overlay = model, table, overlay
        self._effect, self._frequencies = effect, frequencies
        self._direction = direction_of(model, words, against)
        self._contributions: Tensor | None = None
        self._prompts = torch.zeros(self._shape, dtype=torch.int32)

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> None:
        """Add what cells contribute at the end of a prompt."""
        prompt = torch.tensor(ids)
        terms = attribute_along(self._model, self._table, prompt, self._overlay, self._direction)
        found = torch.zeros(self._shape, dtype=torch.float64).index_add_(0, prompt, terms.contributions)
        self._prompts += self._effect.size(found) > 0
        self._contributions = found if self._contributions is None else self._contributions + found

    @torch.inference_mode()
    def cells(self, start: int, count: int, by_use: bool = False) -> list[RankedCell]:
        """So many cells that have the effect, from place `start` on: by their contributions to the prompts that were
        read, else by their scores; `by_use`: by scores times frequencies, which have to be known.

        Equal ones are in the order of their tokens and senses, so that pages fit together.
        """
        scores, edited = self._scores()
        values = scores if self._contributions is None else self._contributions
        if by_use:
            assert self._frequencies is not None
            values = values * self._frequencies[: len(values), None]
        places = _largest(self._effect.size(values).flatten(), start + count)[start:].tolist()
        senses = scores.shape[1]
        frequencies, contributions = self._frequencies, self._contributions
        return [
            RankedCell(
                token := place // senses,
                sense := place % senses,
                float(scores[token, sense]),
                None if frequencies is None else float(frequencies[token]),
                bool(edited[token, sense]),
                None if contributions is None else float(contributions[token, sense]),
                int(self._prompts[token, sense]),
            )
            for place in places
        ]

    @property
    def _shape(self) -> tuple[int, int]:
        """V, k: of tokens, without the padding of the vocabulary."""
        return self._model.config.tokens, self._model.config.num_senses

    def _scores(self) -> tuple[Tensor, Tensor]:
        """The score of each cell as the overlay leaves it, and whether that differs from the model's, each [V, k]."""
        overlay, ids = self._overlay, torch.arange(self._shape[0])
        scores = project(self._table.rows[: self._shape[0]], self._direction)
        rows = overlay.row_index(ids)
        edited = rows >= 0
        scores[edited] = (overlay.rows.float() @ self._direction)[rows[edited]]
        for topic in overlay.topics:
            multipliers = topic.targets(ids)
            scores, edited = scores * multipliers, edited | (multipliers != 1)
        return scores, edited


def direction_of(model: Backpack, words: Sequence[int], against: Sequence[int] | None) -> Tensor:
    """r [d]: the mean of E[y] over words, less that over those that they are set against; None is all words."""
    direction = model.embedding[list(words)].float().mean(0)
    if against is None:
        return direction - model.embedding[: model.config.tokens].float().mean(0)
    return direction - model.embedding[list(against)].float().mean(0) if against else direction


def _largest(values: Tensor, count: int) -> Tensor:
    """Places of the `count` largest of values [n] above 0, largest first, equal ones in their order."""
    least = values.topk(min(count, len(values))).values[-1].clamp_min(0)
    places = (values >= least if least > 0 else values > 0).nonzero()[:, 0]
    order = values[places].sort(descending=True, stable=True).indices
    return places[order[:count]]
