"""Change what a word says: of one word it said before, it says now of another (paper, section 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean

import torch
from torch import Tensor

from backpack_lm.lab.elsewhere import MOST_MOVED, check_bound, moved_elsewhere, neutral
from backpack_lm.lab.lab_model import LabModel, Prompts
from backpack_lm.overlay import SenseTable
from backpack_lm.patch import AddEdit, Cell, Edit, PatchLimits, SwapEdit, Vector
from backpack_lm.reports.report import Report, Table

STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""What a fit tries."""
FITTED = 0.8
"""The new word's share of the two that a fit asks for after every prompt."""
RIDGE = 1e-3  # of the mean square of an embedding's numbers: directions that no word uses stay small


@dataclass(frozen=True, slots=True)
class Swapped:
    """One prompt: probabilities of the two words before and after, and how much else moved.

    `moved` is the total variation distance over all the other tokens: half the sum of what each gained or lost.
    """

    prompt: str
    old_before: float
    old_after: float
    new_before: float
    new_after: float
    moved: float

    @property
    def held(self) -> bool:
        """Whether the model held the old fact to begin with."""
        return self.old_before > self.new_before

    @property
    def turned(self) -> bool:
        """Whether it holds the new one now."""
        return self.new_after > self.old_after

    @property
    def share_before(self) -> float:
        """The old word's share of the two."""
        return self.old_before / (self.old_before + self.new_before)

    @property
    def share_after(self) -> float:
        return self.old_after / (self.old_after + self.new_after)


@dataclass(frozen=True, slots=True)
class SwappedFact:
    """A swap of `old` for `new` in senses of `word`, on each prompt that names the word.

    It is `reached` if `new` has a share of `wanted` of the two after every prompt and no more than `most_moved` of
    the probability moved elsewhere, after any of them and on the average after NEUTRAL ones (`neutral`). `stopped`
    says what ended a fit that didn't reach that.
    """

    word: str
    old: str
    new: str
    senses: list[int]
    strength: float
    prompts: list[Swapped]
    wanted: float = 0.5
    most_moved: float = MOST_MOVED
    stopped: str = ""
    neutral: float = 0.0

    @property
    def missed(self) -> list[Swapped]:
        """The prompts after which the new word has less than was wanted."""
        return [p for p in self.prompts if p.share_after > 1 - self.wanted]

    @property
    def least(self) -> float:
        """The new word's share of the two after the prompt where it has least."""
        return 1 - max(p.share_after for p in self.prompts)

    @property
    def farthest(self) -> Swapped:
        """The prompt after which most moved elsewhere."""
        return max(self.prompts, key=lambda p: p.moved)

    @property
    def bounded(self) -> bool:
        """Whether what moved elsewhere is within what may."""
        return max(self.farthest.moved, self.neutral) <= self.most_moved

    @property
    def moved_too_far(self) -> str:
        """Where most moved elsewhere, for people."""
        far = self.farthest
        if far.moved > self.most_moved or far.moved > self.neutral:
            return f"{far.moved:.0%} of the probability moved elsewhere after “{far.prompt}”"
        return f"{self.neutral:.0%} of the probability moved elsewhere after neutral prompts about the word"

    @property
    def reached(self) -> bool:
        return self.bounded and not self.missed

    @property
    def reason(self) -> str:
        """Why it isn't reached; nothing if it is."""
        told = []
        if self.missed:
            one = max(self.missed, key=lambda p: p.share_after)
            told.append(
                f"after {len(self.missed)} of {len(self.prompts)} prompts “{self.new}” has less than "
                f"{self.wanted:.0%} of the two, after “{one.prompt}” {1 - one.share_after:.0%}"
            )
        if not self.bounded:
            told.append(f"{self.moved_too_far}, where at most {self.most_moved:.0%} may")
        return "; ".join([*told, *([self.stopped] if self.stopped and told else [])])

    def mean(self, name: str) -> float:
        return fmean(getattr(prompt, name) for prompt in self.prompts)

    def edits(self, subject: LabModel) -> list[Edit]:
        return swap_edits(subject, self.word, self.old, self.new, self.senses, self.strength)

    def report(self) -> Report:
        columns = ("prompt", f"{self.old}, before", "after", f"{self.new}, before", "after", "else moved")
        rows = tuple(
            (p.prompt, *(f"{v:.2%}" for v in (p.old_before, p.old_after, p.new_before, p.new_after, p.moved)))
            for p in self.prompts
        )
        return Report(
            f"“{self.word}” {'says' if self.reached else 'shall say'} “{self.new}” where it said “{self.old}”",
            f"Of the two, “{self.old}” had {self.mean('share_before'):.0%} before and has "
            f"{self.mean('share_after'):.0%} after, at strength {self.strength:g}; {self.mean('moved'):.2%} of "
            f"the probability moved elsewhere, after neutral prompts about the word {self.neutral:.2%}.",
            (Table("Probability of the next token", columns, rows),),
            notes=(
                f"Reached, if after every prompt “{self.new}” has {self.wanted:.0%} of the two and at most "
                f"{self.most_moved:.0%} of the probability moved elsewhere, and no more on the average after "
                f"neutral prompts ({', '.join(f'“{prompt}”' for prompt in neutral(self.word))}): the total "
                "variation distance over all other tokens. Other prompts may move more; `backpack lab judge` "
                "tries them, and text.",
            ),
            warning="" if self.reached else f"Not reached: {self.reason}.",
        )


def swap_edits(
    subject: LabModel, word: str, old: str, new: str, senses: Sequence[int], strength: float = 1.0
) -> list[Edit]:
    """A swap in these senses. Strength 1 is the paper's: what the word itself says of `old`, it says of `new`.

    What the rest of a prompt says of `old` stays, so a fact may take more: one `AddEdit` a sense moves the difference
    of the two logits `strength` − 1 times as far again, as far as a patch may, in the direction that moves all
    the other logits least.

    Raises WordError if a word is not one token, ValueError for a strength below 1, PatchError for a sense that
    there isn't.
    """
    if not 1 <= strength < math.inf:
        raise ValueError(f"strength {strength:g}; 1 is a plain swap, more moves the two logits further")
    token, ids = subject.token(word), (subject.token(old), subject.token(new))
    edits: list[Edit] = [SwapEdit(tuple(Cell(token, sense) for sense in senses), *ids)]
    if strength > 1:
        subject.overlay(*edits)  # a sense that there isn't is refused
        r, a = (subject.model.embedding[i] for i in ids)
        turn = a * (r @ r) / (a @ a) - r
        quiet = (turn @ (a - r)) * quiet_direction(subject, *ids)
        for sense in senses:
            delta = (strength - 1) * (subject.table.rows[token, sense] @ r) / (r @ r) * quiet
            bound = 0.999 * PatchLimits().norm_factor * subject.manifest.sense_rms[sense]
            delta *= min(1.0, bound / max(float(delta.norm()), 1e-9))
            if bool(delta.any()):
                edits.append(AddEdit((Cell(token, sense),), Vector.of(delta.tolist())))
    return edits


def quiet_direction(subject: LabModel, old: int, new: int) -> Tensor:
    """q [d]: added to o, it raises the logit of `new` by 1 over that of `old`, and moves all others least."""
    apart = subject.model.embedding[new] - subject.model.embedding[old]
    quiet = _quietest(subject.table) @ apart
    found: Tensor = quiet / (quiet @ apart)
    return found


@lru_cache(maxsize=1)
def _quietest(table: SenseTable) -> Tensor:
    """(EᵀE/V + ε)⁻¹ [d, d]: applied to a direction g, it gives the δ that moves logits least on the average, E·δ
    squared, of those that move g·δ as much."""
    head = table.embedding[~table.unscored]
    moments = head.t() @ head / len(head)
    ridge = RIDGE * moments.trace() / len(moments) * torch.eye(len(moments))
    inverse: Tensor = torch.linalg.inv(moments + ridge)
    return inverse


@dataclass(frozen=True, eq=False, slots=True)
class _PreparedSwap:
    """What every strength of a swap shares: the ids of `old` and `new`, its prompts (`asked`), NEUTRAL ones about
    the word (`beside`), and the unedited probabilities [P, tokens] after each: `before` and `plain`."""

    subject: LabModel
    word: str
    old: str
    new: str
    prompts: Sequence[str]
    senses: list[int]
    ids: tuple[int, int]
    asked: Prompts
    beside: Prompts
    before: Tensor
    plain: Tensor

    @classmethod
    def of(
        cls, subject: LabModel, word: str, old: str, new: str, prompts: Sequence[str], senses: Sequence[int]
    ) -> _PreparedSwap:
        """Raises WordError if a word is not one token, ValueError for a prompt without the word or no prompts."""
        ids = subject.token(old), subject.token(new)
        for prompt in prompts:
            subject.check_names(prompt, word)
        chosen = list(senses) or list(range(subject.config.num_senses))
        asked, beside, unedited = Prompts(subject, prompts), Prompts(subject, neutral(word)), subject.overlay()
        before, plain = (some.log_probabilities(unedited).exp() for some in (asked, beside))
        return cls(subject, word, old, new, prompts, chosen, ids, asked, beside, before, plain)

    def measure(self, strength: float, wanted: float, most_moved: float) -> SwappedFact:
        """Make the swap at a strength and measure it. Raises as `swap_fact`."""
        subject, ids = self.subject, self.ids
        overlay = subject.overlay(*swap_edits(subject, self.word, self.old, self.new, self.senses, strength))
        after, edited = (some.log_probabilities(overlay).exp() for some in (self.asked, self.beside))
        others = moved_elsewhere(self.before, after, ids).tolist()
        aside = float(moved_elsewhere(self.plain, edited, ids).mean())
        found = []
        for prompt, b, a, moved in zip(self.prompts, self.before.tolist(), after.tolist(), others, strict=True):
            found.append(Swapped(prompt, b[ids[0]], a[ids[0]], b[ids[1]], a[ids[1]], moved))
        bound = check_bound(most_moved)
        return SwappedFact(self.word, self.old, self.new, self.senses, strength, found, wanted, bound, neutral=aside)


def swap_fact(
    subject: LabModel,
    word: str,
    old: str,
    new: str,
    prompts: Sequence[str],
    senses: Sequence[int] = (),
    strength: float = 1.0,
    wanted: float = 0.5,
    most_moved: float = MOST_MOVED,
) -> SwappedFact:
    """Make a swap in the given senses, or all, and measure it on prompts that name the word.

    Raises as `swap_edits`, and ValueError for a prompt without the word, as nothing would change, or for a
    `most_moved` that is no share.
    """
    return _PreparedSwap.of(subject, word, old, new, prompts, senses).measure(strength, wanted, most_moved)


def fit_swap(
    subject: LabModel,
    word: str,
    old: str,
    new: str,
    prompts: Sequence[str],
    senses: Sequence[int] = (),
    most_moved: float = MOST_MOVED,
) -> SwappedFact:
    """The swap with the least of STRENGTHS that gives `new` a share of FITTED of the two after every prompt, so
    that other prompts are turned as well, and moves at most `most_moved` of the probability elsewhere after any.

    If none does: of those that move no more than that, the one that leaves `new` the greatest share where it has
    least; the plain swap if that one moves more already. Raises as `swap_fact`.
    """
    tried: list[SwappedFact] = []
    prepared = _PreparedSwap.of(subject, word, old, new, prompts, senses)
    stopped = f"{STRENGTHS[-1]:g} is the greatest strength that is tried"
    for strength in STRENGTHS:
        found = prepared.measure(strength, FITTED, most_moved)
        if found.reached:
            return found
        if not found.bounded:
            stopped = f"at strength {strength:g} {found.moved_too_far}" if tried else ""
            tried = tried or [found]
            break
        tried.append(found)
    return replace(max(tried, key=lambda one: one.least), stopped=stopped)
