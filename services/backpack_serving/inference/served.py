"""The model that a replica serves, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from backpack_lm.attribution import Attribution, SenseReading, attribute, read_senses, token_log_probabilities
from backpack_lm.checkpoint import TOKENIZER, load, load_table
from backpack_lm.manifest import Manifest
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model with its sense table, tokenizer and fingerprint. Its methods block, and don't touch the engine."""

    manifest: Manifest
    model: Backpack
    table: SenseTable
    tokenizer: Tokenizer

    @classmethod
    def read(cls, folder: Path) -> ServedModel:
        """Raises ManifestError, CheckpointError or ValueError if there is no servable model in the folder."""
        model = load(folder)
        return cls(Manifest.read(folder), model, load_table(folder, model), Tokenizer.read(folder / TOKENIZER))

    def score(self, ids: tuple[int, ...], overlay: Overlay) -> list[float]:
        """log p of each token but the first."""
        values: list[float] = token_log_probabilities(self.model, torch.tensor(ids), overlay).tolist()
        return values

    def explain(self, ids: tuple[int, ...], overlay: Overlay, target: int | None) -> Attribution:
        return attribute(self.model, self.table, torch.tensor(ids), overlay, target)

    def senses(self, token: int, overlay: Overlay, limit: int) -> list[SenseReading]:
        return read_senses(self.model, self.table, token, overlay, limit)
