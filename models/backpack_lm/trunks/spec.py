"""What a trunk is made of: a frozen description that the oracle and every kernel interpret.

A trunk turns token ids into one vector of width d for each position. It is a pre-norm Transformer:

    x_0 = E[id] (+ P[position])                       embeddings, with learned positions or none
    x  += proj(attention(norm(x)))                    H query heads over G key/value heads of width w
    x  += out(act(fc(norm(x))))                       or out(act(gate(norm(x))) · fc(norm(x))), if gated
    g   = norm(x_L)

`gpt2.py` and `llama.py` make such descriptions from config.json files; nothing else knows the families.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class ConfigError(ValueError):
    """A config that doesn't describe a model that can be computed, with the offending value and the fix."""


class NormKind(StrEnum):
    """LayerNorm with a gain and a bias, or RMSNorm with a gain."""

    LAYER = "layer"
    RMS = "rms"


class Activation(StrEnum):
    """The tanh approximation of GELU, or x·sigmoid(x)."""

    GELU_TANH = "gelu_tanh"
    SILU = "silu"


@dataclass(frozen=True, slots=True)
class RotaryScaling:
    """How rotary angles are slowed for contexts longer than those of pretraining.

    Wavelengths longer than `original` / `low` are stretched `factor` times, those shorter than `original` / `high`
    stay, and between them the two are blended (Llama 3.1). Where `original` is None, all are stretched (“linear”).
    """

    factor: float
    original: int | None = None
    low: float = 1.0
    high: float = 4.0


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embeddings (Su et al. 2021): pair (i, i + w/2) of a head turns by position · θ^(−2i/w)."""

    theta: float
    scaling: RotaryScaling | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One block: attention of `heads` query heads over `kv_heads` key/value heads, each `head_width` wide; then an MLP
    of `inner` units, with a second product as a gate if `gated`. Query head h reads key/value head h·G // H."""

    heads: int
    kv_heads: int
    head_width: int
    inner: int
    activation: Activation
    gated: bool
    qkv_bias: bool
    proj_bias: bool
    mlp_bias: bool

    @property
    def qkv_width(self) -> int:
        """Numbers that queries, keys and values have for each token: (H + 2G)·w."""
        return (self.heads + 2 * self.kv_heads) * self.head_width


@dataclass(frozen=True, slots=True)
class TrunkSpec:
    """A whole trunk: `depth` layers alike. `family` names who reads and writes its config.json and its tensors; nobody
    else asks for it.

    Positions are learned where there is no `rotary`. Where embeddings are not `tied`, the model scores words by an
    output embedding of its own.
    """

    family: str
    vocab_size: int
    context: int
    width: int
    depth: int
    layer: Layer
    norm: NormKind
    epsilon: float
    rotary: Rotary | None = None
    tied: bool = True
    scaled_by_layer: bool = False
    """Whether scores are divided by their layer's number, counted from 1, beside √w."""

    def scale(self, layer: int) -> float:
        """What attention scores of a layer, counted from 0, are multiplied by."""
        scale = 1.0 / math.sqrt(self.layer.head_width)
        return scale / (layer + 1) if self.scaled_by_layer else scale


def size(values: Mapping[str, Any], name: str, most: int, default: int | None = None) -> int:
    """A size in a config. Raises ConfigError naming it if it isn't an integer from 1 to `most`.

    `most` is far beyond any model: a file that says more is damaged, and to make such a shape would never end.
    """
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(f"{name} is {value!r}; it must be an integer from 1 to {most}")
    return value


def fraction(values: Mapping[str, Any], name: str, default: float) -> float:
    """A number between 0 and 1 in a config. Raises ConfigError naming it if it isn't."""
    value = values.get(name, default)
    if not isinstance(value, float) or not 0 < value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a number between 0 and 1")
    return value


def flag(values: Mapping[str, Any], name: str, default: bool) -> bool:
    """A truth value in a config. Raises ConfigError naming it if it isn't."""
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be true or false")
    return value


def require(values: Mapping[str, Any], *names: str) -> None:
    """Raises ConfigError naming those that a config lacks."""
    if missing := sorted(set(names) - values.keys()):
        raise ConfigError(f"config lacks {', '.join(missing)}")


VOCABULARY, CONTEXT, WIDTH, COUNT = 2**24, 2**24, 2**20, 2**10
"""The most that `size` takes of each kind."""
