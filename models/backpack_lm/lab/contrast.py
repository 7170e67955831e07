"""Which sense of a group of words carries a contrast between two others, such as “he” and “she”."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from backpack_lm.counted import counted
from backpack_lm.lab.lab_model import LabModel, Prompts
from backpack_lm.lab.progress import Watch
from backpack_lm.overlay import Overlay
from backpack_lm.patch import Cell, Edit, ScaleEdit
from backpack_lm.reports.report import Report, Table


@dataclass(frozen=True, slots=True)
class Contrast:
    """Two words that prompts should not tell apart, by their ids in one model."""

    one: int
    other: int

    @classmethod
    def of(cls, subject: LabModel, one: str, other: str) -> Contrast:
        """Raises WordError if a word is not one token, ValueError if they are the same."""
        found = cls(subject.token(one), subject.token(other))
        if found.one == found.other:
            raise ValueError(f"{one!r} and {other!r} are the same token; a contrast needs two")
        return found


class Noun:
    """A word in the prompts that it is judged by: `{}` in the templates stands for it.

    Raises ValueError for a template without `{}`, or where the word isn't the token whose senses are meant.
    """

    def __init__(self, subject: LabModel, word: str, templates: Sequence[str], contrast: Contrast) -> None:
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"prompt {template!r} has no {{}} to put {word!r} in")
        self.subject, self.word, self.contrast = subject, word, contrast
        self.token = subject.token(word)
        prompts = [template.replace("{}", word) for template in templates]
        for prompt in prompts:
            subject.check_names(prompt, word)
        self.prompts = Prompts(subject, prompts)

    def bias(self, *edits: Edit) -> float:
        """Mean over prompts of max(p(one)/p(other), p(other)/p(one)) under these edits: 1 is none."""
        return bias_of(self.prompts, self.contrast, self.subject.overlay(*edits))

    def scaled(self, sense: int, factor: float) -> tuple[Edit, ...]:
        """The edit that scales one sense of the word; none for factor 1."""
        return () if factor == 1.0 else (ScaleEdit((Cell(self.token, sense),), factor),)


def bias_of(prompts: Prompts, contrast: Contrast, overlay: Overlay) -> float:
    """p(one)/p(other) is the exponential of the difference of their logits."""
    logits = prompts.logits(overlay, (contrast.one, contrast.other)).double()
    return float((logits[:, 0] - logits[:, 1]).abs().exp().mean())


@dataclass(frozen=True, slots=True)
class SenseEffect:
    """One sense, averaged over the words: bias with it removed, and what it says of one word against the other,
    signed and not: (E[one] − E[other])·C(word)_sense."""

    sense: int
    bias_removed: float
    contrast: float
    strength: float


@dataclass(frozen=True, slots=True)
class SenseSearch:
    """What each sense carries. `words` are those that are one token, `unknown` the others."""

    one: str
    other: str
    words: list[str]
    unknown: list[str]
    bias: float
    senses: list[SenseEffect]

    @property
    def guilty(self) -> int:
        """The sense without which bias is lowest."""
        return min(self.senses, key=lambda effect: effect.bias_removed).sense

    def report(self) -> Report:
        order = sorted(self.senses, key=lambda effect: effect.bias_removed)
        rows = tuple((e.sense, e.bias_removed, e.contrast, e.strength) for e in order)
        columns = ("sense", "bias without it", f"speaks for “{self.one}”", "strength")
        return Report(
            f"Which sense tells “{self.one}” from “{self.other}”",
            f"Without sense {self.guilty}, the mean ratio of the two over {counted(len(self.words), 'word')} "
            f"falls from {self.bias:.2f} to {order[0].bias_removed:.2f}; 1 is no difference.",
            (Table("Senses, the most telling first", columns, rows),),
            notes=_unknown(self.unknown),
        )


def find_sense(
    subject: LabModel, words: Sequence[str], one: str, other: str, templates: Sequence[str], watch: Watch
) -> SenseSearch:
    """Try every sense: what it says of the contrast, and what is left of the bias when it is removed.

    A word that is named twice counts once. Raises ValueError if none of the words is a single token.
    """
    contrast = Contrast.of(subject, one, other)
    first: dict[int, str] = {}  # word of each token
    for word in subject.known(words):
        first.setdefault(subject.token(word), word)
    known = list(first.values())
    if not known:
        raise ValueError(f"none of {', '.join(words)} is one token of this model; senses belong to single tokens")
    nouns = [Noun(subject, word, templates, contrast) for word in known]
    direction = subject.model.embedding[contrast.one] - subject.model.embedding[contrast.other]
    says = subject.table.rows[torch.tensor([noun.token for noun in nouns])] @ direction  # [words, k]
    effects = []
    for sense in watch(range(subject.config.num_senses), "senses", subject.config.num_senses):
        left = [noun.bias(*noun.scaled(sense, 0.0)) for noun in nouns]
        effects.append(
            SenseEffect(sense, fmean(left), float(says[:, sense].mean()), float(says[:, sense].abs().mean()))
        )
    unknown = [word for word in words if not subject.known([word])]
    return SenseSearch(one, other, known, unknown, fmean(noun.bias() for noun in nouns), effects)


def _unknown(words: Sequence[str]) -> tuple[str, ...]:
    return (f"Left out, because they are several tokens in this model: {', '.join(words)}.",) if words else ()
