"""What the world outside the engine needs to know of a model: a small file beside the weights.

The intervention service checks patches against it, gateways tokenise by it; neither loads a tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from backpack_lm import strict_json
from backpack_lm.config import BackpackConfig
from backpack_lm.generation import FALLBACK, SamplingDefaults, end_tokens
from backpack_lm.patch import ModelShape

NAME, TOKENIZER, TOPICS = "manifest.json", "tokenizer.json", "topics.safetensors"

HELD_OUT = "held_out.txt.xz"
"""The file in a model folder that holds text which the model wasn't trained on."""

_SHA256 = re.compile("[0-9a-f]{64}")


class ManifestError(ValueError):
    """A folder that holds no servable model, with the fix."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A model's fingerprint (SHA-256, hex, over config, tokenizer and weights), config and sense norms.

    `defaults` is how tokens are drawn where a request doesn't say, and `end_tokens` are those that end a text, both
    from a file of their own: `generation.py`.
    `tokenizer` is the SHA-256 of tokenizer.json, for those who read it without the weights; manifests of earlier
    versions don't say.

    A sense table that was computed when the model was put together differs in single roundings from one time to the
    next, on one machine, too. Such a model has an `origin`, the SHA-256 of what its table was computed from: the
    fingerprint is over that instead of the table, and `tables` are the SHA-256 of the files of this one.
    """

    fingerprint: str
    config: BackpackConfig
    sense_rms: tuple[float, ...]
    tokenizer: str | None = None
    defaults: SamplingDefaults = FALLBACK
    end_tokens: frozenset[int] = frozenset()
    origin: str | None = None
    tables: Mapping[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> ModelShape:
        """The model as patches see it. Padding of the vocabulary can't be patched."""
        config = self.config
        return ModelShape(self.fingerprint, config.tokens, config.num_senses, config.n_embd, self.sense_rms)

    def with_context(self, most: int) -> Manifest:
        """The same model where no text is longer than `most` tokens; 0: as long as it can be."""
        context = min(most or self.config.n_positions, self.config.n_positions)
        return replace(self, config=self.config.with_context(context))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a model folder's manifest. Raises ManifestError if there is none that can be used."""
        path = folder / NAME
        try:
            values = strict_json.read(path, finite=False)
            config = BackpackConfig.from_json(values["config"])
            norms = tuple(map(float, values["sense_rms"]))
            if len(norms) != config.num_senses or not all(0 <= norm < math.inf for norm in norms):
                raise ValueError(f"sense_rms is {norms}: not the norms of {config.num_senses} senses")
            fingerprint = str(values["fingerprint"])
            tokenizer, origin = values.get("tokenizer"), values.get("origin")
            tables = dict(values.get("tables", {}))
            named = {"tokenizer": tokenizer, "origin": origin}
            for name, digest in {**{name: text for name, text in named.items() if text is not None}, **tables}.items():
                if not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
                    raise ValueError(f"{name} is {digest!r}: not a SHA-256 in hex")
        except FileNotFoundError:
            raise ManifestError(
                f"{folder} has no {NAME}; `backpack model import` makes a servable folder from a checkpoint, `backpack "
                "model install NAME` one of a model of `backpack model list`"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"{path} is not a model's manifest: {error!r}") from None
        try:
            return cls(
                fingerprint, config, norms, tokenizer, SamplingDefaults.read(folder), end_tokens(folder, config),
                origin, tables,
            )  # fmt: skip
        except ValueError as error:
            raise ManifestError(f"{error}; mend the file, or remove it") from None

    def write(self, folder: Path) -> None:
        """Write it into a model folder, with the SHA-256 of the tokenizer that is there."""
        values: dict[str, object] = {
            "fingerprint": self.fingerprint,
            "config": self.config.to_json(),
            "sense_rms": list(self.sense_rms),
        }
        if tokenizer := tokenizer_digest(folder):
            values["tokenizer"] = tokenizer
        if self.origin:
            values |= {"origin": self.origin, "tables": dict(self.tables)}
        (folder / NAME).write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def tokenizer_digest(folder: Path) -> str | None:
    """SHA-256, hex, of a model folder's tokenizer.json; None if there is none."""
    path = folder / TOKENIZER
    return file_digest(path) if path.exists() else None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
