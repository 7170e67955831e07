"""The shape of a Backpack: a frozen config, spelled as Hugging Face spells it, and the published sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from backpack_lm import strict_json, trunks
from backpack_lm.trunks.spec import COUNT, WIDTH, Rotary, TrunkSpec, size
from backpack_lm.trunks.spec import ConfigError as ConfigError

GPT2_END = 50256
_ALWAYS = ("num_senses", "sense_intermediate_scale")


class StoredSenses(StrEnum):
    """What a checkpoint holds of its sense vectors: the network that computes them, or the finished table, in bfloat16
    or in int8 with a scale for each vector."""

    NETWORK = "network"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class BackpackConfig:
    """Shape of a Backpack LM: a trunk, and the senses on top of it, in the field names of Hugging Face's `config.json`.

    V = vocab_size, T = n_positions, d = n_embd are the trunk's, k = num_senses. `sense_inner` are the inner widths of
    the sense network's two MLPs; the published models have 4·d and sense_intermediate_scale·d, the k-ablation
    checkpoints d and d. Ids from `num_tokens` on are padding of the embedding: no text has them and they are never
    sampled.

    `query_layers` and `key_layers` are the trunk's states that the sense weights read: 0 are its embeddings, n what
    follows n layers; the last, which the published models read for both, has the trunk's final norm. With
    `sense_theta`, queries and keys turn by their positions, as rotary embeddings with this θ: then a sense can weigh
    words by their distance, of which the states of a trunk with rotary positions don't tell.
    """

    trunk: TrunkSpec
    num_senses: int = 16
    sense_intermediate_scale: int = 4
    sense_inner: tuple[int, int] | None = None
    eos_token_id: int | None = None
    num_tokens: int | None = None
    sense_head: int | None = None
    query_layers: tuple[int, ...] = ()
    key_layers: tuple[int, ...] = ()
    sense_theta: float | None = None
    senses: StoredSenses = StoredSenses.NETWORK

    def __post_init__(self) -> None:
        for name in ("num_senses", "sense_intermediate_scale"):
            size({name: getattr(self, name)}, name, COUNT)
        if not _two_sizes(self.sense_inner):
            raise ConfigError(f"sense_inner is {self.sense_inner!r}; it must be two widths, as integers")
        V, d, depth = self.vocab_size, self.n_embd, self.trunk.depth
        for name, first, last in (("num_tokens", 1, V), ("eos_token_id", 0, V - 1)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and first <= value <= last):
                raise ConfigError(f"{name} is {value!r}; with vocab_size {V} it is {first} to {last}")
        if self.sense_head is not None:
            size({"sense_head": self.sense_head}, "sense_head", WIDTH)
        elif d < self.num_senses:
            raise ConfigError(
                f"num_senses {self.num_senses} is more than n_embd {d}: "
                "each sense needs a head of at least one dimension"
            )
        theta = self.sense_theta
        if theta is not None and not (isinstance(theta, float) and 1 < theta < math.inf):
            raise ConfigError(f"sense_theta is {theta!r}; it must be a number above 1")
        if theta is not None and self.sense_head_width % 2:
            raise ConfigError(
                f"sense heads are {self.sense_head_width} wide; sense_theta turns pairs, so sense_head must be even"
            )
        for name in ("query_layers", "key_layers"):
            layers = getattr(self, name)
            if sorted(set(layers) & set(range(depth + 1))) != list(layers):
                raise ConfigError(f"{name} is {layers!r}; it must be layers from 0 to {depth}, ascending")

    @classmethod
    def gpt2(
        cls, vocab_size: int, n_positions: int, n_embd: int, n_layer: int, n_head: int, **more: Any
    ) -> BackpackConfig:
        """A Backpack on a GPT-2 trunk, from the fields of its `config.json`."""
        shape = {"vocab_size": vocab_size, "n_positions": n_positions, "n_embd": n_embd}
        return cls.from_json({**shape, "n_layer": n_layer, "n_head": n_head, "num_senses": 16, **more})

    @property
    def vocab_size(self) -> int:
        """V, ids of the embedding."""
        return self.trunk.vocab_size

    @property
    def n_positions(self) -> int:
        """T, the most tokens of a text."""
        return self.trunk.context

    @property
    def n_embd(self) -> int:
        """d, the width of the trunk and of sense vectors."""
        return self.trunk.width

    @property
    def tokens(self) -> int:
        """How many ids are real tokens; the rest of the embedding is padding."""
        return self.num_tokens or self.vocab_size

    @property
    def sense_head_width(self) -> int:
        """Width of one head of the sense weights: d // k, unless `sense_head` says otherwise."""
        return self.sense_head or self.n_embd // self.num_senses

    @property
    def sense_rotary(self) -> Rotary | None:
        """How the queries and keys of the sense weights turn by position, if they do."""
        return None if self.sense_theta is None else Rotary(self.sense_theta)

    @property
    def sense_mlp_widths(self) -> tuple[int, int]:
        """Inner widths of the sense network's block MLP and final MLP."""
        return self.sense_inner or (4 * self.n_embd, self.sense_intermediate_scale * self.n_embd)

    @property
    def read_layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The trunk's states that feed the sense weights' queries, and those that feed their keys."""
        last = (self.trunk.depth,)
        return self.query_layers or last, self.key_layers or last

    def with_vocabulary(self, size: int, eos_token_id: int | None) -> BackpackConfig:
        """The same with an embedding of so many tokens, all of them real, one of which ends a text."""
        return replace(self, trunk=replace(self.trunk, vocab_size=size), num_tokens=None, eos_token_id=eos_token_id)

    def with_context(self, positions: int) -> BackpackConfig:
        """The same with texts of at most so many tokens."""
        return replace(self, trunk=replace(self.trunk, context=positions))

    def with_tokens(self, count: int) -> BackpackConfig:
        """The same beside a tokenizer of so many tokens: ids that it hasn't are padding of the embedding.

        Raises ConfigError if it has more than the model.
        """
        if count > self.tokens:
            raise ConfigError(f"the tokenizer has {count} tokens, the model {self.tokens}: give the model's own")
        return self if count == self.tokens else replace(self, num_tokens=count)

    def to_json(self) -> dict[str, Any]:
        """The config as `config.json` holds it; of a GPT-2 trunk, readable by the published Hugging Face class."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trunk"}
        # What only newer models have is left out where it says nothing: fingerprints stay as they are.
        kept = {
            name: value
            for name, value in own.items()
            if name in _ALWAYS or value not in (None, (), StoredSenses.NETWORK)
        }
        return {**trunks.write(self.trunk), **kept}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> BackpackConfig:
        """Read a published `config.json`. Raises ConfigError naming what is missing or unsupported."""
        values = dict(values)
        if "num_content_vectors" in values:  # Stanford's Lightning spelling
            values.setdefault("num_senses", values["num_content_vectors"])
        trunk = trunks.read(values)
        if "num_senses" not in values:
            raise ConfigError("config has no num_senses: this is a Transformer, not a Backpack")
        if trunk.vocab_size == 50264:  # GPT-2's 50,257 padded to a multiple of 8
            values.setdefault("num_tokens", 50257)
            values.setdefault("eos_token_id", 50256)
        kept = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if kept.get("eos_token_id") == GPT2_END and trunk.vocab_size <= GPT2_END:
            kept["eos_token_id"] = None  # GPT-2's, which transformers writes where nobody said
        if isinstance(kept.get("sense_theta"), int) and not isinstance(kept["sense_theta"], bool):
            kept["sense_theta"] = float(kept["sense_theta"])
        for name in ("sense_inner", "query_layers", "key_layers"):
            if isinstance(kept.get(name), list):
                kept[name] = tuple(kept[name])
        if (senses := kept.get("senses", StoredSenses.NETWORK)) not in list(StoredSenses):
            raise ConfigError(f"senses is {senses!r}; it must be one of {', '.join(map(repr, map(str, StoredSenses)))}")
        return cls(**{**kept, "trunk": trunk, "senses": StoredSenses(senses)})

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


def _two_sizes(value: object) -> bool:
    """Whether it is nothing, or two widths."""
    if value is None:
        return True
    if not (isinstance(value, tuple) and len(value) == 2):
        return False
    return all(isinstance(width, int) and not isinstance(width, bool) and 1 <= width <= 2**24 for width in value)


def _published(layers: int, heads: int, width: int) -> BackpackConfig:
    return BackpackConfig.gpt2(50264, 512, width, n_layer=layers, n_head=heads, eos_token_id=50256, num_tokens=50257)


MICRO = _published(6, 6, 384)
MINI = _published(8, 8, 640)
SMALL = _published(12, 12, 768)
"""The sizes of the paper's section 4. The vocabulary is GPT-2's 50,257 padded to 50,264."""
