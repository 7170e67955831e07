"""A topic as a patch, and what it does to prompts before any text is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from backpack_lm.lab.elsewhere import moved_elsewhere
from backpack_lm.lab.lab_model import LabModel, Prompts
from backpack_lm.lab.topic_vector import FrequentWords, direction, topic_vector_edits
from backpack_lm.patch import Edit, TopicEdit
from backpack_lm.reports.report import Report, Table
from backpack_lm.tokenizer import WordPolicy

STRENGTHS = (1, 2, 3)
LED = 2.0
"""How many times the odds of a topic's words grow at least after a prompt that is led to it."""


class By(StrEnum):
    """How text is steered to a topic: by a topic vector in frequent words, or by the paper's multipliers."""

    LEAN = "lean"
    MULTIPLIERS = "multipliers"


@dataclass(frozen=True, slots=True)
class TopicChosen:
    """A topic: its words' tokens, its edits by strength, the words' mass after prompts by strength.

    `pieces` are the first tokens of those words that have several. `speakers` says where it comes from: the cells
    with the highest scores, or the words that gain most from the topic vector. `moved` is the total variation
    distance over all other tokens, as `mass`.
    """

    words: list[str]
    pieces: dict[str, str]
    tokens: list[int]
    strength: int
    by: By
    by_strength: dict[int, list[Edit]]
    speakers: Table
    mass: dict[str, list[float]]
    moved: dict[str, list[float]] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the odds of the topic's words grow LED times after every prompt; None if there is none."""
        return not self.reason if self.mass else None

    @property
    def reason(self) -> str:
        """Why it isn't reached; nothing if it is."""
        at, stay = self.strength, []
        for prompt, masses in self.mass.items():
            before, after = (min(max(p, 1e-12), 1 - 1e-12) for p in (masses[0], masses[at]))
            if after / (1 - after) < LED * before / (1 - before):
                stay.append(f"“{prompt}” ({masses[0]:.2%} → {masses[at]:.2%})")
        if not stay:
            return ""
        other = " or --by lean, whose words needn't be in the text" if self.by is By.MULTIPLIERS else ""
        return (
            f"at strength {at} the odds of the words don't grow {LED:g} times after {', '.join(stay)}; try "
            f"another strength{other}"
        )

    def edits(self) -> list[Edit]:
        return self.by_strength[self.strength]

    def report(self) -> Report:
        rows, others = (
            tuple((prompt, *(f"{p:.1%}" for p in shares)) for prompt, shares in some.items())
            for some in (self.mass, self.moved)
        )
        columns = ("prompt", *map(str, (0, *STRENGTHS)))
        return Report(
            f"Topic of {', '.join(self.words)}, strength {self.strength}, by {self.by}",
            "Probability that the next token is one of the words, unsteered and by strength."
            if rows
            else "No prompt was given, so what it does to the next token isn't known.",
            (
                *([Table("After prompts", columns, rows)] if rows else []),
                *([Table("What else moves", columns, others)] if others else []),
                self.speakers,
            ),
            warning=f"Not reached: {self.reason}." if self.reason else "",
            notes=tuple(
                f"“{word}” is several tokens in this model; it steers towards the first alone, “{piece}”, and "
                "whatever else begins with it. Leave it out if that isn't meant."
                for word, piece in self.pieces.items()
            ),
        )


def choose_topic(
    subject: LabModel, words: Sequence[str], strength: int, prompts: Sequence[str] = (), by: By = By.LEAN
) -> TopicChosen:
    """The edits that lead to these words (the first token of each), with what they would do.

    Raises PatchError for a strength that there isn't, WordError for an empty word, ValueError as `topic_vector_edits`.
    """
    tokens = list(dict.fromkeys(subject.tokenizer.word_ids(word, WordPolicy.FIRST)[0] for word in words))
    by_strength: dict[int, list[Edit]] = {}
    frequent = FrequentWords.of(subject) if by is By.LEAN else None
    for step in sorted({*STRENGTHS, strength}):
        topic: list[Edit] = [TopicEdit(tuple(tokens), step)]
        by_strength[step] = topic if frequent is None else topic_vector_edits(subject, tokens, step, frequent)
    # Refused here rather than by the server: the strength that is asked for first.
    compiled = {step: subject.overlay(*by_strength[step]) for step in dict.fromkeys((strength, *STRENGTHS))}
    mass: dict[str, list[float]] = {}
    moved: dict[str, list[float]] = {}
    overlays = [subject.overlay(), *(compiled[step] for step in STRENGTHS)]
    for prompt in prompts:
        asked = Prompts(subject, [prompt])
        found = [asked.log_probabilities(o).exp() for o in overlays]
        mass[prompt] = [float(p[0, tokens].sum()) for p in found]
        moved[prompt] = [float(moved_elsewhere(found[0], p, tokens)) for p in found]
    several = [word for word in words if len(subject.word_ids(word)) > 1]
    pieces = {word: subject.tokenizer.piece(subject.word_ids(word)[0]) for word in several}
    speakers = _edited_cells(subject, tokens) if frequent is None else _gains(subject, tokens)
    return TopicChosen(list(words), pieces, tokens, strength, by, by_strength, speakers, mass, moved)


def _edited_cells(subject: LabModel, tokens: Sequence[int]) -> Table:
    scores = subject.table.topic_scores(tuple(tokens))
    best = scores.flatten().topk(12)
    cells = []
    for at, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        token, sense = divmod(at, scores.shape[1])
        cells.append((subject.shown(token), sense, score))
    return Table("Cells that speak for it most", ("word", "sense", "score"), tuple(cells))


def _gains(subject: LabModel, tokens: Sequence[int]) -> Table:
    gains = subject.head @ direction(subject, tokens)
    best = (gains - gains.mean()).topk(20)
    rows = tuple(
        (subject.shown(token), gain) for token, gain in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    return Table("Words that gain most, as a share of what the topic's words gain", ("word", "gain"), rows, digits=2)
