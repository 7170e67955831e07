"""Which sense of a group of words carries a contrast between two others, such as “he” and “she”."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import torch
from torch import Tensor

from backpack_lm.counted import counted
from backpack_lm.lab.elsewhere import moved_elsewhere
from backpack_lm.lab.lab_model import LabModel, Prompts
from backpack_lm.lab.progress import Watch
from backpack_lm.overlay import Overlay
from backpack_lm.patch import Cell, Edit, ScaleEdit
from backpack_lm.reports.report import Report, Table

CHANCE = 0.05
"""How often one of the senses may fall by more than what is called noise, if none of them carries anything."""
LEAST_FALL = 0.05
"""The share of the excess over 1 that removing a sense takes at least, if the sense is said to carry it."""


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
        self._unedited: Tensor | None = None  # probabilities [P, tokens], once they are asked for

    def bias(self, *edits: Edit) -> float:
        """Mean over prompts of max(p(one)/p(other), p(other)/p(one)) under these edits: 1 is none."""
        return fmean(self.ratios(*edits))

    def ratios(self, *edits: Edit) -> list[float]:
        """That of each prompt."""
        ratios: list[float] = ratios_of(self.prompts, self.contrast, self.subject.overlay(*edits)).tolist()
        return ratios

    def moved(self, *edits: Edit) -> list[float]:
        """How much of the probability moves among other tokens than the two, after each prompt."""
        if self._unedited is None:
            self._unedited = self.prompts.log_probabilities(self.subject.overlay()).exp()
        after = self.prompts.log_probabilities(self.subject.overlay(*edits)).exp()
        aimed = self.contrast.one, self.contrast.other
        moved: list[float] = moved_elsewhere(self._unedited, after, aimed).tolist()
        return moved

    def scaled(self, sense: int, factor: float) -> tuple[Edit, ...]:
        """The edit that scales one sense of the word; none for factor 1."""
        return () if factor == 1.0 else (ScaleEdit((Cell(self.token, sense),), factor),)


def ratios_of(prompts: Prompts, contrast: Contrast, overlay: Overlay) -> Tensor:
    """max(p(one)/p(other), p(other)/p(one)) after each prompt [P]: exp of how far their logits differ."""
    logits = prompts.logits(overlay, (contrast.one, contrast.other)).double()
    return (logits[:, 0] - logits[:, 1]).abs().exp()


@dataclass(frozen=True, slots=True)
class SenseEffect:
    """One sense, averaged over the words: bias with it removed, and what it says of one word against the other,
    signed and not: (E[one] − E[other])·C(word)_sense.

    `error` is the standard error of the fall that its removal brings, over all pairs of a word and a prompt; None
    if it isn't known, as of one pair.
    """

    sense: int
    bias_removed: float
    contrast: float
    strength: float
    error: float | None = None


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
        return self._most_telling.sense

    @property
    def _most_telling(self) -> SenseEffect:
        return min(self.senses, key=lambda effect: effect.bias_removed)

    @property
    def errors(self) -> float:
        """How many standard errors are noise, as the best of so many senses is looked at."""
        return NormalDist().inv_cdf(1 - CHANCE / 2 / len(self.senses))

    @property
    def reached(self) -> bool:
        """Whether the guilty sense can be told from noise."""
        return not self.reason

    @property
    def reason(self) -> str:
        """Why it can't be; nothing if it can."""
        effect = self._most_telling
        fall, least = self.bias - effect.bias_removed, LEAST_FALL * (self.bias - 1)
        if effect.error is None:
            return "of one word and one prompt, noise can't be told; give more"
        noise = self.errors * effect.error
        if fall > max(noise, least):
            return ""
        bound = (
            f"noise is {noise:.3f}, {self.errors:.1f} standard errors over the pairs of a word and a prompt"
            if noise >= least
            else f"that is less than {LEAST_FALL:.0%} of its excess over 1, {least:.3f}"
        )
        return (
            f"without sense {self.guilty} the ratio falls by {fall:.3f}, and {bound}; the prompts may be about "
            "something else than the words"
        )

    def report(self) -> Report:
        order = sorted(self.senses, key=lambda effect: effect.bias_removed)
        rows = tuple(
            (e.sense, e.bias_removed, None if e.error is None else self.errors * e.error, e.contrast, e.strength)
            for e in order
        )
        columns = ("sense", "bias without it", "± noise", f"speaks for “{self.one}”", "strength")
        return Report(
            f"Which sense tells “{self.one}” from “{self.other}”",
            f"Without sense {self.guilty}, the mean ratio of the two over {counted(len(self.words), 'word')} "
            f"falls from {self.bias:.2f} to {order[0].bias_removed:.2f}; 1 is no difference.",
            (Table("Senses, the most telling first", columns, rows),),
            notes=(*left_out(self.unknown), *self._noise_note()),
            warning="" if self.reached else f"Within noise: {self.reason}.",
        )

    def _noise_note(self) -> tuple[str, ...]:
        if all(effect.error is None for effect in self.senses):
            return ()
        return (
            f"Noise is {self.errors:.1f} standard errors of the fall over all pairs of a word and a prompt: by "
            f"chance, one of {len(self.senses)} senses falls by more in {CHANCE:.0%} of such searches. A sense is "
            f"told from it if the ratio falls by more, and by more than {LEAST_FALL:.0%} of its excess over 1.",
        )


def known_words(subject: LabModel, words: Sequence[str]) -> list[str]:
    """Those that are one token, each token once. Raises ValueError if none is."""
    first: dict[int, str] = {}  # word of each token
    for word in subject.single_token_words(words):
        first.setdefault(subject.token(word), word)
    if not first:
        raise ValueError(f"none of {', '.join(words)} is one token of this model; senses belong to single tokens")
    return list(first.values())


def find_sense(
    subject: LabModel, words: Sequence[str], one: str, other: str, templates: Sequence[str], watch: Watch
) -> SenseSearch:
    """Try every sense: what it says of the contrast, and what is left of the bias when it is removed.

    A word that is named twice counts once. Raises ValueError if none of the words is a single token.
    """
    contrast, known = Contrast.of(subject, one, other), known_words(subject, words)
    nouns = [Noun(subject, word, templates, contrast) for word in known]
    direction = subject.model.embedding[contrast.one] - subject.model.embedding[contrast.other]
    says = subject.table.rows[torch.tensor([noun.token for noun in nouns])] @ direction  # [words, k]
    effects, ratios = [], [ratio for noun in nouns for ratio in noun.ratios()]
    for sense in watch(range(subject.config.num_senses), "senses", subject.config.num_senses):
        left = [ratio for noun in nouns for ratio in noun.ratios(*noun.scaled(sense, 0.0))]
        falls = [one - other for one, other in zip(ratios, left, strict=True)]
        error = stdev(falls) / math.sqrt(len(falls)) if len(falls) > 1 else None
        said = says[:, sense]
        effects.append(SenseEffect(sense, fmean(left), float(said.mean()), float(said.abs().mean()), error))
    return SenseSearch(one, other, known, unknown_words(subject, words), fmean(ratios), effects)


def unknown_words(subject: LabModel, words: Sequence[str]) -> list[str]:
    """Those that are several tokens."""
    return [word for word in words if not subject.single_token_words([word])]


def left_out(words: Sequence[str]) -> tuple[str, ...]:
    """The note on words that are several tokens; none if there are none."""
    return (f"Left out, because they are several tokens in this model: {', '.join(words)}.",) if words else ()
