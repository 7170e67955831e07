"""Families of trunks: each a file that knows their config.json and the names of their tensors.

A family has three functions, `read(values)`, `write(trunk)` and `published(name)`. A new one is a file with these, and
a line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from backpack_lm.trunks import gpt2, llama
from backpack_lm.trunks.spec import Activation, ConfigError, Layer, NormKind, Rotary, RotaryScaling, TrunkSpec

__all__ = ["Activation", "ConfigError", "Layer", "NormKind", "Rotary", "RotaryScaling", "TrunkSpec", "read", "write"]

FAMILIES: Mapping[str, ModuleType] = {"gpt2": gpt2, "llama": llama, "mistral": llama, "qwen2": llama}
"""By `model_type` in config.json."""


def read(values: Mapping[str, Any], **defaults: bool) -> TrunkSpec:
    """The trunk that a config.json of any family describes; `defaults` are the family's own. Raises ConfigError."""
    name = values.get("model_type", "gpt2")
    # Published Backpacks call themselves by names of their own, and all have GPT-2's fields.
    family = gpt2 if "n_embd" in values else FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ConfigError(f"model_type is {name!r}; trunks of {', '.join(FAMILIES)} are computed")
    trunk: TrunkSpec = family.read(values, **defaults)
    return trunk


def write(trunk: TrunkSpec) -> dict[str, Any]:
    """The trunk's part of a config.json, which `read` reads."""
    values: dict[str, Any] = FAMILIES[trunk.family].write(trunk)
    return values


def published(trunk: TrunkSpec, name: str) -> tuple[tuple[str, ...], bool]:
    """The tensors of the family's checkpoints that the tensor of a name in `model.Trunk` is made of, one behind the
    other by outputs, and whether each is to be transposed first."""
    names: tuple[tuple[str, ...], bool] = FAMILIES[trunk.family].published(name)
    return names
