"""Llama, and Mistral and Qwen2 where they differ by a flag: RMSNorm, rotary positions, grouped heads, gated SiLU."""

from __future__ import annotations

import re
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
    Rotary,
    RotaryScaling,
    TrunkSpec,
    flag,
    fraction,
    require,
    size,
)

_QKV_BIAS = {"llama": False, "mistral": False, "qwen2": True}
"""The families that are read here, and whether their queries, keys and values have biases where nothing is said."""


def read(values: Mapping[str, Any]) -> TrunkSpec:
    """The trunk that a config.json describes. Raises ConfigError naming what is missing or can't be computed."""
    family = values["model_type"]
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"hidden_act is {activation!r}; a {family} trunk is computed with 'silu'")
    if values.get("sliding_window") is not None and values.get("use_sliding_window", True):
        raise ConfigError(
            f"sliding_window is {values['sliding_window']!r}: attention over a window isn't computed; a model whose "
            "context fits its window can be read with sliding_window null"
        )
    require(values, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    width, heads = size(values, "hidden_size", WIDTH), size(values, "num_attention_heads", COUNT)
    kv_heads = size(values, "num_key_value_heads", COUNT, heads)
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} does not divide into num_key_value_heads {kv_heads} groups")
    if values.get("head_dim") is None and width % heads:
        raise ConfigError(f"hidden_size {width} does not divide into num_attention_heads {heads} heads")
    head_width = size(values, "head_dim", WIDTH, width // heads)
    if head_width % 2:
        raise ConfigError(f"head_dim is {head_width}; rotary positions turn pairs, so it must be even")
    bias = flag(values, "attention_bias", _QKV_BIAS[family])
    layer = Layer(
        heads,
        kv_heads,
        head_width,
        size(values, "intermediate_size", WIDTH),
        Activation.SILU,
        gated=True,
        qkv_bias=bias,
        proj_bias=bias and family != "qwen2",
        mlp_bias=flag(values, "mlp_bias", False),
    )
    return TrunkSpec(
        family,
        size(values, "vocab_size", VOCABULARY),
        size(values, "max_position_embeddings", CONTEXT, 2048),
        width,
        size(values, "num_hidden_layers", COUNT),
        layer,
        NormKind.RMS,
        fraction(values, "rms_norm_eps", 1e-6),
        _rotary(values),
        flag(values, "tie_word_embeddings", False),
    )


def write(trunk: TrunkSpec) -> dict[str, Any]:
    """What `read` reads: the trunk's part of a config.json."""
    assert trunk.rotary is not None
    layer, rotary = trunk.layer, trunk.rotary
    return {
        "model_type": trunk.family,
        "hidden_act": "silu",
        "vocab_size": trunk.vocab_size,
        "max_position_embeddings": trunk.context,
        "hidden_size": trunk.width,
        "intermediate_size": layer.inner,
        "num_hidden_layers": trunk.depth,
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "head_dim": layer.head_width,
        "rms_norm_eps": trunk.epsilon,
        "rope_theta": rotary.theta,
        "rope_scaling": _scaling_values(rotary.scaling),
        "tie_word_embeddings": trunk.tied,
        "attention_bias": layer.qkv_bias,
        "mlp_bias": layer.mlp_bias,
    }


_PARTS = {
    "wte": ("embed_tokens",),
    "ln_f": ("norm",),
    "ln_1": ("input_layernorm",),
    "ln_2": ("post_attention_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.c_gate": ("mlp.gate_proj",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
"""Ours, and those that it is made of, one behind the other."""

_OURS = re.compile(r"(?:h\.(\d+)\.)?(.*)\.(weight|bias)")


def published(name: str) -> tuple[tuple[str, ...], bool]:
    """The tensors of transformers' LlamaModel and its kind that ours of a name is made of, and whether they are to be
    transposed: our matrices are [in, out]."""
    match = _OURS.fullmatch(name)
    assert match is not None, name
    layer, part, kind = match.groups()
    parts = _PARTS.get(part, (part,))
    return tuple(f"layers.{layer}.{p}.{kind}" if layer else f"{p}.{kind}" for p in parts), ".c_" in part


def _rotary(values: Mapping[str, Any]) -> Rotary:
    """From `rope_theta` beside `rope_scaling`, or from `rope_parameters`, which has both."""
    together = values.get("rope_parameters") or {}
    theta = values.get("rope_theta", together.get("rope_theta", 10_000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 1:
        raise ConfigError(f"rope_theta is {theta!r}; it must be a number above 1")
    found = values.get("rope_scaling") or together
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return Rotary(float(theta))
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"rope_type is {kind!r}; 'default', 'linear' and 'llama3' are computed")
    factor = found.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor >= 1:
        raise ConfigError(f"rope scaling's factor is {factor!r}; it must be a number from 1 on")
    if kind == "linear":
        return Rotary(float(theta), RotaryScaling(float(factor)))
    low, high = found.get("low_freq_factor", 1.0), found.get("high_freq_factor", 4.0)
    if not low < high:
        raise ConfigError(f"low_freq_factor is {low!r}, high_freq_factor {high!r}; it must be the greater")
    original = size(found, "original_max_position_embeddings", CONTEXT)
    return Rotary(float(theta), RotaryScaling(float(factor), original, float(low), float(high)))


def _scaling_values(scaling: RotaryScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.original is None:
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
    }
