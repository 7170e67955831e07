"""GPT-2: LayerNorm, learned positions, gelu, biases everywhere, as the published Backpacks have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backpack_lm.trunks.spec import (
    CONTEXT,
    COUNT,
    VOCABULARY,
    WIDTH,
    Activation,
    ConfigError,
    Layer,
    NormKind,
    TrunkSpec,
    flag,
    fraction,
    require,
    size,
)

_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_approx")
"""Names of one function: Hugging Face's, and those of Stanford's training code."""


def read(values: Mapping[str, Any], scaled_by_layer: bool = True) -> TrunkSpec:
    """The trunk that a config.json describes. Where it doesn't say, attention scores are divided by the number of
    their layer if `scaled_by_layer`, as in all of Stanford's models; GPT-2 itself isn't."""
    if (activation := values.get("activation_function", "gelu_new")) not in _TANH_GELU:
        raise ConfigError(
            f"activation_function {activation!r}; a Backpack uses 'gelu_new', the tanh approximation of GELU, "
            f"also called {', '.join(map(repr, _TANH_GELU[1:]))}"
        )
    if (scaled := values.get("scale_attn_weights", True)) is not True:
        raise ConfigError(f"scale_attn_weights is {scaled!r}; a Backpack's attention is scaled by 1/√(d/H)")
    require(values, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    vocabulary, context = size(values, "vocab_size", VOCABULARY), size(values, "n_positions", CONTEXT)
    width, count, heads = size(values, "n_embd", WIDTH), size(values, "n_layer", COUNT), size(values, "n_head", COUNT)
    epsilon = fraction(values, "layer_norm_epsilon", 1e-5)
    by_layer = flag(values, "scale_attn_by_inverse_layer_idx", scaled_by_layer)
    if width % heads:
        raise ConfigError(f"n_embd {width} does not divide into n_head {heads} heads")

    layer = Layer(heads, heads, width // heads, 4 * width, Activation.GELU_TANH, False, True, True, True)
    return TrunkSpec(
        "gpt2", vocabulary, context, width, count, layer, NormKind.LAYER, epsilon, scaled_by_layer=by_layer
    )


def write(trunk: TrunkSpec) -> dict[str, Any]:
    """What `read` reads: the trunk's part of a config.json, as the published Backpacks have it."""
    return {
        "architectures": ["BackpackGPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": trunk.vocab_size,
        "n_positions": trunk.context,
        "n_embd": trunk.width,
        "n_layer": trunk.depth,
        "n_head": trunk.layer.heads,
        "scale_attn_by_inverse_layer_idx": trunk.scaled_by_layer,
        "layer_norm_epsilon": trunk.epsilon,
    }


def published(name: str) -> tuple[tuple[str, ...], bool]:
    """The tensors of transformers' GPT2Model that ours of a name is, and whether they are to be transposed."""
    return (name,), False
