"""Language modelling (paper, section 4): perplexity of a Backpack and of its Transformer twin, on the same text.

Perplexities are per token of the model's own vocabulary. Bits per byte compare models of different vocabularies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from backpack_lm.experiments.experiment import Headline, Result
from backpack_lm.lab.lab_model import LabModel, SteeredModel
from backpack_lm.lab.progress import Watch
from backpack_lm.lab.text import held_out, stream
from backpack_lm.lab.twin import read_twin
from backpack_lm.model import TransformerTwin
from backpack_lm.ordinary_text import plain
from backpack_lm.reports.report import Report, Table
from backpack_lm.training.evaluation import perplexity


@dataclass(frozen=True, slots=True)
class Measured:
    """One text: how much of it was read, and perplexity per token and bits per byte of each model."""

    text: str
    held_out: bool
    tokens: int
    bytes: int
    perplexity: float
    twin_perplexity: float | None

    def bits_per_byte(self, value: float) -> float:
        return math.log2(value) * self.tokens / self.bytes

    @property
    def ratio(self) -> float | None:
        return None if self.twin_perplexity is None else self.perplexity / self.twin_perplexity


@dataclass(frozen=True, slots=True)
class LanguageResult:
    """Each text, in rows of `context` tokens."""

    texts: list[Measured]
    context: int

    def headline(self) -> Headline:
        # The other texts are of another kind than was learnt.
        aside = [m for m in self.texts if m.held_out] or self.texts
        ratios = [m.ratio for m in aside if m.ratio is not None]
        figures = "held-out perplexity " + ", ".join(f"{m.perplexity:.1f}" for m in aside)
        if ratios:
            twins = ", ".join(f"{m.twin_perplexity:.1f}" for m in aside)
            figures += f"; the twin's {twins}: {min(ratios):.2f}–{max(ratios):.2f} times"
        return Headline(figures, "0.92–1.0 times", "at most 1.0 times", max(ratios) <= 1 if ratios else None)

    def report(self) -> Report:
        rows = tuple(
            (
                m.text,
                m.tokens,
                m.perplexity,
                m.twin_perplexity,
                m.ratio,
                m.bits_per_byte(m.perplexity),
                None if m.twin_perplexity is None else m.bits_per_byte(m.twin_perplexity),
            )
            for m in self.texts
        )
        columns = ("text", "tokens", "perplexity", "twin", "ratio", "bits per byte", "twin's")
        twins = [m.ratio for m in self.texts if m.ratio is not None]
        lead = "Perplexity per token, and bits per byte, on text that the model wasn't trained on."
        if twins:
            lead += f" Against its Transformer twin: {min(twins):.2f} to {max(twins):.2f} times the perplexity."
        return Report(
            "Language modelling",
            lead,
            (Table("Perplexity", columns, rows, digits=2),),
            notes=(
                f"Rows of {self.context} tokens, each read from its second token on with what stands before it.",
                "Held-out records are those that training set aside, by the hash of their text. A model that "
                "wasn't trained on these files may have seen them elsewhere; what of a model was chosen on them, "
                "its card says.",
                *(
                    ("The Backpack is behind its twin: the paper's parity does not show on this model.",)
                    if max(twins, default=0.0) > 1
                    else ()
                ),
                *(() if twins else ("No twin was given; --twin takes the folder of `backpack train --twin`.",)),
            ),
        )


@dataclass(frozen=True, slots=True)
class LanguageModelling:
    """`corpus` are JSON-lines files, of which the held-out records are read, `texts` are plain files; of each at
    most `tokens` tokens, in rows of `row`, or of the context where that is less."""

    corpus: tuple[Path, ...] = ()
    texts: tuple[Path, ...] = ()
    twin: Path | None = None
    tokens: int = 50_000
    row: int = 512
    NAME: ClassVar[str] = "language"

    def run(self, subject: LabModel, watch: Watch) -> Result:
        if not self.corpus and not self.texts:
            raise ValueError("no text; give a JSON-lines file with --corpus or a plain one with --text")
        twin = read_twin(self.twin, subject.config) if self.twin else None
        model = SteeredModel(subject, subject.overlay())
        contexts = [subject.config.n_positions, *([twin.config.n_positions] if twin else [])]
        length = min(self.row, *contexts)  # a longer context would help one of them
        parts = [(f"{path.name}, held out", True, held_out(path)) for path in self.corpus]
        parts += [("/".join(path.parts[-2:]), False, iter([plain(path)])) for path in self.texts]
        found = []
        for name, aside, records in watch(parts, "texts", len(parts)):
            ids = stream(subject, records, max(self.tokens, length) + 1, length + 1, name)
            found.append(_measure_corpus(name, aside, subject, model, twin, ids, length))
        return LanguageResult(found, length)


@torch.inference_mode()
def _measure_corpus(
    name: str,
    aside: bool,
    subject: LabModel,
    model: SteeredModel,
    twin: TransformerTwin | None,
    ids: Tensor,
    length: int,
) -> Measured:
    read = (len(ids) - 1) // length * length  # perplexity reads whole rows
    predicted = [token for token in ids[1 : read + 1].tolist() if token != subject.config.eos_token_id]
    size = sum(len(subject.tokenizer.token_bytes(token)) for token in predicted)  # the end of a text is no text
    ours = perplexity(model, ids, length=length)
    return Measured(name, aside, read, size, ours, perplexity(twin, ids, length=length) if twin else None)
