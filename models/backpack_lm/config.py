"""The shape of a Backpack: a frozen config, spelled as Hugging Face spells it, and the published sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from backpack_lm import strict_json


class ConfigError(ValueError):
    """A config that doesn't describe a Backpack, with the offending value and the fix."""


_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_approx")
"""Names of one function: Hugging Face's, and those of Stanford's training code."""

_GPT2_END = 50256

_MOST = {
    "vocab_size": 2**24,
    "n_positions": 2**24,
    "n_embd": 2**20,
    "n_layer": 2**10,
    "n_head": 2**10,
    "num_senses": 2**10,
    "sense_intermediate_scale": 2**10,
}
"""Far beyond any model: a file that says more is damaged, and to make such a shape would never end."""


@dataclass(frozen=True, slots=True)
class BackpackConfig:
    """Shape of a Backpack LM, in the field names of Hugging Face's `config.json`.

    V = vocab_size, T = n_positions, d = n_embd, k = num_senses; `n_layer` and `n_head` are the trunk's.
    `sense_inner` are the inner widths of the sense network's two MLPs; the published models have
    4·d and sense_intermediate_scale·d, the k-ablation checkpoints d and d. Ids from `num_tokens` on
    are padding of the embedding: no text has them and they are never sampled.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    num_senses: int = 16
    sense_intermediate_scale: int = 4
    sense_inner: tuple[int, int] | None = None
    scale_attn_by_inverse_layer_idx: bool = True
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int | None = None
    num_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            if not _is_size(getattr(self, name), most):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be an integer from 1 to {most}")
        inner, epsilon, scaled = self.sense_inner, self.layer_norm_epsilon, self.scale_attn_by_inverse_layer_idx
        two = isinstance(inner, tuple) and len(inner) == 2
        if inner is not None and not (two and all(_is_size(width, 2**24) for width in inner)):
            raise ConfigError(f"sense_inner is {inner!r}; it must be two widths, as integers")
        if not isinstance(epsilon, float) or not 0 < epsilon < 1:
            raise ConfigError(f"layer_norm_epsilon is {epsilon!r}; it must be a number between 0 and 1")
        if not isinstance(scaled, bool):
            raise ConfigError(f"scale_attn_by_inverse_layer_idx is {scaled!r}; it must be true or false")
        V = self.vocab_size
        for name, first, last in (("num_tokens", 1, V), ("eos_token_id", 0, V - 1)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and first <= value <= last):
                raise ConfigError(f"{name} is {value!r}; with vocab_size {V} it is {first} to {last}")
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd {self.n_embd} does not divide into n_head {self.n_head} heads")
        if self.n_embd < self.num_senses:
            raise ConfigError(
                f"num_senses {self.num_senses} is more than n_embd {self.n_embd}: "
                "each sense needs a head of at least one dimension"
            )

    @property
    def tokens(self) -> int:
        """How many ids are real tokens; the rest of the embedding is padding."""
        return self.num_tokens or self.vocab_size

    @property
    def sense_head_width(self) -> int:
        """Width of one head of the sense weights: d // k."""
        return self.n_embd // self.num_senses

    @property
    def sense_mlp_widths(self) -> tuple[int, int]:
        """Inner widths of the sense network's block MLP and final MLP."""
        return self.sense_inner or (4 * self.n_embd, self.sense_intermediate_scale * self.n_embd)

    def with_tokens(self, count: int) -> BackpackConfig:
        """The same beside a tokenizer of so many tokens: ids that it hasn't are padding of the embedding.

        Raises ConfigError if it has more than the model.
        """
        if count > self.tokens:
            raise ConfigError(f"the tokenizer has {count} tokens, the model {self.tokens}: give the model's own")
        return self if count == self.tokens else replace(self, num_tokens=count)

    def to_json(self) -> dict[str, Any]:
        """The config as `config.json` holds it, readable by the published Hugging Face class."""
        values = {k: v for k, v in asdict(self).items() if v is not None}
        return {
            "architectures": ["BackpackGPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            **values,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BackpackConfig:
        """Read a published `config.json`. Raises ConfigError naming what is missing or unsupported."""
        values = dict(values)
        if "num_content_vectors" in values:  # Stanford's Lightning spelling
            values.setdefault("num_senses", values["num_content_vectors"])
        if (activation := values.get("activation_function", "gelu_new")) not in _TANH_GELU:
            raise ConfigError(
                f"activation_function {activation!r}; a Backpack uses 'gelu_new', the tanh approximation of GELU, "
                f"also called {', '.join(map(repr, _TANH_GELU[1:]))}"
            )
        if (scaled := values.get("scale_attn_weights", True)) is not True:
            raise ConfigError(f"scale_attn_weights is {scaled!r}; a Backpack's attention is scaled by 1/√(d/H)")
        known = {f.name for f in fields(cls)}
        required = {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head"}
        if missing := sorted(required - values.keys()):
            raise ConfigError(f"config lacks {', '.join(missing)}")
        if "num_senses" not in values:
            raise ConfigError("config has no num_senses: this is a Transformer, not a Backpack")
        if values["vocab_size"] == 50264:  # GPT-2's 50,257 padded to a multiple of 8
            values.setdefault("num_tokens", 50257)
            values.setdefault("eos_token_id", 50256)
        kept = {name: value for name, value in values.items() if name in known}
        size = values["vocab_size"]
        if kept.get("eos_token_id") == _GPT2_END and isinstance(size, int) and size <= _GPT2_END:
            kept["eos_token_id"] = None  # GPT-2's, which transformers writes where nobody said
        if isinstance(kept.get("sense_inner"), list):
            kept["sense_inner"] = tuple(kept["sense_inner"])
        return cls(**kept)

    @classmethod
    def read(cls, path: Path) -> BackpackConfig:
        """Read a `config.json` file. Raises ConfigError if it isn't one."""
        try:
            return cls.from_json(read_object(path))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; who uses a number checks that it is finite. Raises OSError, and ValueError if it
    holds no object."""
    values = strict_json.read(path, finite=False)
    if not isinstance(values, dict):
        raise ValueError("it isn't an object")
    return values


def _is_size(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _published(layers: int, heads: int, width: int) -> BackpackConfig:
    return BackpackConfig(
        vocab_size=50264,
        n_positions=512,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        eos_token_id=50256,
        num_tokens=50257,
    )


MICRO = _published(6, 6, 384)
MINI = _published(8, 8, 640)
SMALL = _published(12, 12, 768)
"""The sizes of the paper's section 4. The vocabulary is GPT-2's 50,257 padded to 50,264."""
