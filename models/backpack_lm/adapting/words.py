"""What a trunk makes of each word that stands alone, and the network that makes senses of that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack_lm.model import Block, Trunk

CHUNK = 512
"""Words that are read at a time."""


@torch.no_grad()
def word_states(
    trunk: Trunk, layers: Sequence[int], end_of_text: int, dtype: torch.dtype, chunk: int = CHUNK
) -> Iterator[Tensor]:
    """States [n, L, d] of every token of the vocabulary, chunk after chunk, at some layers, each of root mean square 1.

    The token stands after `end_of_text`: the first position of a text is a sink of attention, whose states say nothing
    of the word. What all words find there is computed once.
    """
    device = trunk.wte.weight.device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        sink = list(_sink(trunk, torch.tensor([[end_of_text]], device=device)))
    for ids in torch.arange(trunk.spec.vocab_size, device=device).split(chunk):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            states = _second_states(trunk, ids[:, None], sink)
            kept = [state[:, 0] for layer, state in enumerate(states) if layer in layers]
        yield F.rms_norm(torch.stack(kept, dim=1).float(), (trunk.spec.width,))


def _sink(trunk: Trunk, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values [1, G, 1, w] of each layer at the first position."""
    x, turns = trunk.embed(ids)
    for block in trunk.h:
        assert isinstance(block, Block)
        _, k, v = block.attn.query_key_value(block.ln_1(x), turns)
        yield k, v
        x = block(x, turns)


def _second_states(trunk: Trunk, ids: Tensor, sink: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """As `Trunk.states`, of ids [n, 1] at the second position."""
    x, turns = trunk.embed(ids, 1)
    for block, (first_k, first_v) in zip(trunk.h, sink, strict=True):
        assert isinstance(block, Block)
        yield x
        q, k, v = block.attn.query_key_value(block.ln_1(x), turns)
        keys, values = (torch.cat([a.expand_as(b), b], dim=2) for a, b in ((first_k, k), (first_v, v)))
        grouped = q.shape[1] > k.shape[1]
        mixed = F.scaled_dot_product_attention(q, keys, values, scale=block.attn.scale, enable_gqa=grouped)
        x = x + block.attn.c_proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    yield trunk.ln_f(x)


def kept_word_states(trunk: Trunk, layers: Sequence[int], end_of_text: int, dtype: torch.dtype, file: Path) -> Tensor:
    """The same of the whole vocabulary, bfloat16 [V, L, d], made once and kept in a file."""
    shape = trunk.spec.vocab_size, len(layers), trunk.spec.width
    if not file.exists():
        partial = file.with_suffix(".partial")
        with partial.open("wb") as out:
            for part in word_states(trunk, layers, end_of_text, dtype):
                out.write(part.to(torch.bfloat16).cpu().view(torch.uint8).numpy().tobytes())
        partial.rename(file)
    return torch.from_file(str(file), size=math.prod(shape), dtype=torch.bfloat16).view(shape)


class WordSenses(nn.Module):
    """C: states of lone words [n, L, d] → senses [n, k, d]: a matrix for each sense, of the trunk's output (the last
    of the states), and an MLP of all of them."""

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
