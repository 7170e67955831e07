"""Many samples of one length at once, under one overlay each: what experiments generate with.

Each step computes one new position from caches, as a server does; the overlays are those that serving uses. All
sequences begin and grow together, so there are no slots and nothing to schedule. `Backpack` is the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack_lm.lab.lab_model import LabModel
from backpack_lm.model import Block
from backpack_lm.overlay import Overlay


class BatchSampler:
    """B sequences under one overlay. `feed` takes their next tokens and gives logits of what follows."""

    def __init__(self, subject: LabModel, overlay: Overlay, count: int, length: int) -> None:
        if not 0 < length <= subject.config.n_positions:
            raise ValueError(f"{length} tokens; the context holds 1 to {subject.config.n_positions}")
        config, width = subject.config, subject.config.n_embd
        self.subject, self.overlay = subject, overlay
        layer = config.trunk.layer
        trunk = (config.trunk.depth, count, layer.kv_heads, length, layer.head_width)
        self._keys, self._values = torch.zeros(trunk), torch.zeros(trunk)
        self._sense_keys = torch.zeros(count, config.num_senses, length, config.sense_head_width)
        self._senses = torch.zeros(count, length, config.num_senses, width)
        self._satisfied = torch.zeros(count, length, config.num_senses)  # Σ relu(E[x_i]·C(x_j)_l) so far
        self.ids = torch.zeros(count, length, dtype=torch.long)
        self.at = 0

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """Add a token [B] to each sequence; logits [B, tokens] of the next ones."""
        at, model, tokens = self.at, self.subject.model, tokens.contiguous()
        self.ids[:, at] = tokens
        self.at += 1
        senses = self.overlay.replace(tokens[:, None], self.subject.table.rows[tokens][:, None])[:, 0]
        self._senses[:, at] = senses
        q, k = (part[:, 0] for part in model.sense_weight_net.query_key(self._states(tokens, at), at))
        self._sense_keys[:, :, at] = k
        scores = torch.einsum("bkw,bktw->bkt", q, self._sense_keys[:, :, : self.at])
        alpha = (scores / math.sqrt(self.subject.config.sense_head_width)).softmax(-1)
        if self.overlay.topics:
            alpha = alpha * self._multipliers(tokens).transpose(1, 2)
        mixed = torch.einsum("bkt,btkd->bd", alpha, self._senses[:, : self.at])
        return self.overlay.biased(mixed @ self.subject.head.t())

    def _states(self, tokens: Tensor, at: int) -> Iterator[Tensor]:
        """The trunk's states [B, 1, d] of the new position, as `Trunk.states`."""
        trunk = self.subject.model.gpt2_model
        x, turns = trunk.embed(tokens[:, None], at)
        for layer, block in enumerate(trunk.h):
            assert isinstance(block, Block)
            yield x
            q, k, v = block.attn.query_key_value(block.ln_1(x), turns)
            self._keys[layer][:, :, at], self._values[layer][:, :, at] = k[:, :, 0], v[:, :, 0]
            mixed = F.scaled_dot_product_attention(
                q,
                self._keys[layer][:, :, : self.at],
                self._values[layer][:, :, : self.at],
                scale=block.attn.scale,
                enable_gqa=q.shape[1] > k.shape[1],
            )
            x = x + block.attn.c_proj(mixed.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        yield trunk.ln_f(x)

    def _multipliers(self, tokens: Tensor) -> Tensor:
        """Effective multipliers [B, T, k] of the cells so far, one new token's dots added to each."""
        seen, embedding = slice(self.at), self.subject.model.embedding
        before, new = self._senses[:, : self.at - 1], self._senses[:, self.at - 1]
        self._satisfied[:, : self.at - 1] += torch.einsum("bd,btkd->btk", embedding[tokens], before).relu()
        history = embedding[self.ids[:, seen]]  # [B, T, d]
        self._satisfied[:, self.at - 1] = torch.einsum("btd,bkd->bkt", history, new).relu().sum(-1)
        places = torch.arange(self.at)[:, None]
        out = torch.ones(())
        for topic in self.overlay.topics:
            out = out * topic.anneal(topic.targets(self.ids[:, seen]), self._satisfied[:, seen], places)
        return out


@torch.inference_mode()
def sample(
    subject: LabModel,
    overlay: Overlay,
    prompt: Sequence[int],
    count: int,
    length: int,
    seed: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`count` ancestral samples of `length` tokens after a prompt: [count, length].

    `bias` [tokens] is added to every step's logits: the baseline that topics are compared with.
    """
    sampler = BatchSampler(subject, overlay, count, len(prompt) + length)
    random = torch.Generator().manual_seed(seed)
    for token in prompt:
        logits = sampler.feed(torch.full((count,), token))
    for _ in range(length):
        scores = logits if bias is None else logits + bias
        tokens = torch.multinomial(scores.softmax(-1), 1, generator=random)[:, 0]
        logits = sampler.feed(tokens)
    return sampler.ids[:, len(prompt) :]
