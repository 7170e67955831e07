"""How a Backpack is cut into parts, one for each of several ranks.

    tensor                          axis                          joined by
    queries, keys, values of trunk  heads (groups, if they divide)
    attention's output projection   heads                         a sum, [N, d] a layer
    MLP, into its inner units       inner units
    MLP, out of them                inner units                   a sum, [N, d] a layer
    queries and keys of α           senses
    sense table, releases' rows,
    topics, annealing               senses                        a sum, o [B, d] a step
    head                            vocabulary                    one rank gathers logits, [B, V] a step
    embeddings, norms               each rank has all

A part is itself a `Backpack`, of fewer heads, inner units and senses, so whatever computes a model computes a part.
It has no sense network: the table is computed once, and each rank reads its own senses of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack_lm.config import BackpackConfig, ConfigError
from backpack_lm.int8 import BLOCK
from backpack_lm.model import Backpack, shapes_alone

_PER_LAYER = re.compile(r"gpt2_model\.h\.\d+\.(attn|mlp)\.(\w+)\.(weight|bias)")
_OF_SENSES = re.compile(r"sense_weight_net\.(c_attn|c_query|c_key)\.(weight|bias)")
_SENSES = re.compile(r"sense_(network|rows)\.")


class CutConv1D(nn.Module):
    """A part of a `Conv1D`, cut out of the whole one's tensors whenever it is read."""

    def __init__(self, weight: Callable[[], Tensor], bias: Callable[[], Tensor] | None) -> None:
        super().__init__()
        self._cut_weight, self._cut_bias = weight, bias

    @property
    def weight(self) -> Tensor:
        """[in, out] float32."""
        return self._cut_weight().float()

    @property
    def bias(self) -> Tensor | None:
        """[out] float32."""
        return None if self._cut_bias is None else self._cut_bias().float()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that one of `ranks` ranks has."""

    rank: int
    ranks: int

    def senses(self, config: BackpackConfig) -> range:
        """Which of the model's senses it has."""
        return self._share(config.num_senses)

    def vocabulary(self, config: BackpackConfig) -> range:
        """The tokens whose logits it computes. All ranks have the same number of them, but for the last ones."""
        each = -(-config.tokens // self.ranks)
        return range(min(self.rank * each, config.tokens), min((self.rank + 1) * each, config.tokens))

    def config(self, config: BackpackConfig) -> BackpackConfig:
        """The shape of its part of a model."""
        heads, groups, inner = self._heads(config), self._kv_heads(config), self._inner(config)
        layer = replace(config.trunk.layer, heads=len(heads), kv_heads=len(groups), inner=len(inner))
        return replace(
            config,
            trunk=replace(config.trunk, layer=layer),
            num_senses=len(self.senses(config)),
            sense_head=config.sense_head_width,
        )

    def part(self, config: BackpackConfig, tensor: Callable[[str], Tensor]) -> Backpack:
        """Its part of a model with this config and the tensors of these names, without a sense network.

        Of tensors that are mapped into memory only its own part is read. The trunk's matrices are cut each time that
        they are read, as kernels do once: so there are no copies of all of them beside the kernels' own. Raises
        ConfigError if so many ranks can't share the model.
        """
        check_ranks(config, self.ranks)
        with shapes_alone():
            model = Backpack(self.config(config))
        names = [name for name in model.state_dict() if not _SENSES.match(name)]
        per_layer = list(filter(_PER_LAYER.fullmatch, names))
        state = {name: self._cut(config, name, tensor(name)).float() for name in names if name not in per_layer}
        model.load_state_dict(state, strict=False, assign=True)
        for path in sorted({name.rpartition(".")[0] for name in per_layer}):
            own = {name.rpartition(".")[2]: (name, tensor(name)) for name in per_layer if name.startswith(f"{path}.")}
            cuts = {kind: partial(self._cut, config, name, whole) for kind, (name, whole) in own.items()}
            model.set_submodule(path, CutConv1D(cuts["weight"], cuts.get("bias")))
        return model.eval().requires_grad_(False)

    def _cut(self, config: BackpackConfig, name: str, whole: Tensor) -> Tensor:
        """Its part of a tensor. Matrices of the trunk are [in, out], those of the sense weights [out, in]."""
        if match := _OF_SENSES.fullmatch(name):
            count = 2 if match[1] == "c_attn" else 1
            return _narrowed(
                whole, 0, [self.senses(config)] * count, [config.num_senses] * count, config.sense_head_width
            )
        match = _PER_LAYER.fullmatch(name)
        if match is None:
            return whole
        (room, matrix, kind), layer = match.groups(), config.trunk.layer
        if matrix == "c_proj":
            if kind == "bias":  # what is added once is added by the first
                return whole if self.rank == 0 else torch.zeros_like(whole)
            if room == "attn":
                return _narrowed(whole, 0, [self._heads(config)], [layer.heads], layer.head_width)
            return _narrowed(whole, 0, [self._inner(config)], [layer.inner])
        axis = 1 if kind == "weight" else 0
        if room == "mlp":
            return _narrowed(whole, axis, [self._inner(config)], [layer.inner])
        groups = self._kv_heads(config)
        counts = [layer.heads, layer.kv_heads, layer.kv_heads]
        return _narrowed(whole, axis, [self._heads(config), groups, groups], counts, layer.head_width)

    def _heads(self, config: BackpackConfig) -> range:
        return self._share(config.trunk.layer.heads)

    def _kv_heads(self, config: BackpackConfig) -> range:
        """The key/value heads that its heads read: several ranks have the same one if there are fewer than ranks."""
        layer, heads = config.trunk.layer, self._heads(config)
        each = layer.heads // layer.kv_heads
        return range(heads.start // each, (heads.stop - 1) // each + 1)

    def _inner(self, config: BackpackConfig) -> range:
        """In whole blocks of int8, where there are enough: then a weight is quantised as it is on one rank."""
        grain, total = BLOCK, config.trunk.layer.inner
        while grain > 1 and (total % grain or total // grain < self.ranks):
            grain //= 2
        units = self._share(total // grain)
        return range(units.start * grain, units.stop * grain)

    def _share(self, count: int) -> range:
        return range(count * self.rank // self.ranks, count * (self.rank + 1) // self.ranks)


def fitting_ranks(config: BackpackConfig) -> list[int]:
    """How many ranks can share a model: numbers that divide its senses and its heads, and its key/value heads or are a
    multiple of these."""
    layer = config.trunk.layer
    return [
        n
        for n in range(1, min(config.num_senses, layer.heads) + 1)
        if config.num_senses % n == layer.heads % n == 0 and (layer.kv_heads % n == 0 or n % layer.kv_heads == 0)
    ]


def check_ranks(config: BackpackConfig, ranks: int) -> None:
    """Raises ConfigError, with the numbers that would fit, if so many ranks can't share a model."""
    if ranks not in (fitting := fitting_ranks(config)):
        layer = config.trunk.layer
        raise ConfigError(
            f"{ranks} ranks can't share {config.num_senses} senses, {layer.heads} heads and {layer.kv_heads} key/value "
            f"heads; of this model these numbers can: {', '.join(map(str, fitting))}"
        )


def _narrowed(whole: Tensor, axis: int, ranges: list[range], counts: list[int], width: int = 1) -> Tensor:
    """Of a tensor whose axis is several blocks, each of some heads of a width: a range of the heads of each block."""
    starts = [sum(counts[:n]) for n in range(len(counts))]
    parts = [
        whole.narrow(axis, (start + kept.start) * width, len(kept) * width)
        for start, kept in zip(starts, ranges, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
