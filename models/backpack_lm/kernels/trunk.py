"""The trunk and the sense weights over a step's new tokens, of any number of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor, nn

from backpack_lm.config import BackpackConfig
from backpack_lm.kernels.caches import StepInput, TokenSpan
from backpack_lm.kernels.interface import Kernels, Linear
from backpack_lm.model import Backpack, Block


@dataclass(frozen=True, slots=True)
class Layer:
    """A block, with its matrices in the form that the kernels use. `after` is the LayerNorm that follows the block."""

    qkv: Linear
    proj: Linear
    middle: nn.LayerNorm
    fc: Linear
    out: Linear
    after: nn.LayerNorm
    scale: float


@dataclass(frozen=True, slots=True)
class TrunkWeights:
    """A model's trunk and sense weights, on the kernels' device and in the form that its `linear` makes."""

    config: BackpackConfig
    tokens: Tensor
    """Embeddings [V, d] float32."""
    positions: Tensor
    """Embeddings [T, d] float32."""
    first: nn.LayerNorm
    layers: tuple[Layer, ...]
    sense_weights: Linear

    @classmethod
    def prepare(cls, kernels: Kernels, model: Backpack) -> TrunkWeights:
        device, trunk, linear = kernels.caches.table.device, model.gpt2_model, kernels.linear

        def placed(norm: nn.LayerNorm) -> nn.LayerNorm:
            return deepcopy(norm).to(device).requires_grad_(False)

        def layer(block: Block, after: nn.LayerNorm) -> Layer:
            attn, mlp = block.attn, block.mlp
            return Layer(
                linear(attn.c_attn.weight.t(), attn.c_attn.bias),
                linear(attn.c_proj.weight.t(), attn.c_proj.bias),
                placed(block.ln_2),
                linear(mlp.c_fc.weight.t(), mlp.c_fc.bias, gelu=True),
                linear(mlp.c_proj.weight.t(), mlp.c_proj.bias),
                after,
                attn.scale,
            )

        blocks = [block for block in trunk.h if isinstance(block, Block)]
        norms = [placed(norm) for norm in (*(block.ln_1 for block in blocks), trunk.ln_f)]
        weights = model.sense_weight_net.c_attn
        return cls(
            model.config,
            trunk.wte.weight.detach().to(device),
            trunk.wpe.weight.detach().to(device),
            norms[0],
            tuple(layer(block, after) for block, after in zip(blocks, norms[1:], strict=True)),
            linear(weights.weight, weights.bias),
        )


class CachedTrunk:
    """The trunk as one of the kernels' operations after another."""

    def __init__(self, kernels: Kernels, model: Backpack) -> None:
        self._kernels, self._weights = kernels, TrunkWeights.prepare(kernels, model)

    def __call__(self, new: StepInput, spans: Sequence[TokenSpan]) -> Tensor:
        """Compute new tokens [N] and fill the caches. Returns the sense weights' queries [N, k, d/k]."""
        kernels, weights, config = self._kernels, self._weights, self._weights.config
        x = weights.tokens[new.tokens] + weights.positions[new.positions]
        y = kernels.residual_norm(x, None, weights.first)
        for n, layer in enumerate(weights.layers):
            mixed = kernels.attend(layer.qkv(y), n, spans, layer.scale)
            y = kernels.residual_norm(x, layer.proj(mixed), layer.middle)
            y = kernels.residual_norm(x, layer.out(layer.fc(y)), layer.after)
        both = weights.sense_weights(y).view(len(x), 2, config.num_senses, config.sense_head_width)
        queries, keys = both.unbind(1)
        kernels.caches.write_sense_keys(keys, new.slots, new.positions)
        return queries
