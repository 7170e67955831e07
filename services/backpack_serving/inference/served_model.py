"""The model that a replica serves, read from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import structlog
import torch
from backpack_lm.attribution import (
    Attribution,
    SenseReading,
    Terms,
    attribute,
    attribute_text,
    read_senses,
)
from backpack_lm.checkpoint import load, load_table, verify
from backpack_lm.compare import Comparison, Distribution, Predicting, Scoring
from backpack_lm.kernels import Precision
from backpack_lm.manifest import HELD_OUT, TOKENIZER, Manifest
from backpack_lm.mapped_table import mapped, prepare
from backpack_lm.model import Backpack
from backpack_lm.ordinary_text import OrdinaryText, excerpts, plain
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import ModelShape, PatchError, Violation
from backpack_lm.sense_map import MapReading, map_sense
from backpack_lm.sense_search import CellSearch, Effect
from backpack_lm.token_counts import TokenCounts
from backpack_lm.tokenizer import Tokenizer
from backpack_lm.word_uses import ParagraphedText, UseReading
from torch import Tensor

from backpack_serving.errors import PreconditionFailed
from backpack_serving.wire.compare import ComparisonQuery
from backpack_serving.wire.search import SearchQuery
from backpack_serving.wire.words import MapQuery

log = structlog.get_logger(__name__)

TRIED = 64
"""Words that a release is tried out on, where the context has room for them."""


class Ranked(NamedTuple):
    """Of each token of a text but the first: log p, and the likeliest in its place with theirs."""

    logs: list[float]
    alternatives: list[list[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model with its sense table, tokenizer and fingerprint. Its methods block, and don't touch the engine.

    `frequencies` [V] are occurrences of its tokens in a million, if the folder has counts of them. `table_file` is what
    `storage` is mapped from, if it is.
    """

    manifest: Manifest
    model: Backpack
    table: SenseTable
    tokenizer: Tokenizer
    storage: Tensor
    folder: Path
    frequencies: Tensor | None = None
    table_file: Path | None = None

    @classmethod
    def read(
        cls,
        folder: Path,
        precision: Precision = Precision.FLOAT32,
        room: int = 0,
        device: torch.device = torch.device("cpu"),
        placed: bool = True,
    ) -> ServedModel:
        """The model in a folder, its table mapped from the host's cache, in `storage` [V·k + room, d] on a device.

        Ranks place their own parts of it: for them it isn't `placed`, but on the CPU, in the device's precision.

        All else stays on the CPU: releases are compiled there, and texts scored and explained.

        Raises ManifestError, CheckpointError or ValueError if there is no servable model in the folder, or it is
        another than its fingerprint says.
        """
        # What isn't the model that it is called is never served, nor made a table of that every replica would map.
        with ThreadPoolExecutor(1) as beside:  # files are hashed while they are loaded
            verified = beside.submit(verify, folder)
            try:
                model = load(folder)
            finally:
                manifest = verified.result()  # of a damaged folder, this says more than what couldn't be loaded
        dtype = precision.serving(model.config, device.type)
        file = None
        try:
            file = prepare(model, manifest.fingerprint, dtype)
            storage = mapped(file, model.config, dtype, room)
        except OSError as error:
            log.warning("the sense table can't be shared with other replicas", error=str(error))
            storage = model.sense_table().with_room(room, dtype)
        config = model.config
        own = storage[: config.vocab_size * config.num_senses]
        table = load_table(folder, model, manifest, own.view(config.vocab_size, config.num_senses, -1))
        tokenizer = Tokenizer.read(folder / TOKENIZER, manifest.tokenizer)
        counts = TokenCounts.read(folder, config.tokens)
        frequencies = None if counts is None else counts.per_million
        return cls(
            manifest, model, table, tokenizer, storage.to(device) if placed else storage, folder, frequencies, file
        )

    @property
    def shape(self) -> ModelShape:
        """What patches are checked by."""
        return replace(self.manifest.shape, spell=self.tokenizer.piece)

    def try_out(self, overlay: Overlay) -> None:
        """Predict from the words that a release edits most. Raises PatchError if what comes out isn't numbers.

        Edits that are each within their limits may amount to vectors that no sum can hold.
        """
        if not len(overlay.rows):
            return
        norms = torch.cat([overlay.rows.float().norm(dim=1), torch.zeros(1)])  # the last: of what isn't replaced
        count = min(TRIED, len(overlay.tokens), self.model.config.n_positions)
        largest = norms[overlay.index].amax(1).topk(count).indices
        with torch.inference_mode():
            logits = self.model.mix(overlay.tokens[largest][None], overlay) @ self.model.embedding.t()
        if not bool(logits.isfinite().all()):
            raise PatchError(
                Violation("revisions", "NON_FINITE", "the model predicts no numbers under these edits together")
            )

    def score(self, ids: tuple[int, ...], overlay: Overlay) -> list[float]:
        """log p of each token but the first, of two at least."""
        (logs,) = Scoring(self.model, self.table, torch.tensor(ids)).read([overlay])
        return logs

    def rank(self, ids: tuple[int, ...], overlay: Overlay, top: int) -> Ranked:
        """log p of each token but the first, of two at least, and the `top` likeliest in its place."""
        text = Scoring(self.model, self.table, torch.tensor(ids))
        (logs,) = text.read([overlay])
        return Ranked(logs, text.likeliest(overlay, top))

    def explain(self, ids: tuple[int, ...], overlay: Overlay, target: int | None) -> Attribution:
        return attribute(self.model, self.table, torch.tensor(ids), overlay, target)

    def explain_text(self, ids: Sequence[int], overlay: Overlay, start: int) -> list[Terms]:
        """What made each token from position `start` on likely."""
        return attribute_text(self.model, self.table, torch.tensor(ids), overlay, start)

    def compare(self, query: ComparisonQuery) -> Comparison[list[float] | Distribution]:
        """One trunk pass over the text of a query, to be compared under any releases."""
        ids = torch.tensor(query.ids)
        if query.score:
            return Scoring(self.model, self.table, ids)
        return Predicting(self.model, self.table, ids, query.top, query.targets)

    def ordinary_text(self) -> OrdinaryText:
        """Excerpts of the held-out text in the model's folder. Raises PreconditionFailed if there is none."""
        rows = excerpts(self._held_out(), self.tokenizer, self.manifest.config.n_positions)
        if not rows:
            raise _no_held_out_text()
        return OrdinaryText(self.model, self.table, rows)

    def paragraphs(self) -> ParagraphedText:
        """All of the held-out text. Raises PreconditionFailed if there is none."""
        return ParagraphedText(self._held_out(), self.tokenizer, self.model)

    def _held_out(self) -> str:
        file = self.folder / HELD_OUT
        try:
            text = plain(file)
        except (OSError, ValueError) as error:
            log.warning("no held-out text", file=str(file), error=str(error))
            text = ""
        if not text.strip():
            raise _no_held_out_text()
        return text

    def use(self, text: ParagraphedText, place: int, overlay: Overlay) -> UseReading:
        """What the senses of the word at a place of a text say there."""
        return text.use(self.table, overlay, place)

    def map_sense(self, query: MapQuery, overlay: Overlay) -> MapReading:
        """Where one sense of many words lies."""
        return map_sense(
            self.model, self.table, overlay, query.words, query.sense, query.toward, query.against, query.limit
        )

    def senses(self, token: int, overlay: Overlay, limit: int, neighbours: int) -> list[SenseReading]:
        return read_senses(self.model, self.table, token, overlay, limit, neighbours)

    def search(self, query: SearchQuery, overlay: Overlay) -> CellSearch:
        """A search for senses, which hasn't read the query's prompts yet."""
        against, effect = None if query.against_all else query.against, Effect[query.effect]
        return CellSearch(self.model, self.table, overlay, query.words, against, effect, self.frequencies)


def _no_held_out_text() -> PreconditionFailed:
    message = f"the model has no held-out text: put some that it wasn't trained on into {HELD_OUT}, in its folder"
    return PreconditionFailed("NO_HELD_OUT_TEXT", f"{message}, and start the replica again")
