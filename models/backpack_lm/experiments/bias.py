"""Gender bias (paper, section 6): which sense tells “he” from “she” after a role noun, and removing it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from backpack_lm.counted import counted
from backpack_lm.experiments.experiment import Headline, Result
from backpack_lm.lab.contrast import find_sense
from backpack_lm.lab.debias import Debiased, debias, least
from backpack_lm.lab.elsewhere import MOST_MOVED
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.professions import ESTIMATION, EVALUATION, NOUNS
from backpack_lm.lab.progress import ResumeJournal, Watch
from backpack_lm.lab.twin import read_twin
from backpack_lm.model import TransformerTwin
from backpack_lm.reports.plots import bars
from backpack_lm.reports.report import Report, Table

PENALTY = 1.0
"""What the paper has a scale's distance from 1 cost beside the bias."""


@dataclass(frozen=True, slots=True)
class NullSpace:
    """The Transformer with each noun's input embedding projected off E[she] − E[he]: mean bias ratios."""

    unmodified: float
    removed: float
    fitted: float


@dataclass(frozen=True, slots=True)
class BiasResult:
    """As the paper fits, with nothing that holds the scales near 1, and as `backpack lab debias` does: with a
    bound on what else moves."""

    backpack: Debiased
    free: Debiased
    twin: NullSpace | None
    bounded: Debiased | None = None

    def _ways(self) -> list[tuple[Debiased, str]]:
        ways = [(self.backpack, ""), (self.free, ", scales free")]
        return [*ways, *([(self.bounded, ", within the lab's bound")] if self.bounded else [])]

    def headline(self) -> Headline:
        found = self.backpack
        gone = found.share_removed(found.removed), found.share_removed(found.fitted)
        figures = (
            f"ratio unmodified / remove / optimise: {found.unmodified:.2f} / {found.removed:.2f} / "
            f"{found.fitted:.2f}; {gone[0]:.0%} and {gone[1]:.0%} of the excess over 1 gone, "
            f"{counted(len(found.nouns), 'noun')}; scales fitted freely: {self.free.fitted:.2f}, "
            f"{self.free.share_removed(self.free.fitted):.0%}"
        )
        if (within := self.bounded) is not None:
            figures += (
                f"; within the lab's bound on what else moves: {within.fitted:.2f}, "
                f"{within.share_removed(within.fitted):.0%}"
            )
        if self.twin is not None:
            twin = self.twin
            figures += f"; twin, null space: {twin.unmodified:.2f} / {twin.removed:.2f} / {twin.fitted:.2f}"
        paper = "4.34 / 2.88 / 2.16; 44 % and 65 %; Transformer 7.02 / 6.72 / 7.02"
        return Headline(figures, paper, "44 % and 65 %", gone[0] >= 0.44 and gone[1] >= 0.65)

    def report(self) -> Report:
        found = self.backpack
        columns = (
            "model",
            "unmodified",
            "remove",
            "optimise",
            "excess gone, remove",
            "excess gone, optimise",
            "else moved, optimise",
            "after neutral prompts",
        )
        rows: list[tuple[str | float | None, ...]] = [
            (
                f"Backpack, sense {one.sense}{how}",
                *values,
                *(f"{one.share_removed(v):.0%}" for v in values[1:]),
                f"{one.mean(lambda noun: noun.moved):.0%}",
                f"{one.mean(lambda noun: noun.neutral):.0%}",
            )
            for one, how in self._ways()
            for values in [(one.unmodified, one.removed, one.fitted)]
        ]
        if self.twin is not None:
            twin = self.twin
            gone = ((twin.unmodified - v) / (twin.unmodified - 1) for v in (twin.removed, twin.fitted))
            rows.append(
                (
                    "Transformer, null space",
                    twin.unmodified,
                    twin.removed,
                    twin.fitted,
                    *(f"{g:.0%}" for g in gone),
                    None,
                    None,
                )
            )
        names = [noun.noun for noun in found.nouns]
        series = {
            "unmodified": [noun.unmodified for noun in found.nouns],
            "sense removed": [noun.removed for noun in found.nouns],
            "scale fitted": [noun.fitted for noun in found.nouns],
        }
        removed = [effect.bias_removed for effect in found.search.senses]
        report = found.report()
        notes = (
            f"Mean over nouns and {len(EVALUATION)} evaluation prompts of max(p(he)/p(she), p(she)/p(he)); "
            f"1 is none. The sense and the scales are chosen on {len(ESTIMATION)} other prompts.",
            "Optimise makes bias + |1 − scale| least, as the paper does: where no scale lowers the bias by more "
            "than it moves, the scale stays 1. Free scales make the bias alone least; within the lab's bound they "
            f"move at most {MOST_MOVED:.0%} of the probability elsewhere, after any prompt that they are fitted "
            "on and on the average after neutral ones about the noun. “Else moved” is the mean total variation "
            "distance over all tokens but the two: a ratio near 1 may be bought by it.",
            *(
                ()
                if found.fitted < found.removed < found.unmodified
                else ("The paper's order, optimise below remove below unmodified, does not show on this model.",)
            ),
            *(("No twin was given, so there is no null-space baseline; --twin takes one.",) if not self.twin else ()),
            *report.notes,
        )
        numbers = [str(sense) for sense in range(len(removed))]
        return replace(
            report,
            title="Gender bias",
            warning="",  # what is reached and what isn't, the headline and the notes say
            tables=(Table("Bias ratio", columns, tuple(rows), digits=2), *report.tables),
            figures=(
                bars("Bias of each noun", names, series, "noun", "ratio"),
                bars("Bias with each sense removed", numbers, {"": removed}, "sense", "ratio"),
            ),
            notes=notes,
        )


@dataclass(frozen=True, slots=True)
class GenderBias:
    """40 role nouns, those that are one token in the model; 5 prompts to find and fit on, 13 to evaluate."""

    twin: Path | None = None
    sense: int | None = None
    NAME: ClassVar[str] = "bias"

    def run(self, subject: LabModel, watch: Watch) -> Result:
        twin = read_twin(self.twin, subject.config) if self.twin else None
        search = find_sense(subject, NOUNS, "he", "she", ESTIMATION, watch)
        found, free, bounded = (
            debias(
                subject,
                NOUNS,
                watch,
                ResumeJournal(None, {}),
                sense=self.sense,
                penalty=penalty,
                search=search,
                most_moved=most_moved,
            )
            for penalty, most_moved in ((PENALTY, 1.0), (0.0, 1.0), (0.0, MOST_MOVED))
        )
        baseline = null_space(subject, twin, found.search.words, watch) if twin else None
        return BiasResult(found, free, baseline, bounded)


def null_space(subject: LabModel, twin: TransformerTwin, nouns: Sequence[str], watch: Watch) -> NullSpace:
    """The baseline of the paper's table 6: remove, or scale by a fitted amount, what a noun's input embedding has
    of the direction from “he” to “she”; the output embedding stays as it is."""
    she, he = subject.token("she"), subject.token("he")
    direction = twin.embedding[she] - twin.embedding[he]

    def bias(noun: str, templates: Sequence[str], keep: float) -> float:
        rows = [subject.ids(template.replace("{}", noun))[-twin.config.n_positions :] for template in templates]
        last = torch.tensor([len(row) - 1 for row in rows])
        ids = torch.zeros(len(rows), int(last.max()) + 1, dtype=torch.long)  # padded behind, where nothing looks
        for at, row in enumerate(rows):
            ids[at, : len(row)] = torch.tensor(row)
        with _projected(twin, subject.token(noun), direction, keep):
            logits = twin.mix(ids)[torch.arange(len(rows)), last] @ twin.embedding[[he, she]].t()
        return float((logits[:, 0] - logits[:, 1]).double().abs().exp().mean())

    found: list[tuple[float, float, float]] = []
    with torch.inference_mode():
        for noun in watch(nouns, "nouns, null space", len(nouns)):
            fitted = least(partial(bias, noun, ESTIMATION), PENALTY)
            one, none, best = (bias(noun, EVALUATION, keep) for keep in (1.0, 0.0, fitted))
            found.append((one, none, best))
    return NullSpace(*map(fmean, zip(*found, strict=True)))


@contextmanager
def _projected(twin: TransformerTwin, token: int, direction: Tensor, keep: float) -> Iterator[None]:
    """The twin with (1 − keep) of the token's component along `direction` taken out of its input embedding."""

    def project(module: object, arguments: tuple[Tensor], embedded: Tensor) -> Tensor:
        amount = embedded @ direction / (direction @ direction)
        off = embedded - (1 - keep) * amount[..., None] * direction
        return torch.where((arguments[0] == token)[..., None], off, embedded)

    hook = twin.gpt2_model.wte.register_forward_hook(project)
    try:
        yield
    finally:
        hook.remove()
