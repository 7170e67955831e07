"""Take a bias out of words by scaling the one sense that carries it (paper, section 6); `balance` adds a vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import fmean
from typing import Any, Protocol

from backpack_lm.counted import counted
from backpack_lm.lab.contrast import Contrast, Noun, SenseSearch, find_sense
from backpack_lm.lab.elsewhere import MOST_MOVED, NEUTRAL, check_bound
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.professions import ESTIMATION, EVALUATION
from backpack_lm.lab.progress import ResumeJournal, Watch
from backpack_lm.patch import Edit, PatchLimits
from backpack_lm.reports.report import Report, Table

EditsOf = Callable[[float], tuple[Edit, ...]]
"""The edits of an amount: of a scale, or of how much of a vector is added."""

GONE = 0.5
"""The share of a noun's excess over 1 that has to be gone on prompts that nothing was fitted on."""
EVEN = 1.25
"""A ratio that needs no debiasing: five to four."""
REACH, GRID, NARROWINGS = 8.0, 64, 40
"""How far from what changes nothing the least cost is looked for at first, in how many steps, and how often the best
is narrowed."""
WIDEST = 1e4
NOUN_FIGURES = ("scale", "unmodified", "removed", "fitted", "moved", "neutral", "bounded")


class JudgedNoun(Protocol):
    """What of a noun is told: mean ratios before and after on the evaluation prompts, and how much else moved there."""

    @property
    def noun(self) -> str: ...
    @property
    def unmodified(self) -> float: ...
    @property
    def fitted(self) -> float: ...
    @property
    def moved(self) -> float: ...
    @property
    def gone(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class DebiasedNoun:
    """One noun: the scale fitted on the estimation prompts, and bias on the evaluation prompts.

    `moved` is how much of the probability the scale moves elsewhere, the mean over evaluation prompts, `neutral`
    that over NEUTRAL ones; `bounded` says whether what moves elsewhere held the fit back.
    """

    noun: str
    scale: float
    unmodified: float
    removed: float
    fitted: float
    moved: float = 0.0
    neutral: float = 0.0
    bounded: bool = False

    @property
    def gone(self) -> bool:
        """Whether enough of the bias is."""
        return enough_gone(self.unmodified, self.fitted)


@dataclass(frozen=True, slots=True)
class Debiased:
    """The scales of one sense, and what they do on prompts that they weren't fitted on.

    It is `reached` if there GONE of each noun's excess over 1 is gone and no more than `most_moved` of the
    probability moves elsewhere, and the sense can be told from noise.
    """

    one: str
    other: str
    sense: int
    search: SenseSearch
    nouns: list[DebiasedNoun]
    most_moved: float = MOST_MOVED

    @property
    def reached(self) -> bool:
        return not self.reason

    @property
    def reason(self) -> str:
        """Why it isn't reached; nothing if it is."""
        told = shortfalls(self.nouns, self.most_moved)
        if self.sense == self.search.guilty and not self.search.reached:
            told.append(f"the sense can't be told from noise ({self.search.reason})")
        return "; ".join(told)

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
        rows = tuple(
            (n.noun, n.scale, n.unmodified, n.removed, n.fitted, _as_percent(n.moved), _as_percent(n.neutral), _gone(n))
            for n in self.nouns
        )
        columns = (
            "noun",
            "scale",
            "unmodified",
            "removed",
            "fitted",
            "else moved",
            "after neutral prompts",
            f"{GONE:.0%} gone",
        )
        return Table("Every noun", columns, rows, digits=2)

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
            warning=f"Not reached: {self.reason}." if self.reason else "",
        )

    def _bounded(self) -> tuple[str, ...]:
        """Whose fit ended where a patch may scale no further, or where too much else moved."""
        bound, told = PatchLimits().norm_factor, []
        if nouns := [n.noun for n in self.nouns if abs(n.scale) > 0.999 * bound]:
            told.append(f"At ±{bound:g}, the most that a patch may scale by: {', '.join(nouns)}.")
        return (*told, *held_back([n.noun for n in self.nouns if n.bounded], self.most_moved))


def enough_gone(unmodified: float, fitted: float) -> bool:
    """Whether GONE of a ratio's excess over 1 is gone, or it is EVEN."""
    return fitted <= max(EVEN, 1 + (1 - GONE) * (unmodified - 1))


def shortfalls(nouns: Sequence[JudgedNoun], most_moved: float) -> list[str]:
    """Of which nouns too little of the bias is gone, and with which too much moves elsewhere, for people."""
    stay = [n for n in nouns if not n.gone]
    far = [n for n in nouns if n.moved > most_moved]
    told = []
    if stay:
        told.append(
            f"of {len(stay)} of {len(nouns)} nouns less than {GONE:.0%} of the excess over 1 is gone: "
            f"{', '.join(f'{n.noun} ({n.unmodified:.2f} → {n.fitted:.2f})' for n in stay)}"
        )
    if far:
        told.append(
            f"on the average more than {most_moved:.0%} of the probability moves elsewhere after prompts "
            f"that nothing was fitted on, with {', '.join(f'{n.noun} ({n.moved:.0%})' for n in far)}"
        )
    return told


def held_back(nouns: Sequence[str], most_moved: float) -> list[str]:
    """The note on nouns whose fit ended where too much else moved; none if there are none."""
    if not nouns:
        return []
    return [
        f"Held back, because {most_moved:.0%} of the probability moved elsewhere after a prompt that "
        f"was fitted on, or on the average after neutral ones: {', '.join(nouns)}."
    ]


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
    most_moved: float = MOST_MOVED,
) -> Debiased:
    """Fit one scale for each noun that is a single token, on the estimation prompts; `penalty` holds it near 1,
    and no scale moves more than `most_moved` of the probability elsewhere, after any of them or on the average
    after NEUTRAL ones (1 bounds nothing).

    The sense is found there, too, unless it is given, or a `search` of the same nouns and prompts that was made
    before. Raises ValueError if the model knows none of the nouns, has no such sense, or the penalty is no number
    or `most_moved` no share.
    """
    check_bound(most_moved)
    if not math.isfinite(penalty):
        raise ValueError(f"penalty {penalty}; write a number, 0 or more")
    if sense is not None and not 0 <= sense < subject.config.num_senses:
        raise ValueError(f"sense {sense}; this model's are 0 to {subject.config.num_senses - 1}")
    contrast = Contrast.of(subject, one, other)
    search = search or find_sense(subject, nouns, one, other, estimation, watch)
    chosen = search.guilty if sense is None else sense

    def fit(word: str) -> dict[str, Any]:
        asked, beside = (Noun(subject, word, some, contrast) for some in (estimation, NEUTRAL))
        low, high = scales_within(asked, beside, chosen, most_moved)
        scale = least(lambda factor: asked.bias(*asked.scaled(chosen, factor)), penalty, low, high)
        held = any(abs(end) < PatchLimits().norm_factor and abs(scale - end) < 1e-3 for end in (low, high))
        judged = Noun(subject, word, evaluation, contrast)
        biases = [judged.bias(*judged.scaled(chosen, factor)) for factor in (1.0, 0.0, scale)]
        edits = judged.scaled(chosen, scale)
        figures = (scale, *biases, fmean(judged.moved(*edits)), fmean(beside.moved(*edits)), held)
        return dict(zip(NOUN_FIGURES, figures, strict=True))

    found = [
        DebiasedNoun(word, **journal.once(word, partial(fit, word)))
        for word in watch(search.words, "nouns", len(search.words))
    ]
    return Debiased(one, other, chosen, search, found, most_moved)


def scales_within(noun: Noun, beside: Noun, sense: int, most_moved: float) -> tuple[float, float]:
    """The scales around 1 of a sense, as far as a patch may go, that move at most so much elsewhere."""
    bound = PatchLimits().norm_factor
    return amounts_within(noun, beside, partial(noun.scaled, sense), most_moved, 1.0, bound)


def amounts_within(
    noun: Noun, beside: Noun, edits: EditsOf, most_moved: float, rest: float, bound: float
) -> tuple[float, float]:
    """The amounts around `rest`, which changes nothing, from -`bound` to `bound`, whose edits move at most so much of
    the probability elsewhere, after any prompt of `noun` and on the average after those of `beside`, the same word in
    NEUTRAL ones."""
    if most_moved >= 1:
        return -bound, bound

    def too_far(amount: float) -> bool:
        made = edits(amount)
        return max(noun.moved(*made)) > most_moved or fmean(beside.moved(*made)) > most_moved

    def end(limit: float) -> float:
        inside, steps = rest, 16
        for n in range(1, steps + 1):
            outside = rest + n * (limit - rest) / steps
            if too_far(outside):
                break
            inside = outside
        else:
            return limit
        for _ in range(12):
            middle = (inside + outside) / 2
            if too_far(middle):
                outside = middle
            else:
                inside = middle
        return inside

    return end(-bound), end(bound)


def least(
    bias: Callable[[float], float],
    penalty: float,
    low: float = -math.inf,
    high: float = math.inf,
    rest: float = 1.0,
) -> float:
    """The c from `low` to `high` that makes bias(c) + penalty · |rest − c| least: the best of a grid around `rest`,
    made wider on a side without an end while the best is there, then golden sections beside it."""

    @cache
    def cost(factor: float) -> float:
        return bias(factor) + penalty * abs(rest - factor)

    left, right = max(low, rest - REACH), min(high, rest + REACH)
    while True:
        grid = sorted({rest, right, *(left + n * (right - left) / GRID for n in range(GRID))})
        at = min(range(len(grid)), key=lambda n: (cost(grid[n]), abs(rest - grid[n])))
        if grid[at] == left > max(low, -WIDEST):
            left = max(low, rest - 2 * (rest - left))
        elif grid[at] == right < min(high, WIDEST):
            right = min(high, rest + 2 * (right - rest))
        else:
            break
    one, two = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(NARROWINGS):
        inner, outer = two - golden * (two - one), one + golden * (two - one)
        if cost(inner) <= cost(outer):
            two = outer
        else:
            one = inner
    found = (one + two) / 2
    return found if cost(found) < cost(grid[at]) else grid[at]


def _as_percent(share: float) -> str:
    return f"{share:.0%}"


def _gone(noun: DebiasedNoun) -> str:
    return "yes" if noun.gone else "no"
