"""What a revision would do, before anyone activates it: to ordinary text, to prompts, and to the neighbours of the
words that it edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backpack_lm.counted import counted
from backpack_lm.lab.elsewhere import moved_elsewhere
from backpack_lm.lab.examples import CanonicalExample
from backpack_lm.lab.lab_model import LabModel, Prompts
from backpack_lm.ordinary_text import OrdinaryText, SideEffects, rows_of
from backpack_lm.overlay import Overlay
from backpack_lm.patch import Edit, TopicEdit
from backpack_lm.reports.report import Report, Table

NEIGHBOURS = 3
MOVED_WORDS = 8  # that the text tells of
ROW_TOKENS = 512  # of text: sense weights grow with the square
MOST_WORDS = 12  # edited words whose neighbours are looked at, of those that prompts hold


@dataclass(frozen=True, slots=True)
class JudgedPrompt:
    """A prompt: p of its target, if it has one, the likeliest next token, and the total variation distance."""

    prompt: str
    target: str
    before: float | None
    after: float | None
    top_before: str
    top_after: str
    moved: float


@dataclass(frozen=True, slots=True)
class JudgedNeighbour:
    """A word near in sense to an edited one: how far prompts move that name it instead, and the change of its own
    log p after the prompts as they are."""

    word: str
    neighbour: str
    similarity: float
    moved: float
    log_probability: float


@dataclass(frozen=True, slots=True)
class PatchJudgement:
    edits: int
    cells: int
    topics: int
    biased: int
    text: SideEffects | None
    moved_words: list[str]
    prompts: list[JudgedPrompt]
    neighbours: list[JudgedNeighbour]

    def report(self) -> Report:
        prompts = tuple(
            (
                p.prompt,
                p.target or None,
                _percent(p.before),
                _percent(p.after),
                p.top_before,
                p.top_after,
                _percent(p.moved),
            )
            for p in self.prompts
        )
        neighbours = tuple(
            (n.word, n.neighbour, n.similarity, _percent(n.moved), n.log_probability) for n in self.neighbours
        )
        loss = "Held-out text wasn't given, so its loss isn't known."
        if self.text is not None:
            loss = f"Held-out perplexity {self.text.before:.2f} → {self.text.after:.2f} ({self.text.change:+.2%})."
        topics = f", {self.topics} of them topics, which multiply senses of every word" if self.topics else ""
        biases = f", and biases on {counted(self.biased, 'token')}" if self.biased else ""
        columns = ("prompt", "target", "p before", "after", "likeliest before", "after", "moved")
        tables = [Table("Prompts", columns, prompts)] if prompts else []
        if neighbours:
            heads = ("edited word", "neighbour", "similarity", "prompts about it moved", "its log p, change")
            tables.append(Table("Neighbours", heads, neighbours))
        if self.text is not None and self.text.moved:
            moved = tuple(
                (word, f"{m.before:.4%}", f"{m.after:.4%}")
                for word, m in zip(self.moved_words, self.text.moved, strict=True)
            )
            tables.append(Table("Words that move most", ("word", "mean p over the text", "after"), moved))
        return Report(
            "What this revision does",
            f"{counted(self.edits, 'edit')} of {counted(self.cells, 'cell')}{topics}{biases}. {loss}",
            tuple(tables),
            notes=(
                "“Moved” is the total variation distance of the next token: the probability that changes hands.",
                "Neighbours are the words nearest in the mean cosine of their senses. Prompts about a neighbour "
                "are those given, with the neighbour in the edited word's place; other edited words still act.",
            ),
        )


def judge(
    subject: LabModel, edits: Sequence[Edit], prompts: Sequence[CanonicalExample] = (), text: Tensor | None = None
) -> PatchJudgement:
    """Judge edits on prompts (an empty target is none) and on text [N], of which perplexity is measured.

    Raises PatchError if the server would refuse the edits.
    """
    plain, steered = subject.overlay(), subject.overlay(*edits)
    change = None
    if text is not None:
        rows = rows_of(text, min(subject.config.n_positions, ROW_TOKENS))
        change = OrdinaryText(subject.model, subject.table, rows, keep=False).under(steered, MOVED_WORDS)
    tokens = sorted({cell.token for edit in edits for cell in edit.cells})
    return PatchJudgement(
        len(edits),
        len({cell for edit in edits for cell in edit.cells}),
        sum(isinstance(edit, TopicEdit) for edit in edits),
        len(steered.bias.tokens) if steered.bias else 0,
        change,
        [subject.shown(word.token) for word in change.moved] if change else [],
        [_judge_prompt(subject, plain, steered, example) for example in prompts],
        _neighbours(subject, plain, steered, tokens, [example.prompt for example in prompts]),
    )


def neighbours_of(subject: LabModel, token: int, count: int) -> list[tuple[int, float]]:
    """The tokens nearest to one in the mean cosine of their senses, itself left out."""
    rows = subject.table.rows[: subject.config.tokens]
    own = torch.nn.functional.normalize(rows[token], dim=-1)
    nearness = torch.cat(
        [torch.einsum("vkd,kd->v", torch.nn.functional.normalize(p, dim=-1), own) for p in rows.split(4096)]
    ) / len(own)
    nearness[token] = float("-inf")
    found = nearness.topk(min(count, len(nearness) - 1))
    return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))


def _judge_prompt(subject: LabModel, plain: Overlay, steered: Overlay, example: CanonicalExample) -> JudgedPrompt:
    asked = Prompts(subject, [example.prompt])
    before, after = (asked.log_probabilities(overlay)[0].exp() for overlay in (plain, steered))
    target = subject.word_ids(example.target)[0] if example.target else None
    return JudgedPrompt(
        example.prompt,
        example.target,
        None if target is None else float(before[target]),
        None if target is None else float(after[target]),
        subject.shown(int(before.argmax())),
        subject.shown(int(after.argmax())),
        float(moved_elsewhere(before[None], after[None])),
    )


def _neighbours(
    subject: LabModel, plain: Overlay, steered: Overlay, tokens: Sequence[int], prompts: Sequence[str]
) -> list[JudgedNeighbour]:
    rows, found = [subject.ids(prompt) for prompt in prompts], []
    words = [token for token in tokens if subject.tokenizer.piece(token).strip()]
    for token in [token for token in words if any(token in row for row in rows)][:MOST_WORDS]:
        about = [row for row in rows if token in row]
        own = Prompts(subject, about)
        before, after = (own.log_probabilities(overlay) for overlay in (plain, steered))
        for neighbour, similarity in neighbours_of(subject, token, NEIGHBOURS):
            # By token: in the text, " a" is the beginning of " and", too.
            instead = Prompts(subject, [[neighbour if one == token else one for one in row] for row in about])
            one, two = (instead.log_probabilities(overlay).exp() for overlay in (plain, steered))
            moved = float(moved_elsewhere(one, two).mean())
            change = float((after - before)[:, neighbour].mean())
            found.append(JudgedNeighbour(subject.shown(token), subject.shown(neighbour), similarity, moved, change))
    return found


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2%}"
