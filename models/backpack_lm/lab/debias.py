"""Take a bias out of words by scaling the one sense that carries it (paper, section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from backpack_lm.counted import counted
from backpack_lm.lab.contrast import Contrast, Noun, SenseSearch, find_sense
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.professions import ESTIMATION, EVALUATION
from backpack_lm.lab.progress import ResumeJournal, Watch
from backpack_lm.patch import Edit, PatchLimits
from backpack_lm.reports.report import Report, Table


@dataclass(frozen=True, slots=True)
class DebiasedNoun:
    """One noun: the scale fitted on the estimation prompts, and bias on the evaluation prompts."""

    noun: str
    scale: float
    unmodified: float
    removed: float
    fitted: float


@dataclass(frozen=True, slots=True)
class Debiased:
    """The scales of one sense, and what they do on prompts that they weren't fitted on."""

    one: str
    other: str
    sense: int
    search: SenseSearch
    nouns: list[DebiasedNoun]

    def mean(self, what: Callable[[DebiasedNoun], float]) -> float:
        return fmean(map(what, self.nouns))

    @property
    def unmodified(self) -> float:
        return self.mean(lambda noun: noun.unmodified)

    @property
    def removed(self) -> float:
        return self.mean(lambda noun: noun.removed)

    @property
    def fitted(self) -> float:
        return self.mean(lambda noun: noun.fitted)

    def share_removed(self, bias: float) -> float:
        """How much of the excess over 1 is gone."""
        return (self.unmodified - bias) / (self.unmodified - 1)

    def edits(self, subject: LabModel) -> list[Edit]:
        """The fitted scales as a patch."""
        contrast = Contrast.of(subject, self.one, self.other)
        nouns = ((Noun(subject, n.noun, EVALUATION[:1], contrast), n.scale) for n in self.nouns)
        return [edit for noun, scale in nouns for edit in noun.scaled(self.sense, scale)]

    def table(self) -> Table:
        rows = tuple((n.noun, n.scale, n.unmodified, n.removed, n.fitted) for n in self.nouns)
        return Table("Every noun", ("noun", "scale", "unmodified", "removed", "fitted"), rows, digits=2)

    def report(self) -> Report:
        guilty = self.search.guilty
        told = f"Sense {guilty} tells them apart the most" + (
            "." if self.sense == guilty else f"; sense {self.sense} was asked for."
        )
        return Report(
            f"“{self.one}” and “{self.other}” after {counted(len(self.nouns), 'noun')}",
            f"{told} Mean ratio of the two on prompts that nothing was fitted on: {self.unmodified:.2f} "
            f"unmodified, {self.removed:.2f} with the sense removed, {self.fitted:.2f} with one scale a noun: "
            f"{self.share_removed(self.fitted):.0%} of the excess over 1 is gone.",
            (self.table(), *self.search.report().tables),
            notes=(*self._bounded(), *self.search.report().notes),
        )

    def _bounded(self) -> tuple[str, ...]:
        """Whose fit ended where a patch may scale no further."""
        bound = PatchLimits().norm_factor
        if not (nouns := [n.noun for n in self.nouns if abs(n.scale) > 0.999 * bound]):
            return ()
        return (f"At ±{bound:g}, the most that a patch may scale by: {', '.join(nouns)}.",)


def debias(
    subject: LabModel,
    nouns: Sequence[str],
    watch: Watch,
    journal: ResumeJournal,
    one: str = "he",
    other: str = "she",
    sense: int | None = None,
    estimation: Sequence[str] = ESTIMATION,
    evaluation: Sequence[str] = EVALUATION,
    penalty: float = 0.0,
    search: SenseSearch | None = None,
) -> Debiased:
    """Fit one scale for each noun that is a single token, on the estimation prompts; `penalty` holds it near 1.

    The sense is found there, too, unless it is given, or a `search` of the same nouns and prompts that was made
    before. Raises ValueError if the model knows none of the nouns, has no such sense, or the penalty is no number.
    """
    if not math.isfinite(penalty):
        raise ValueError(f"penalty {penalty}; write a number, 0 or more")
    if sense is not None and not 0 <= sense < subject.config.num_senses:
        raise ValueError(f"sense {sense}; this model's are 0 to {subject.config.num_senses - 1}")
    contrast = Contrast.of(subject, one, other)
    search = search or find_sense(subject, nouns, one, other, estimation, watch)
    chosen = search.guilty if sense is None else sense

    def fit(word: str) -> dict[str, Any]:
        scale = fit_scale(Noun(subject, word, estimation, contrast), chosen, penalty)
        judged = Noun(subject, word, evaluation, contrast)
        biases = [judged.bias(*judged.scaled(chosen, factor)) for factor in (1.0, 0.0, scale)]
        return dict(zip(("scale", "unmodified", "removed", "fitted"), (scale, *biases), strict=True))

    found = [
        DebiasedNoun(word, **journal.once(word, partial(fit, word)))
        for word in watch(search.words, "nouns", len(search.words))
    ]
    return Debiased(one, other, chosen, search, found)


def fit_scale(noun: Noun, sense: int, penalty: float) -> float:
    """The factor c that makes bias + penalty · |1 − c| least, by Nelder–Mead from 1, within what a patch may scale
    by; a penalty of 1 is the paper's."""
    return least(lambda factor: noun.bias(*noun.scaled(sense, factor)), penalty, PatchLimits().norm_factor)


def least(bias: Callable[[float], float], penalty: float, bound: float | None = None) -> float:
    """The number c, at most ±`bound`, that makes bias(c) + penalty · |1 − c| least, by Nelder–Mead from 1."""
    from scipy.optimize import minimize

    def cost(at: Any) -> float:
        factor = float(at[0])
        return bias(factor) + penalty * abs(1 - factor)

    bounds = None if bound is None else [(-bound, bound)]
    return float(minimize(cost, [1.0], method="Nelder-Mead", bounds=bounds).x[0])
