"""How often each token occurs in text: counts that are kept with a model, in one small file of its folder.

They say how much a word matters in real text. They are no part of the model's fingerprint, and a model does without.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backpack_lm import strict_json
from backpack_lm.manifest import tokenizer_digest

NAME = "token_counts.json.xz"
"""An object with `counts`, one for each token, and `tokenizer`, the SHA-256 of the tokenizer.json that made them."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """How often each token of a tokenizer, named by the SHA-256 of its file, occurs."""

    counts: tuple[int, ...]
    tokenizer: str | None

    @property
    def per_million(self) -> Tensor:
        """Occurrences of each token in a million [tokens], float32; zeros of no text."""
        counts = torch.tensor(self.counts, dtype=torch.float64)
        return (counts * (1e6 / max(1.0, float(counts.sum())))).float()

    @classmethod
    def of(cls, folder: Path, counts: Sequence[int]) -> TokenCounts:
        """Counts of the tokens of a folder's tokenizer.json."""
        return cls(tuple(counts), tokenizer_digest(folder))

    @classmethod
    def read(cls, folder: Path, tokens: int) -> TokenCounts | None:
        """A model folder's, of so many tokens; None if it has none.

        Raises ValueError, with the fix, for a file that can't be used or that counts another tokenizer's tokens.
        """
        path = folder / NAME
        try:
            values = strict_json.parse(lzma.decompress(path.read_bytes()))
            found = cls(_checked_counts(values, tokens), str(values["tokenizer"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
            raise ValueError(f"{path} holds no counts of tokens: {error}; {_fix(folder)}") from None
        if found.tokenizer != tokenizer_digest(folder):
            raise ValueError(f"{path} counts the tokens of another tokenizer.json than is beside it; {_fix(folder)}")
        return found

    def write(self, folder: Path) -> None:
        """Write them into a model folder, whole or not at all. Raises OSError."""
        text = json.dumps({"tokenizer": self.tokenizer, "counts": self.counts}, separators=(",", ":"))
        partial = folder / f"{NAME}.partial"
        partial.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
        partial.replace(folder / NAME)


def _checked_counts(values: Any, tokens: int) -> tuple[int, ...]:
    counts = values["counts"]
    if not (isinstance(counts, list) and all(type(count) is int and 0 <= count < 2**63 for count in counts)):
        raise ValueError("its `counts` aren't whole numbers of 0 or more")
    if len(counts) != tokens:
        raise ValueError(f"it has counts of {len(counts)} tokens, the tokenizer has {tokens}")
    return tuple(counts)


def _fix(folder: Path) -> str:
    return f"count again (`backpack model count {folder} TEXT`), or remove the file"
