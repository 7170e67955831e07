"""What the Transformer makes of each word that stands alone, and the network that makes senses of that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack_lm.model import Trunk

CHUNK = 512
"""Words that are read at a time."""


@torch.no_grad()
def word_states(
    trunk: Trunk, layers: Sequence[int], before: int, dtype: torch.dtype, chunk: int = CHUNK
) -> Iterator[Tensor]:
    """States [n, L, d] of every token of the vocabulary, chunk after chunk, at some layers, each of root mean square 1.

    The token stands after `before`, the end-of-text token: the first position of a text is a sink of attention, whose
    states say nothing of the word.
    """
    device = trunk.wte.weight.device
    for ids in torch.arange(trunk.spec.vocab_size, device=device).split(chunk):
        pairs = torch.stack([torch.full_like(ids, before), ids], dim=1)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            kept = [state[:, 1] for layer, state in enumerate(trunk.states(pairs)) if layer in layers]
        yield F.rms_norm(torch.stack(kept, dim=1).float(), (trunk.spec.width,))


def kept_word_states(trunk: Trunk, layers: Sequence[int], before: int, dtype: torch.dtype, file: Path) -> Tensor:
    """The same of the whole vocabulary, bfloat16 [V, L, d], made once and kept in a file."""
    shape = trunk.spec.vocab_size, len(layers), trunk.spec.width
    if not file.exists():
        partial = file.with_suffix(".partial")
        with partial.open("wb") as out:
            for part in word_states(trunk, layers, before, dtype):
                out.write(part.to(torch.bfloat16).cpu().view(torch.uint8).numpy().tobytes())
        partial.rename(file)
    return torch.from_file(str(file), size=math.prod(shape), dtype=torch.bfloat16).view(shape)


class WordSenses(nn.Module):
    """C: states of lone words [n, L, d] → senses [n, k, d]: a matrix for each sense, of what the Transformer predicts
    after the word (the last of its states), and an MLP of all of them."""

    def __init__(self, layers: int, width: int, inner: int, senses: int) -> None:
        super().__init__()
        self.shape = senses, width
        self.direct = nn.Linear(width, senses * width, bias=False)
        self.c_fc = nn.Linear(layers * width, inner)
        self.c_proj = nn.Linear(inner, senses * width)
        nn.init.zeros_(self.c_proj.weight)
        nn.init.zeros_(self.c_proj.bias)

    def forward(self, states: Tensor) -> Tensor:
        flat: Tensor = self.direct(states[:, -1]) + self.c_proj(F.gelu(self.c_fc(states.flatten(1))))
        return flat.view(len(states), *self.shape)
