"""Backpack in torch, from the equations of the paper (Hewitt et al. 2023, sections 2 and 3).

    g    = GPT-2(x)                                        trunk          [B, T, d]
    C(x) = MLP2(LN2(r2)), r2 = r1 + MLP(LN1(r1)), r1 = e + LN(e), e = E[x]
                                                           senses         [B, T, k, d]
    α    = softmax_j(q_i·k_j / √(d/k)), causal             sense weights  [B, k, T, T]
    o_i  = Σ_l Σ_j α[l,i,j] C(x_j)_l ;  logits = o Eᵀ      mix and head   [B, T, V]

C depends on the token alone, so after training it is a table (`Backpack.sense_table`); an overlay
changes that table and nothing else. This file is the slow, obvious reference: `generate` recomputes
everything for every token and is the oracle that every faster path is held equal to. Module names
are the published checkpoint's, so a state dict is a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack_lm.config import BackpackConfig
from backpack_lm.denominators import Progress, compute
from backpack_lm.overlay import Overlay, SenseTable

TABLE_CHUNK, NORMS_CHUNK = 2048, 256
"""Tokens whose senses are computed at a time: for the table, and for norms alone, in double."""


class Conv1D(nn.Module):
    """Linear layer with its weight stored [in, out], as GPT-2 checkpoints store it."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner, outer).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class MLP(nn.Module):
    """d → inner → outer with GPT-2's tanh-approximated gelu."""

    def __init__(self, width: int, inner: int, outer: int) -> None:
        super().__init__()
        self.c_fc = Conv1D(width, inner)
        self.c_proj = Conv1D(inner, outer)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return out


def causal_softmax(scores: Tensor) -> Tensor:
    """Softmax over j of scores [..., T, T], position i seeing the positions j ≤ i."""
    seen = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
    return (scores + seen).softmax(-1)


class Attention(nn.Module):
    """Causal self-attention, scaled by 1/√(d/H) and, in every Stanford model, by 1/(layer + 1)."""

    def __init__(self, config: BackpackConfig, layer: int) -> None:
        super().__init__()
        self.heads = config.n_head
        self.scale = 1.0 / math.sqrt(config.n_embd // config.n_head)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, d = x.shape
        q, k, v = (
            part.view(B, T, self.heads, -1).transpose(1, 2)  # [B, H, T, d/H]
            for part in self.c_attn(x).split(d, dim=-1)
        )
        mixed = causal_softmax(q * self.scale @ k.mT) @ v
        out: Tensor = self.c_proj(mixed.transpose(1, 2).reshape(B, T, d))
        return out


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, config: BackpackConfig, layer: int) -> None:
        super().__init__()
        d, eps = config.n_embd, config.layer_norm_epsilon
        self.ln_1 = nn.LayerNorm(d, eps)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(d, eps)
        self.mlp = MLP(d, 4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Trunk(nn.Module):
    """GPT-2 with its final LayerNorm: ids [B, T] → g [B, T, d]."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2's scaling of residual projections
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x)
        out: Tensor = self.ln_f(x)
        return out


class SenseBlock(nn.Module):
    """The sense network's block: like a Transformer block, but nothing mixes positions."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        d, eps = config.n_embd, config.layer_norm_epsilon
        self.ln_1 = nn.LayerNorm(d, eps)
        self.ln_2 = nn.LayerNorm(d, eps)
        self.mlp = MLP(d, config.sense_mlp_widths[0], d)


class SenseNetwork(nn.Module):
    """C: embeddings e [..., d] → sense vectors [..., k, d]. Sees one token, no position, no context."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.num_senses = config.num_senses
        d = config.n_embd
        self.ln = nn.LayerNorm(d, config.layer_norm_epsilon)
        self.block = SenseBlock(config)
        self.final_mlp = MLP(d, config.sense_mlp_widths[1], config.num_senses * d)

    def forward(self, e: Tensor) -> Tensor:
        r = e + self.ln(e)
        r = r + self.block.mlp(self.block.ln_1(r))
        flat: Tensor = self.final_mlp(self.block.ln_2(r))
        return flat.view(*e.shape[:-1], self.num_senses, e.shape[-1])


class SenseWeights(nn.Module):
    """α: trunk output g [B, T, d] → weights [B, k, T, T], a softmax over the positions j ≤ i."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.num_senses, self.head_width = config.num_senses, config.sense_head_width
        self.c_attn = nn.Linear(config.n_embd, 2 * self.num_senses * self.head_width)
        # As small as elsewhere (.02), every sense would start as the mean of the whole text, and most would stay
        # near it. With keys that equal the queries, a position starts by weighing itself and what resembles it;
        # 1.5 was found with heads 24 wide, and wider ones weigh themselves no more than those.
        query, key = self.c_attn.weight.data.chunk(2)
        sharpness = 1.5 * min(1.0, 24 / self.head_width) ** 0.25
        nn.init.normal_(query, std=sharpness / math.sqrt(config.n_embd))
        key.copy_(query)
        nn.init.zeros_(self.c_attn.bias)

    def query_key(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """q and k, each [..., k, d/k]; q is the first half of the projection."""
        q, k = self.c_attn(g).unflatten(-1, (2, self.num_senses, self.head_width)).unbind(-3)
        return q, k

    def forward(self, g: Tensor) -> Tensor:
        q, k = (part.transpose(1, 2) for part in self.query_key(g))  # [B, k, T, d/k]
        return causal_softmax(q / math.sqrt(self.head_width) @ k.mT)


class Backpack(nn.Module):
    """A Backpack language model."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.config = config
        self.gpt2_model = Trunk(config)
        self.sense_network = SenseNetwork(config)
        self.sense_weight_net = SenseWeights(config)

    @property
    def embedding(self) -> Tensor:
        """E [V, d], tied: it embeds the input and scores the output."""
        return self.gpt2_model.wte.weight

    def senses(self, ids: Tensor) -> Tensor:
        """C(x) for each id: [...] → [..., k, d]. Each distinct id is computed once."""
        unique, where = ids.unique(return_inverse=True)
        computed = self.sense_network(self.embedding[unique])
        out: Tensor = F.embedding(where, computed.flatten(1)).view(*ids.shape, *computed.shape[1:])
        return out

    def sense_weights(self, ids: Tensor) -> Tensor:
        """α [B, k, T, T] for ids [B, T]. Depends on the ids alone: no intervention changes it."""
        alpha: Tensor = self.sense_weight_net(self.gpt2_model(ids))
        return alpha

    @torch.no_grad()
    def sense_table(self) -> SenseTable:
        """Every sense vector of the vocabulary, computed once: rows [V, k, d]."""
        return self.table_of(torch.cat([self.sense_network(part) for part in self.embedding.split(TABLE_CHUNK)]))

    @torch.no_grad()
    def sense_rms(self) -> tuple[float, ...]:
        """For each sense, the root mean square over the vocabulary of its vectors' norms; needs no table."""
        squares: Tensor = sum(
            self.sense_network(part).double().square().sum(-1).sum(0) for part in self.embedding.split(NORMS_CHUNK)
        )
        return tuple((squares / len(self.embedding)).sqrt().tolist())

    @torch.no_grad()
    def topic_denominators(self, kept_as: str | None = None, progress: Progress | None = None) -> Tensor:
        """As `SenseTable.peaks`, [V, k], without a table."""
        shape = self.config.vocab_size, self.config.num_senses
        embedding = self.embedding.detach()
        return compute(lambda part: self.sense_network(embedding[part]), shape, embedding, kept_as, progress)

    def table_of(self, rows: Tensor) -> SenseTable:
        """Sense vectors [V, k, d] that were computed before, with what else a table needs to know."""
        unscored = torch.arange(self.config.vocab_size) >= self.config.tokens
        if self.config.eos_token_id is not None:
            unscored[self.config.eos_token_id] = True
        return SenseTable(rows, self.embedding.detach(), unscored)

    def forward(self, ids: Tensor, overlay: Overlay | None = None) -> Tensor:
        """Logits [B, T, V] of ids [B, T], steered by an overlay if one is given.

        Raises ValueError if the text is empty or longer than the context.
        """
        return self.mix(ids, overlay) @ self.embedding.t()

    def mix(self, ids: Tensor, overlay: Overlay | None = None) -> Tensor:
        """o [B, T, d]: the output before the head."""
        if not 0 < ids.shape[1] <= self.config.n_positions:
            raise ValueError(f"{ids.shape[1]} tokens; the context holds 1 to {self.config.n_positions}")
        alpha, senses = self.sense_weights(ids), self.senses(ids)
        if overlay is not None:
            senses = overlay.replace(ids, senses)
            alpha = alpha * overlay.multipliers(ids, senses, self.embedding).movedim(-1, 1)
        # Σ_l Σ_j as one product over j for each l, then a sum over l.
        return (alpha @ senses.transpose(1, 2)).sum(1)

    @torch.no_grad()
    def generate(
        self,
        prompt: Sequence[int],
        overlay: Overlay | None = None,
        choose: Callable[[Tensor], int] = lambda logits: int(logits.argmax()),
    ) -> Iterator[int]:
        """Tokens after the prompt, one by one, until the context is full. The oracle: no cache at all.

        `choose` picks a token from the last position's logits [V]; greedy by default.
        """
        ids = list(prompt)
        while len(ids) < self.config.n_positions:
            ids.append(choose(self(torch.tensor([ids]), overlay)[0, -1]))
            yield ids[-1]


class TransformerTwin(nn.Module):
    """The same trunk with a tied head and no senses: what a Backpack is compared with."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.config = config
        self.gpt2_model = Trunk(config)

    @property
    def embedding(self) -> Tensor:
        return self.gpt2_model.wte.weight

    def mix(self, ids: Tensor) -> Tensor:
        """g [B, T, d]: the output before the head."""
        out: Tensor = self.gpt2_model(ids)
        return out

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T, V] of ids [B, T]."""
        return self.mix(ids) @ self.embedding.t()
