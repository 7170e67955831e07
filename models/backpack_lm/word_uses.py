"""Where a word is used in a text, and what each of its senses says there.

At position j, sense l of the word adds α[l,i,j] · m[i,j,l] · (E[y]·C(x_j)_l) to the logit of the token y that follows
at i + 1 (attribution.py). From E[y] the mean over the vocabulary is subtracted: what raises every logit alike says
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.tokenizer import Tokenizer
from backpack_lm.trunk_pass import TrunkPass

BEFORE, AFTER = 32, 16
"""Most tokens of its paragraph that are read before a word, and after it."""


@dataclass(frozen=True, slots=True)
class UseReading:
    """A word's place in a text: tokens of the same paragraph on both sides, and the contributions [len(after), k] of
    its senses to the logits of those after it."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    contributions: Tensor


class ParagraphedText:
    """A text's paragraphs as one row of ids, to find words in that a model reads."""

    def __init__(self, text: str, tokenizer: Tokenizer, model: Backpack) -> None:
        self._model, self._head = model, model.embedding.detach()[: model.config.tokens]
        self._mean = self._head.mean(0)
        self._begin = tokenizer.bos_ids
        paragraphs = tokenizer.encode_batch([line for line in text.splitlines() if line.strip()])
        self._ids = torch.tensor([token for paragraph in paragraphs for token in paragraph], dtype=torch.int32)
        self._ends = torch.tensor(list(accumulate(map(len, paragraphs))), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def places(self, token: int) -> list[int]:
        """Where a token stands with another one of its paragraph after it."""
        places = (self._ids == token).nonzero()[:, 0]
        return places[~torch.isin(places + 1, self._ends)].tolist()

    @torch.inference_mode()
    def use(self, table: SenseTable, overlay: Overlay, place: int) -> UseReading:
        """The use of a token at one of its places, under an overlay: a pass of the trunk."""
        paragraph = int(torch.searchsorted(self._ends, place, right=True))
        start = int(self._ends[paragraph - 1]) if paragraph else 0
        room = self._model.config.n_positions - len(self._begin) - 1
        after = min(AFTER, int(self._ends[paragraph]) - place - 1, room)
        before = min(BEFORE, place - start, room - after)
        row = self._ids[place - before : place + after + 1].tolist()
        ids = torch.tensor([*self._begin, *row])
        at = len(ids) - after - 1
        read = TrunkPass(self._model, table, ids[:-1], at)
        said = (self._head[ids[at + 1 :]] - self._mean).double() @ read.replaced(overlay)[at].double().t()  # [after, k]
        weights = (read.alpha * read.multipliers(overlay))[:, at].double()
        return UseReading(tuple(row[:before]), tuple(row[before + 1 :]), weights * said)


def spread(places: Sequence[int], limit: int) -> list[int]:
    """At most `limit` of them, evenly spread."""
    if len(places) <= limit:
        return list(places)
    return [places[len(places) * number // limit] for number in range(limit)]
