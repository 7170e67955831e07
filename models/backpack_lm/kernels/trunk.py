"""The trunk and the sense weights over a step's new tokens, whatever sequences they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor, nn

from backpack_lm.kernels.caches import StepInput, TokenSpan
from backpack_lm.kernels.interface import Kernels, Linear
from backpack_lm.model import Backpack, Block


@dataclass(frozen=True, slots=True)
class Layer:
    """A block, its matrices as the kernels want them. `after` is the LayerNorm that follows the block."""

    qkv: Linear
    proj: Linear
    middle: nn.LayerNorm
    fc: Linear
    out: Linear
    after: nn.LayerNorm
    scale: float


class CachedTrunk:
    """The weights, on the kernels' device and in their dtype, and one operation after another."""

    def __init__(self, kernels: Kernels, model: Backpack) -> None:
        self.kernels, self.config = kernels, model.config
        self._device, trunk = kernels.caches.table.device, model.gpt2_model
        self.tokens, self.positions = (e.weight.detach().to(self._device) for e in (trunk.wte, trunk.wpe))
        blocks = [block for block in trunk.h if isinstance(block, Block)]
        norms = [self._norm_on_device(norm) for norm in (*(block.ln_1 for block in blocks), trunk.ln_f)]
        self.first = norms[0]
        self.layers = [self._layer(block, after) for block, after in zip(blocks, norms[1:], strict=True)]
        weights = model.sense_weight_net.c_attn
        self.sense_weights = kernels.linear(weights.weight, weights.bias)

    def __call__(self, new: StepInput, runs: Sequence[TokenSpan]) -> Tensor:
        """Compute new tokens [N], filling the caches; the sense weights' queries [N, k, d/k]."""
        kernels, config = self.kernels, self.config
        x = self.tokens[new.tokens] + self.positions[new.positions]
        y = kernels.residual_norm(x, None, self.first)
        for n, layer in enumerate(self.layers):
            mixed = kernels.attend(layer.qkv(y), n, runs, layer.scale)
            y = kernels.residual_norm(x, layer.proj(mixed), layer.middle)
            y = kernels.residual_norm(x, layer.out(layer.fc(y)), layer.after)
        both = self.sense_weights(y).view(len(x), 2, config.num_senses, config.sense_head_width)
        queries, keys = both.unbind(1)
        kernels.caches.write_sense_keys(keys, new.slots, new.positions)
        return queries

    def _layer(self, block: Block, after: nn.LayerNorm) -> Layer:
        make, attn, mlp = self.kernels.linear, block.attn, block.mlp
        return Layer(
            make(attn.c_attn.weight.t(), attn.c_attn.bias),
            make(attn.c_proj.weight.t(), attn.c_proj.bias),
            self._norm_on_device(block.ln_2),
            make(mlp.c_fc.weight.t(), mlp.c_fc.bias, gelu=True),
            make(mlp.c_proj.weight.t(), mlp.c_proj.bias),
            after,
            attn.scale,
        )

    def _norm_on_device(self, norm: nn.LayerNorm) -> nn.LayerNorm:
        """The model's, where the computation is."""
        return deepcopy(norm).to(self._device).requires_grad_(False)
