"""Perplexity: how well a model, or its Transformer twin, reads text that it wasn't trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from backpack_lm.config import BackpackConfig
from backpack_lm.counted import counted
from backpack_lm.training.data import Source, stream
from backpack_lm.training.loss import head_loss


class LanguageModel(Protocol):
    """Whatever gives an output [B, T, d] and the embedding [V, d] that scores it: a Backpack or a twin."""

    @property
    def config(self) -> BackpackConfig: ...

    @property
    def embedding(self) -> Tensor: ...

    def mix(self, ids: Tensor) -> Tensor: ...


@torch.no_grad()
def perplexity(model: LanguageModel, ids: Tensor, batch: int = 8, length: int | None = None) -> float:
    """Perplexity of a stream of ids [N], in rows of `length` tokens, by default the context; each row's first
    token is free. Raises ValueError if the ids don't fill a row."""
    length = length or model.config.n_positions
    if len(ids) <= length:
        raise ValueError(f"{counted(len(ids), 'token')} of held-out text; at least {length + 1} are needed")
    rows = ids[: (len(ids) - 1) // length * length + 1].unfold(0, length + 1, length)
    total = 0.0
    for part in rows.split(batch):
        loss = head_loss(model.mix(part[:, :-1]).flatten(0, 1), model.embedding, part[:, 1:].flatten())
        total += loss.item() * len(part)
    return math.exp(total / len(rows))


def held_out(model: LanguageModel, sources: Sequence[Source], folder: Path, limit: int = 200_000) -> dict[str, float]:
    """Perplexity on each source's held-out stream, at most `limit` tokens of each; none of a stream that doesn't
    fill a row."""
    streams = {source.name: stream(source, folder, "heldout")[:limit] for source in sources}
    return {
        name: perplexity(model, torch.from_numpy(ids.astype("int64")))
        for name, ids in streams.items()
        if len(ids) > model.config.n_positions
    }
