"""Make two words equally likely after others, by one vector that is added to all senses of each.

The scale of one sense only amplifies or turns what that sense says, on whatever it says. The vector here moves the two
words apart and all others least, so far more of a bias goes before much else moves. Words that are like the two, such
as “his” and “her” beside “he” and “she”, move with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from torch import Tensor

from backpack_lm.counted import counted
from backpack_lm.lab.contrast import Contrast, Noun, known_words, left_out, unknown_words
from backpack_lm.lab.debias import (
    GONE,
    amounts_within,
    enough_gone,
    held_back,
    least,
    shortfalls,
)
from backpack_lm.lab.elsewhere import MOST_MOVED, NEUTRAL, check_bound
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.professions import ESTIMATION, EVALUATION
from backpack_lm.lab.progress import ResumeJournal, Watch
from backpack_lm.lab.swap import quiet_direction
from backpack_lm.patch import AddEdit, Cell, Edit, PatchLimits, Vector
from backpack_lm.reports.report import Report, Table

FIGURES = ("amount", "unmodified", "fitted", "moved", "neutral", "bounded")


@dataclass(frozen=True, slots=True)
class BalancedNoun:
    """One noun: the amount fitted on the estimation prompts, and mean ratios on the evaluation prompts.

    With Σ_k α = 1 on the noun, the logit of `other` rises by `amount` over that of `one`. `moved`, `neutral` and
    `bounded` are as in `DebiasedNoun`.
    """

    noun: str
    amount: float
    unmodified: float
    fitted: float
    moved: float
    neutral: float
    bounded: bool

    @property
    def gone(self) -> bool:
        """Whether enough of the bias is."""
        return enough_gone(self.unmodified, self.fitted)


@dataclass(frozen=True, slots=True)
class Balanced:
    """The amounts of one vector, and what they do on prompts that they weren't fitted on. `unknown` are several tokens.

    It is `reached` if there GONE of each noun's excess over 1 is gone and no more than `most_moved` of the
    probability moves elsewhere.
    """

    one: str
    other: str
    nouns: list[BalancedNoun]
    unknown: list[str]
    most_moved: float = MOST_MOVED

    @property
    def reached(self) -> bool:
        return not self.reason

    @property
    def reason(self) -> str:
        """Why it isn't reached; nothing if it is."""
        return "; ".join(shortfalls(self.nouns, self.most_moved))

    def edits(self, subject: LabModel) -> list[Edit]:
        """The amounts as a patch: one edit a noun."""
        vector = quiet_direction(subject, subject.token(self.one), subject.token(self.other))
        return [edit for n in self.nouns for edit in _added(subject, n.noun, vector, n.amount)]

    def report(self) -> Report:
        before, after = (fmean(values) for values in zip(*((n.unmodified, n.fitted) for n in self.nouns), strict=True))
        gone = f": {(before - after) / (before - 1):.0%} of the excess over 1 is gone" if before > 1 else ""
        rows = tuple(
            (n.noun, n.amount, n.unmodified, n.fitted, f"{n.moved:.0%}", f"{n.neutral:.0%}", "yes" if n.gone else "no")
            for n in self.nouns
        )
        columns = ("noun", "amount", "unmodified", "fitted", "else moved", "after neutral prompts", f"{GONE:.0%} gone")
        return Report(
            f"“{self.one}” and “{self.other}” after {counted(len(self.nouns), 'noun')}",
            f"Mean ratio of the two on prompts that nothing was fitted on: {before:.2f} unmodified, {after:.2f} with "
            f"one vector a noun{gone}.",
            (Table("Every noun", columns, rows, digits=2),),
            notes=(
                *held_back([n.noun for n in self.nouns if n.bounded], self.most_moved),
                *left_out(self.unknown),
                f"An amount is how far the logit of “{self.other}” rises over that of “{self.one}” where a sense of "
                "the noun has weight 1; below 0, it falls.",
            ),
            warning=f"Not reached: {self.reason}." if self.reason else "",
        )


def balance(
    subject: LabModel,
    nouns: Sequence[str],
    watch: Watch,
    journal: ResumeJournal,
    one: str = "he",
    other: str = "she",
    estimation: Sequence[str] = ESTIMATION,
    evaluation: Sequence[str] = EVALUATION,
    most_moved: float = MOST_MOVED,
) -> Balanced:
    """Fit for each noun that is a single token how much of the vector from `one` to `other` its senses get, so that the
    mean ratio of the two after the estimation prompts is least, and no more than `most_moved` of the probability moves
    elsewhere, after any of them or on the average after NEUTRAL ones (1 bounds nothing).

    Raises ValueError if the model knows none of the nouns, the two words are one, or `most_moved` is no share.
    """
    check_bound(most_moved)
    contrast = Contrast.of(subject, one, other)
    known, vector = known_words(subject, nouns), quiet_direction(subject, contrast.one, contrast.other)
    bound = 0.999 * PatchLimits().norm_factor * min(subject.manifest.sense_rms) / float(vector.norm())

    def fit(word: str) -> dict[str, Any]:
        asked, beside, judged = (Noun(subject, word, some, contrast) for some in (estimation, NEUTRAL, evaluation))
        made = partial(_added, subject, word, vector)
        low, high = amounts_within(asked, beside, made, most_moved, 0.0, bound)
        amount = least(lambda some: asked.bias(*made(some)), 0.0, low, high, rest=0.0)
        held = any(abs(end) < bound and abs(amount - end) < 1e-3 for end in (low, high))
        edits = made(amount)
        moved, aside = fmean(judged.moved(*edits)), fmean(beside.moved(*edits))
        return dict(zip(FIGURES, (amount, judged.bias(), judged.bias(*edits), moved, aside, held), strict=True))

    found = [BalancedNoun(word, **journal.once(word, partial(fit, word))) for word in watch(known, "nouns", len(known))]
    return Balanced(one, other, found, unknown_words(subject, nouns), most_moved)


def _added(subject: LabModel, word: str, vector: Tensor, amount: float) -> tuple[Edit, ...]:
    """The edit that adds so much of the vector to all senses of a word; none for 0."""
    if not amount:
        return ()
    cells = tuple(Cell(subject.token(word), sense) for sense in range(subject.config.num_senses))
    return (AddEdit(cells, Vector.of((amount * vector).tolist())),)
