"""Backpack in torch, from the equations of the paper (Hewitt et al. 2023, sections 2 and 3).

    g    = Transformer(x)                                  trunk          [B, T, d]
    C(x) = MLP2(LN2(r2)), r2 = r1 + MLP(LN1(r1)), r1 = e + LN(e), e = embedding of x
                                                           senses         [B, T, k, d]
    α    = softmax_j(q_i·k_j / √(d/k)), causal             sense weights  [B, k, T, T]
    o_i  = Σ_l Σ_j α[l,i,j] C(x_j)_l ;  logits = o Eᵀ      mix and head   [B, T, V]

C depends on the token alone, so after training it is a table (`Backpack.sense_table`); an overlay
changes that table, adds constants to logits, and does nothing else. The trunk is whatever its description
says (`trunks/`). This file is the slow, obvious reference: `generate` recomputes everything for every token
and is the oracle that every faster path is held equal to. Module names are the published checkpoint's, so
a state dict is a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backpack_lm.config import BackpackConfig, StoredSenses
from backpack_lm.denominators import Progress, compute
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.trunks import Activation, NormKind, Rotary, TrunkSpec

TABLE_CHUNK, NORMS_CHUNK = 2048, 256
"""Tokens whose senses are computed at a time: for the table, and for norms alone, in double."""

PART = 8192
"""Tokens of one part of a finished table."""


class Conv1D(nn.Module):
    """Linear layer with its weight stored [in, out], as GPT-2 checkpoints store it."""

    def __init__(self, inner: int, outer: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner, outer).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(outer)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.SILU: F.silu,
}


class MLP(nn.Module):
    """width → inner → outer; with a gate, a second product whose activation multiplies the first."""

    def __init__(
        self,
        width: int,
        inner: int,
        outer: int,
        activation: Activation = Activation.GELU_TANH,
        gated: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.c_gate = Conv1D(width, inner, bias) if gated else None
        self.c_fc = Conv1D(width, inner, bias)
        self.c_proj = Conv1D(inner, outer, bias)

    def forward(self, x: Tensor) -> Tensor:
        fc = self.c_fc(x)
        out: Tensor = self.c_proj(self.activation(fc) if self.c_gate is None else self.activation(self.c_gate(x)) * fc)
        return out


def norm_of(trunk: TrunkSpec) -> nn.Module:
    """A norm of the trunk's kind, over its width."""
    kind = nn.LayerNorm if trunk.norm is NormKind.LAYER else nn.RMSNorm
    return kind(trunk.width, trunk.epsilon)


def last(states: Iterable[Tensor]) -> Tensor:
    """The last of some; none is kept longer than needed."""
    for state in states:
        found = state
    return found


def causal_softmax(scores: Tensor) -> Tensor:
    """Softmax over j of scores [..., T, T], position i seeing the positions j ≤ i."""
    seen = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
    return (scores + seen).softmax(-1)


def turns_of(rotary: Rotary, positions: range, width: int) -> Tensor:
    """Cosines and sines of the angles by which heads of a width turn at P positions: [P, 2, width / 2] float32."""
    speeds = 1.0 / rotary.theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if (scaling := rotary.scaling) is not None:
        slow = speeds / scaling.factor
        if scaling.original is None:
            speeds = slow
        else:
            waves = scaling.original * speeds / (2 * math.pi)  # over the original context
            blend = ((waves - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
            speeds = blend * speeds + (1 - blend) * slow
    angles = torch.tensor(positions, dtype=torch.float32)[:, None] * speeds
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def rotated(heads: Tensor, turns: Tensor) -> Tensor:
    """Heads [..., T, w] whose pairs (i, i + w/2) turn by the angles of `turns` [T, 2, w/2], cosines and sines."""
    cosines, sines = turns.unbind(-2)
    one, other = heads.chunk(2, dim=-1)
    return torch.cat([one * cosines - other * sines, other * cosines + one * sines], dim=-1)


class Attention(nn.Module):
    """Causal self-attention of H query heads over G key/value heads, by the trunk's scale."""

    def __init__(self, trunk: TrunkSpec, layer: int) -> None:
        super().__init__()
        self.shape, self.scale = trunk.layer, trunk.scale(layer)
        self.c_attn = Conv1D(trunk.width, self.shape.qkv_width, self.shape.qkv_bias)
        self.c_proj = Conv1D(self.shape.heads * self.shape.head_width, trunk.width, self.shape.proj_bias)

    def query_key_value(self, x: Tensor, turns: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, w], k and v [B, G, T, w] of x [B, T, d], whose positions turn by `turns` [T, 2, w/2]."""
        H, G, w = self.shape.heads, self.shape.kv_heads, self.shape.head_width
        parts = self.c_attn(x).split([H * w, G * w, G * w], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, w)).transpose(1, 2) for part in parts)
        if turns is not None:
            q, k = rotated(q, turns), rotated(k, turns)
        return q, k, v

    def forward(self, x: Tensor, turns: Tensor | None = None) -> Tensor:
        q, k, v = self.query_key_value(x, turns)
        if (shared := self.shape.heads // self.shape.kv_heads) > 1:
            k, v = (part.repeat_interleave(shared, dim=1) for part in (k, v))
        mixed = causal_softmax(q * self.scale @ k.mT) @ v
        out: Tensor = self.c_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, trunk: TrunkSpec, layer: int) -> None:
        super().__init__()
        shape = trunk.layer
        self.ln_1 = norm_of(trunk)
        self.attn = Attention(trunk, layer)
        self.ln_2 = norm_of(trunk)
        self.mlp = MLP(trunk.width, shape.inner, trunk.width, shape.activation, shape.gated, shape.mlp_bias)

    def forward(self, x: Tensor, turns: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), turns)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Trunk(nn.Module):
    """What contextualises, by its description: ids [B, T] → g [B, T, d]."""

    def __init__(self, spec: TrunkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.wte = nn.Embedding(spec.vocab_size, spec.width)
        self.wpe = nn.Embedding(spec.context, spec.width) if spec.rotary is None else None
        self.h = nn.ModuleList(Block(spec, layer) for layer in range(spec.depth))
        self.ln_f = norm_of(spec)
        for embedding in (self.wte, self.wpe):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2's scaling of residual projections
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * spec.depth))

    def embed(self, ids: Tensor, start: int = 0) -> tuple[Tensor, Tensor | None]:
        """x [B, T, d] before the first layer, of ids [B, T] at the positions from `start` on, and what they turn by."""
        end = start + ids.shape[1]
        x: Tensor = self.wte(ids)
        if self.wpe is not None:
            return x + self.wpe.weight[start:end], None
        assert self.spec.rotary is not None
        return x, turns_of(self.spec.rotary, range(start, end), self.spec.layer.head_width).to(x)

    def states(self, ids: Tensor) -> Iterator[Tensor]:
        """x [B, T, d] before the first layer, after each, and g in place of the last."""
        x, turns = self.embed(ids)
        for block in self.h:
            yield x
            x = block(x, turns)
        yield self.ln_f(x)

    def forward(self, ids: Tensor) -> Tensor:
        return last(self.states(ids))


class SenseBlock(nn.Module):
    """The sense network's block: like a Transformer block, but nothing mixes positions."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        d, eps = config.n_embd, config.trunk.epsilon
        self.ln_1 = nn.LayerNorm(d, eps)
        self.ln_2 = nn.LayerNorm(d, eps)
        self.mlp = MLP(d, config.sense_mlp_widths[0], d)


class SenseNetwork(nn.Module):
    """C: embeddings e [..., d] → sense vectors [..., k, d]. Sees one token, no position, no context."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.num_senses = config.num_senses
        d = config.n_embd
        self.ln = nn.LayerNorm(d, config.trunk.epsilon)
        self.block = SenseBlock(config)
        self.final_mlp = MLP(d, config.sense_mlp_widths[1], config.num_senses * d)

    def forward(self, e: Tensor) -> Tensor:
        r = e + self.ln(e)
        r = r + self.block.mlp(self.block.ln_1(r))
        flat: Tensor = self.final_mlp(self.block.ln_2(r))
        return flat.view(*e.shape[:-1], self.num_senses, e.shape[-1])


class SenseWeights(nn.Module):
    """α: states of the trunk [B, T, d] → weights [B, k, T, T], a softmax over the positions j ≤ i.

    Where queries and keys both read the last state, as published, one matrix makes both. Where they don't, each has
    its own, over the states that it reads side by side; those before the last are normalised first.
    """

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.num_senses, self.head_width = config.num_senses, config.sense_head_width
        self.rotary = config.sense_rotary
        self.read_layers, depth = config.read_layers, config.trunk.depth
        all_heads = self.num_senses * self.head_width
        self.together = self.read_layers == ((depth,), (depth,))
        if self.together:
            self.c_attn = nn.Linear(config.n_embd, 2 * all_heads)
            query, key = self.c_attn.weight.data.chunk(2)
            nn.init.zeros_(self.c_attn.bias)
        else:
            self.c_query, self.c_key = (nn.Linear(len(some) * config.n_embd, all_heads) for some in self.read_layers)
            query, key = self.c_query.weight.data, self.c_key.weight.data
            for linear in (self.c_query, self.c_key):
                nn.init.zeros_(linear.bias)
        earlier = sorted({layer for some in self.read_layers for layer in some} - {depth})
        self.norms = nn.ModuleDict({str(layer): norm_of(config.trunk) for layer in earlier})
        # As small as elsewhere (.02), every sense would start as the mean of the whole text, and most would stay
        # near it. With keys that equal the queries, a position starts by weighing itself and what resembles it;
        # 1.5 was found with heads 24 wide, and wider ones weigh themselves no more than those.
        sharpness = 1.5 * min(1.0, 24 / self.head_width) ** 0.25
        nn.init.normal_(query, std=sharpness / math.sqrt(query.shape[1]))
        if query.shape == key.shape:
            key.copy_(query)
        else:
            nn.init.normal_(key, std=sharpness / math.sqrt(key.shape[1]))

    def query_key(self, states: Iterable[Tensor], start: int = 0) -> tuple[Tensor, Tensor]:
        """q and k, each [B, T, k, w], of the trunk's states [B, T, d], from its embeddings to g, at the positions from
        `start` on."""
        q, k = self._queries_and_keys_unturned(states)
        if self.rotary is None:
            return q, k
        turns = turns_of(self.rotary, range(start, start + q.shape[1]), self.head_width).to(q.device)[:, None]
        return rotated(q, turns), rotated(k, turns)

    def _queries_and_keys_unturned(self, states: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        if self.together:
            # q is the first half of the projection.
            q, k = self.c_attn(last(states)).unflatten(-1, (2, self.num_senses, self.head_width)).unbind(-3)
            return q, k
        read = {layer for some in self.read_layers for layer in some}
        kept = {
            layer: self.norms[str(layer)](state) if str(layer) in self.norms else state
            for layer, state in enumerate(states)
            if layer in read
        }
        q, k = (
            linear(torch.cat([kept[layer] for layer in some], dim=-1)).unflatten(-1, (self.num_senses, self.head_width))
            for linear, some in zip((self.c_query, self.c_key), self.read_layers, strict=True)
        )
        return q, k

    def forward(self, states: Iterable[Tensor]) -> Tensor:
        q, k = (part.transpose(1, 2) for part in self.query_key(states))  # [B, k, T, w]
        return causal_softmax(q / math.sqrt(self.head_width) @ k.mT)


class SensePart(nn.Module):
    """Finished sense vectors of some tokens: rows [n, k, d], bfloat16, or int8 with scales [n, k] float32."""

    rows: Tensor
    scales: Tensor | None

    def __init__(self, config: BackpackConfig, count: int) -> None:
        super().__init__()
        is_int8, k = config.senses is StoredSenses.INT8, config.num_senses
        dtype = torch.int8 if is_int8 else torch.bfloat16
        self.register_buffer("rows", torch.zeros(count, k, config.n_embd, dtype=dtype))
        self.register_buffer("scales", torch.zeros(count, k) if is_int8 else None)

    def forward(self, at: Tensor) -> Tensor:
        rows = self.rows[at].float()
        return rows if self.scales is None else rows * self.scales[at][..., None]

    def store(self, start: int, senses: Tensor) -> None:
        """Set the vectors of tokens from `start` on: [m, k, d]."""
        at = slice(start, start + len(senses))
        if self.scales is None:
            self.rows[at] = senses
            return
        peaks = senses.abs().amax(-1)
        self.scales[at] = peaks / 127
        self.rows[at] = (senses * (127 / peaks.clamp(min=1e-30))[..., None]).round()


class FinishedSenses(nn.ModuleList):
    """C as a table instead of a network: ids [n] → sense vectors [n, k, d]. Each of its parts has a file of its own."""

    def __init__(self, config: BackpackConfig) -> None:
        counts = (min(PART, config.vocab_size - at) for at in range(0, config.vocab_size, PART))
        super().__init__(SensePart(config, count) for count in counts)
        self.shape = config.num_senses, config.n_embd

    def forward(self, ids: Tensor) -> Tensor:
        out = torch.empty(len(ids), *self.shape, device=ids.device)
        for n, part in enumerate(self):
            here = ids // PART == n
            out[here] = part(ids[here] - n * PART)
        return out

    @torch.no_grad()
    def store(self, start: int, senses: Tensor) -> None:
        """Set the sense vectors [m, k, d] of tokens from `start` on, all of one part."""
        part = self[start // PART]
        assert isinstance(part, SensePart)
        part.store(start % PART, senses)


class Backpack(nn.Module):
    """A Backpack language model. `gpt2_model` is the trunk, of whichever family: the name is the published one."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.config = config
        self.gpt2_model = Trunk(config.trunk)
        if config.senses is StoredSenses.NETWORK:
            self.sense_network = SenseNetwork(config)
        else:
            self.sense_rows = FinishedSenses(config)
        self.sense_weight_net = SenseWeights(config)
        self.lm_head = None if config.trunk.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @property
    def embedding(self) -> Tensor:
        """E [V, d], which scores the output; where it is tied, it embeds the input, too."""
        return self.gpt2_model.wte.weight if self.lm_head is None else self.lm_head.weight

    def senses(self, ids: Tensor) -> Tensor:
        """C(x) for each id: [...] → [..., k, d]. Each distinct id is computed once."""
        unique, where = ids.unique(return_inverse=True)
        computed = self.compute_senses(unique)
        out: Tensor = F.embedding(where, computed.flatten(1)).view(*ids.shape, *computed.shape[1:])
        return out

    def compute_senses(self, ids: Tensor) -> Tensor:
        """C(x) [n, k, d] of ids [n]: by the network from their input embeddings, or from the finished table."""
        if self.config.senses is StoredSenses.NETWORK:
            computed: Tensor = self.sense_network(self.gpt2_model.wte.weight[ids])
        else:
            computed = self.sense_rows(ids)
        return computed

    def sense_weights(self, ids: Tensor) -> Tensor:
        """α [B, k, T, T] for ids [B, T]. Depends on the ids alone: no intervention changes it."""
        alpha: Tensor = self.sense_weight_net(self.gpt2_model.states(ids))
        return alpha

    def _vocabulary(self, chunk: int) -> Iterator[Tensor]:
        """All ids, so many at a time."""
        yield from torch.arange(self.config.vocab_size).split(chunk)

    @torch.no_grad()
    def sense_table(self) -> SenseTable:
        """Every sense vector of the vocabulary, computed once: rows [V, k, d]."""
        return self.table_of(torch.cat([self.compute_senses(part) for part in self._vocabulary(TABLE_CHUNK)]))

    @torch.no_grad()
    def sense_rms(self) -> tuple[float, ...]:
        """For each sense, the root mean square over the vocabulary of its vectors' norms; needs no table."""
        squares = torch.zeros(self.config.num_senses, dtype=torch.float64)
        for part in self._vocabulary(NORMS_CHUNK):
            squares += self.compute_senses(part).double().square().sum(-1).sum(0)
        return tuple((squares / self.config.vocab_size).sqrt().tolist())

    @torch.no_grad()
    def topic_denominators(self, kept_as: str | None = None, progress: Progress | None = None) -> Tensor:
        """As `SenseTable.peaks`, [V, k], without a table."""
        shape, ids = (self.config.vocab_size, self.config.num_senses), torch.arange(self.config.vocab_size)
        return compute(lambda part: self.compute_senses(ids[part]), shape, self.embedding.detach(), kept_as, progress)

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
        logits = self.mix(ids, overlay) @ self.embedding.t()
        return logits if overlay is None else overlay.biased(logits)

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
    """The same trunk with a head and no senses: what a Backpack is compared with."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.config = config
        self.gpt2_model = Trunk(config.trunk)
        self.lm_head = None if config.trunk.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @property
    def embedding(self) -> Tensor:
        return self.gpt2_model.wte.weight if self.lm_head is None else self.lm_head.weight

    def mix(self, ids: Tensor) -> Tensor:
        """g [B, T, d]: the output before the head."""
        out: Tensor = self.gpt2_model(ids)
        return out

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T, V] of ids [B, T]."""
        return self.mix(ids) @ self.embedding.t()


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Modules made in it have no memory. Their weights aren't filled: for that, torch would import 2 s of code."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
