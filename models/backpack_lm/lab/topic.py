"""A topic as a patch, and what it does to prompts before any text is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backpack_lm.lab.subject import Prompts, Subject
from backpack_lm.patch import Topic
from backpack_lm.reports.report import Report, Table
from backpack_lm.tokenizer import WordPolicy


@dataclass(frozen=True, slots=True)
class TopicChosen:
    """A topic: its words' tokens, the cells that speak for it most, the words' mass after prompts by strength.

    `pieces` are the first tokens of those words that have several.
    """

    words: list[str]
    pieces: dict[str, str]
    tokens: list[int]
    strength: int
    cells: list[tuple[str, int, float]]
    mass: dict[str, list[float]]

    def edit(self) -> Topic:
        return Topic(tuple(self.tokens), self.strength)

    def report(self) -> Report:
        rows = tuple((prompt, *(f"{p:.1%}" for p in masses)) for prompt, masses in self.mass.items())
        return Report(
            f"Topic of {', '.join(self.words)}, strength {self.strength}",
            "Probability that the next token is one of the words, unsteered and by strength.",
            (
                *([Table("After prompts", ("prompt", "0", "1", "2", "3"), rows)] if rows else []),
                Table("Cells that speak for it most", ("word", "sense", "score"), tuple(self.cells)),
            ),
            notes=tuple(
                f"“{word}” is several tokens in this model; it steers towards the first alone, “{piece}”, and "
                "whatever else begins with it. Leave it out if that isn't meant."
                for word, piece in self.pieces.items()
            ),
        )


def choose_topic(
    subject: Subject, words: Sequence[str], strength: int, prompts: Sequence[str] = ()
) -> TopicChosen:
    """The topic edit of these words (the first token of each), with what it would do.

    Raises PatchError for a strength that there isn't, WordError for an empty word.
    """
    tokens = list(dict.fromkeys(subject.tokenizer.word_ids(word, WordPolicy.FIRST)[0] for word in words))
    subject.overlay(Topic(tuple(tokens), strength))  # refused here rather than by the server
    scores = subject.table.topic_scores(tuple(tokens))
    best = scores.flatten().topk(12)
    cells = []
    for at, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        token, sense = divmod(at, scores.shape[1])
        cells.append((subject.tokenizer.piece(token).strip(), sense, score))
    mass: dict[str, list[float]] = {}
    overlays = [subject.overlay(), *(subject.overlay(Topic(tuple(tokens), s)) for s in (1, 2, 3))]
    for prompt in prompts:
        asked = Prompts(subject, [prompt])
        mass[prompt] = [float(asked.log_probabilities(o)[0].exp()[tokens].sum()) for o in overlays]
    several = [word for word in words if len(subject.word_ids(word)) > 1]
    pieces = {word: subject.tokenizer.piece(subject.word_ids(word)[0]) for word in several}
    return TopicChosen(list(words), pieces, tokens, strength, cells, mass)
