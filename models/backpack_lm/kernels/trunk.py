"""The trunk and the sense weights over a step's new tokens, of any number of sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backpack_lm.config import BackpackConfig
from backpack_lm.kernels.caches import StepInput, TokenSpan
from backpack_lm.kernels.interface import Kernels, Linear
from backpack_lm.model import Backpack, Block, Conv1D, turns_of
from backpack_lm.trunks import Activation, Rotary


@dataclass(frozen=True, slots=True)
class PreparedLayer:
    """A block, with its matrices in the form that the kernels use. `after` is the norm that follows the block.

    Of a gated MLP, `fc` makes both halves, [N, 2·inner]: the gate's, then the one that it multiplies.
    """

    qkv: Linear
    proj: Linear
    middle: nn.Module
    fc: Linear
    out: Linear
    after: nn.Module
    scale: float


@dataclass(frozen=True, slots=True)
class TrunkWeights:
    """A model's trunk and sense weights, on the kernels' device and in the form that its `linear` makes.

    `together` makes queries and keys from the last state. Where it is None, `separate` makes queries, then keys, each
    from the states that it reads, side by side; those before the last pass through `norms` first.
    """

    config: BackpackConfig
    tokens: Tensor
    """Embeddings [V, d] float32."""
    positions: Tensor | None
    """Learned embeddings [T, d] float32."""
    turns: Tensor | None
    """Rotary cosines and sines [T, 2, w/2] float32, where positions aren't learned."""
    sense_turns: Tensor | None
    """The same for the sense weights' queries and keys, if they turn."""
    first: nn.Module
    layers: tuple[PreparedLayer, ...]
    together: Linear | None
    separate: tuple[Linear, ...]
    norms: dict[int, nn.Module]

    @classmethod
    def prepare(cls, kernels: Kernels, model: Backpack) -> TrunkWeights:
        device, trunk = kernels.caches.table.device, model.gpt2_model
        spec, weights = trunk.spec, model.sense_weight_net
        computed = Activation.SILU if spec.layer.gated else Activation.GELU_TANH
        assert spec.layer.activation is computed, f"no kernel of {spec.layer.activation}"

        def placed(norm: nn.Module) -> nn.Module:
            return deepcopy(norm).to(device).requires_grad_(False)

        def linear(*parts: Conv1D, gelu: bool = False, int16_inputs: bool = False) -> Linear:
            weights = [part.weight.t() for part in parts]
            biases = [
                torch.zeros(len(weight)) if part.bias is None else part.bias
                for part, weight in zip(parts, weights, strict=True)
            ]
            whole = torch.cat(weights) if len(weights) > 1 else weights[0]
            return kernels.linear(whole, torch.cat(biases), gelu, int16_inputs)

        def layer(block: Block, after: nn.Module) -> PreparedLayer:
            attn, mlp = block.attn, block.mlp
            fc = linear(mlp.c_fc, gelu=True) if mlp.c_gate is None else linear(mlp.c_gate, mlp.c_fc)
            # Some of what queries and keys are made of is far greater than the rest: 8 bits are too few for the rest.
            qkv, proj, out = linear(attn.c_attn, int16_inputs=True), linear(attn.c_proj), linear(mlp.c_proj)
            return PreparedLayer(qkv, proj, placed(block.ln_2), fc, out, after, attn.scale)

        blocks = [block for block in trunk.h if isinstance(block, Block)]
        norms = [placed(norm) for norm in (*(block.ln_1 for block in blocks), trunk.ln_f)]
        together: Linear | None = None
        separate: tuple[Linear, ...] = ()
        if weights.together:
            together = kernels.linear(weights.c_attn.weight, weights.c_attn.bias)
        else:
            separate = tuple(kernels.linear(part.weight, part.bias) for part in (weights.c_query, weights.c_key))

        def turned(rotary: Rotary | None, width: int) -> Tensor | None:
            return None if rotary is None else turns_of(rotary, range(spec.context), width).to(device)

        return cls(
            model.config,
            trunk.wte.weight.detach().to(device),
            None if trunk.wpe is None else trunk.wpe.weight.detach().to(device),
            turned(spec.rotary, spec.layer.head_width),
            turned(weights.rotary, weights.head_width),
            norms[0],
            tuple(layer(block, after) for block, after in zip(blocks, norms[1:], strict=True)),
            together,
            separate,
            {int(number): placed(norm) for number, norm in weights.norms.items()},
        )


class CachedTrunk:
    """The trunk as one of the kernels' operations after another.

    Where the model is one rank's part, `add_up` makes what all ranks' parts add to the states [N, d] of its own.
    """

    def __init__(self, kernels: Kernels, model: Backpack, add_up: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self._kernels, self._weights, self._add_up = kernels, TrunkWeights.prepare(kernels, model), add_up

    def __call__(self, new: StepInput, spans: Sequence[TokenSpan]) -> Tensor:
        """Compute new tokens [N] and fill the caches. Returns the sense weights' queries [N, k, w]."""
        kernels, weights, config, add_up = self._kernels, self._weights, self._weights.config, self._add_up
        gated, rotating = config.trunk.layer.gated, config.trunk.layer.heads + config.trunk.layer.kv_heads
        x = weights.tokens[new.tokens]
        x = x + weights.positions[new.positions] if weights.positions is not None else x
        states: dict[int, Tensor] = {}

        def keep(layer: int) -> None:
            if layer in weights.norms:
                states[layer] = kernels.residual_norm(x, None, weights.norms[layer])

        keep(0)
        y = kernels.residual_norm(x, None, weights.first)
        for n, layer in enumerate(weights.layers):
            qkv = layer.qkv(y)
            if weights.turns is not None:
                kernels.rotate(qkv, new.positions, weights.turns, rotating)
            mixed = kernels.attend(qkv, n, spans, layer.scale)
            y = kernels.residual_norm(x, add_up(layer.proj(mixed)), layer.middle)
            wide = layer.fc(y)
            y = kernels.residual_norm(x, add_up(layer.out(kernels.gate(wide) if gated else wide)), layer.after)
            keep(n + 1)
        states[len(weights.layers)] = y
        queries, keys = self._queries_and_keys(y, states, new.positions)
        kernels.caches.write_sense_keys(keys, new.slots, new.positions)
        return queries

    def _queries_and_keys(self, y: Tensor, states: dict[int, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
        """Each [N, k, w], from the last state [N, d] and all that are kept."""
        weights, config = self._weights, self._weights.config
        shape = len(y), config.num_senses, config.sense_head_width
        if weights.together is not None:
            queries, keys = (
                self._turned_by_position(weights.together(y), positions).view(len(y), 2, *shape[1:]).unbind(1)
            )
            return queries, keys
        queries, keys = (
            self._turned_by_position(linear(torch.cat([states[layer] for layer in layers], dim=1)), positions).view(
                shape
            )
            for linear, layers in zip(weights.separate, config.read_layers, strict=True)
        )
        return queries, keys

    def _turned_by_position(self, heads: Tensor, positions: Tensor) -> Tensor:
        """The same heads [N, n·w], turned in place by their positions if they turn."""
        if (turns := self._weights.sense_turns) is not None:
            self._kernels.rotate(heads, positions, turns, heads.shape[1] // self._weights.config.sense_head_width)
        return heads
