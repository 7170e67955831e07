"""How tokens are drawn where nobody says: a model's own `generation_config.json`, or the one table that is here.

The file is Hugging Face's and vLLM's. It is no part of the model's fingerprint: it changes no number of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backpack_lm.config import GPT2_END, BackpackConfig, read_object

NAME = "generation_config.json"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request gets that names no `temperature`, `top_k` or `top_p`.

    Temperature 0 is greedy; `top_k` 0 and `top_p` 1 leave the whole vocabulary. These values are for a model that
    has no file.
    """

    temperature: float = 0.7
    top_k: int = 30
    top_p: float = 1.0

    @classmethod
    def read(cls, folder: Path) -> SamplingDefaults:
        """A model folder's. Raises ValueError, naming the file, if it has one that can't be used."""
        path = folder / NAME
        try:
            return cls.of(read_object(path))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SamplingDefaults:
        """What such a file says. Of one that names some of the three, the others are temperature 1 and the whole
        vocabulary; one that names none says nothing. Whatever else it holds isn't read.

        Raises ValueError for what no request could ask for.
        """
        named = {name: values[name] for name in ("temperature", "top_k", "top_p") if values.get(name) is not None}
        if not named:
            return cls()
        for name, value in named.items():
            if not isinstance(value, int if name == "top_k" else int | float) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; it must be a number, and top_k a whole one")
        temperature, top_k, top_p = (named.get(name, unset) for name, unset in _UNNAMED.items())
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature is {temperature}; 0 (greedy) or more")
        if not -1 <= top_k < 2**31:
            raise ValueError(f"top_k is {top_k}; 1 or more, or 0 for all")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; above 0, at most 1")
        return cls(float(temperature), max(0, top_k), float(top_p))  # vLLM writes −1 for all


FALLBACK = SamplingDefaults()
"""For a model that has no file."""


def end_tokens(folder: Path, config: BackpackConfig) -> frozenset[int]:
    """The tokens that end a text: the config's, and those that the file names as its `eos_token_id`, one or several.

    Raises ValueError, naming the file, if there are such that the model doesn't have.
    """
    path, found = folder / NAME, set() if config.eos_token_id is None else {config.eos_token_id}
    try:
        named = read_object(path).get("eos_token_id")
    except FileNotFoundError:
        named = None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    for token in named if isinstance(named, list) else [] if named is None else [named]:
        if token == GPT2_END and config.tokens <= GPT2_END:
            continue  # which transformers writes where nobody said
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < config.tokens:
            raise ValueError(f"{path}: eos_token_id is {named!r}; this model's tokens are 0 to {config.tokens - 1}")
        found.add(token)
    return frozenset(found)


_UNNAMED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}

UNTRUNCATED = SamplingDefaults(**_UNNAMED)  # type: ignore[arg-type]
"""The model's own distribution: temperature 1 over the whole vocabulary."""
