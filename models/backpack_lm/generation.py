"""How tokens are drawn where nobody says: a model's own `generation_config.json`, or the one table that is here.

The file is Hugging Face's and vLLM's. It is no part of the model's fingerprint: it changes no number of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backpack_lm.config import GPT2_END, BackpackConfig, read_object

NAME = "generation_config.json"


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request gets that names none of these.

    Temperature 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 leave the whole vocabulary. These values are for a
    model that has no file.
    """

    temperature: float = 0.7
    top_k: int = 30
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def read(cls, folder: Path) -> SamplingDefaults:
        """A model folder's. Raises ValueError, naming the file, if it has one that can't be used."""
        with _named(folder):
            return cls.of(_values(folder))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SamplingDefaults:
        """What such a file says. Of one that names some of these, the others are temperature 1, the whole vocabulary
        and no penalty; one that names none says nothing. Whatever else it holds isn't read.

        Raises ValueError for what no request could ask for.
        """
        named = {name: values[name] for name in _UNNAMED if values.get(name) is not None}
        if not named:
            return cls()
        for name, value in named.items():
            if not isinstance(value, int if name == "top_k" else int | float) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; it must be a number, and top_k a whole one")
        temperature, top_k, top_p, min_p, penalty = (named.get(name, unset) for name, unset in _UNNAMED.items())
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature is {temperature}; 0 (greedy) or more")
        if not -1 <= top_k < 2**31:
            raise ValueError(f"top_k is {top_k}; 1 or more, or 0 for all")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; above 0, at most 1")
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p is {min_p}; 0 to 1")
        if not 0 < penalty < math.inf:
            raise ValueError(f"repetition_penalty is {penalty}; above 0, 1 for none")
        return cls(float(temperature), max(0, top_k), float(top_p), float(min_p), float(penalty))  # vLLM's −1 is all


FALLBACK = SamplingDefaults()
"""For a model that has no file."""


def end_tokens(folder: Path, config: BackpackConfig) -> frozenset[int]:
    """The tokens that end a text: the config's, and those that the file names as its `eos_token_id`, one or several.

    Raises ValueError, naming the file, if there are such that the model doesn't have.
    """
    found = set() if config.eos_token_id is None else {config.eos_token_id}
    with _named(folder):
        named = _values(folder).get("eos_token_id")
        for token in named if isinstance(named, list) else [] if named is None else [named]:
            if token == GPT2_END and config.tokens <= GPT2_END:
                continue  # which transformers writes where nobody said
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < config.tokens:
                raise ValueError(f"eos_token_id is {named!r}; this model's tokens are 0 to {config.tokens - 1}")
            found.add(token)
    return frozenset(found)


def _values(folder: Path) -> dict[str, Any]:
    """What a model folder's file holds; nothing if there is none."""
    try:
        return read_object(folder / NAME)
    except FileNotFoundError:
        return {}


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Errors name the file."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / NAME}: {error}") from None


_UNNAMED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}

UNTRUNCATED = SamplingDefaults(**_UNNAMED)  # type: ignore[arg-type]
"""The model's own distribution: temperature 1 over the whole vocabulary, without a penalty."""
