"""A topic vector, added to the senses of frequent words and subtracted from those of the topic's own words.

Multipliers only raise what senses already contribute, so they need a text that is about the topic. Frequent words
stand in every text. As Σ_j α_lj = 1 for each sense, a vector added to all senses of all words would shift the logits
everywhere alike. Added to frequent words and subtracted from the topic's words, it fades once the topic is present.
Related words gain too, in proportion to their embedding's component along the vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from backpack_lm.lab.batch_sampler import sample
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.overlay import SenseTable
from backpack_lm.patch import AddEdit, Cell, Edit, PatchError, Vector, Violation

NATS = {1: 2.5, 2: 3.5, 3: 4.5}
"""What the topic's words gain on the average over a text of the model, by strength."""
CELLS = 2000
RIDGE = 0.3  # of the mean spread of an embedding's numbers: the more, the more do related words move


@dataclass(frozen=True, slots=True)
class FrequentWords:
    """The words that a model writes most, by their ids, and each one's share of its text."""

    tokens: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, subject: LabModel, texts: int = 64, length: int = 100, seed: int = 0) -> FrequentWords:
        """From ancestral samples of the unedited model. Raises ValueError if it has no end-of-text token."""
        eos = subject.config.eos_token_id
        if eos is None:
            raise ValueError("this model has no end-of-text token to begin a text with, so it can't be seen writing")
        length = min(length, subject.config.n_positions - 1)
        ids = sample(subject, subject.overlay(), [eos], texts, length, seed)
        counts = ids.flatten().bincount(minlength=subject.config.tokens)
        counts[subject.table.unscored[: len(counts)]] = 0
        order = counts.argsort(descending=True, stable=True)[: CELLS // subject.config.num_senses]
        order = order[counts[order] > 0]
        return cls(tuple(order.tolist()), tuple((counts[order] / ids.numel()).tolist()))


def direction(subject: LabModel, tokens: Sequence[int]) -> Tensor:
    """u [d]: added to o, it raises the logits of `tokens` by 1 on the average, all measured from the mean logit.

    u = (Cov E + ε)⁻¹ (E[tokens] − mean E), the regularised direction that spreads the other logits least. What it
    adds to all of them alike changes no probability, so it costs nothing.
    """
    inverse, mean = _least_spread(subject.table)
    towards = subject.model.embedding[list(tokens)].mean(0) - mean
    u = inverse @ towards
    found: Tensor = u / (towards @ u)
    return found


def topic_vector_edits(subject: LabModel, tokens: Sequence[int], strength: int, frequent: FrequentWords) -> list[Edit]:
    """Two edits of at most CELLS cells: δ added to every sense of the frequent words, and taken from those of the
    topic's `tokens`. In a text of frequent words alone, δ would raise the topic's logits by NATS[strength] / the
    frequent words' share of an ordinary text.

    Raises PatchError for an unknown strength, ValueError if no cell is left for a frequent word.
    """
    if strength not in NATS:
        raise PatchError(Violation("strength", "OUT_OF_RANGE", f"{strength}; use 1, 2 or 3"))
    senses, own = range(subject.config.num_senses), set(tokens)
    room = CELLS // len(senses) - len(own)
    pairs = zip(frequent.tokens, frequent.shares, strict=True)
    steered = [(token, share) for token, share in pairs if token not in own][: max(room, 0)]
    if not steered:
        raise ValueError(f"{len(own)} topic words leave no cell of {CELLS} for frequent words; give fewer")
    share = sum(share for _, share in steered)
    delta = NATS[strength] / share / len(senses) * direction(subject, tokens)
    return [
        AddEdit(tuple(Cell(token, sense) for token, _ in steered for sense in senses), Vector.of(delta.tolist())),
        AddEdit(tuple(Cell(token, sense) for token in sorted(own) for sense in senses), Vector.of((-delta).tolist())),
    ]


@lru_cache(maxsize=1)
def _least_spread(table: SenseTable) -> tuple[Tensor, Tensor]:
    """(Cov E + ε)⁻¹ [d, d], and the mean of E [d]."""
    head = table.embedding[~table.unscored]
    mean = head.mean(0)
    spread = (head - mean).t() @ (head - mean) / len(head)
    spread += RIDGE * spread.trace() / len(spread) * torch.eye(len(spread))
    return torch.linalg.inv(spread), mean
