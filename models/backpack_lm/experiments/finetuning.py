"""Sense finetuning (arXiv 2402.06155): what canonical examples teach at several loss budgets.

Success: of the task's answers, the right one is the likeliest. Loss budgets are kept on held-out text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from backpack_lm.experiments.experiment import Headline, Result
from backpack_lm.experiments.tasks import TASKS
from backpack_lm.lab.examples import CanonicalExample
from backpack_lm.lab.finetune import Finetuner, Finetuning
from backpack_lm.lab.lab_model import LabModel, Prompts
from backpack_lm.lab.progress import Watch
from backpack_lm.lab.text import both_parts
from backpack_lm.overlay import Overlay
from backpack_lm.reports.plots import lines
from backpack_lm.reports.report import Report, Table


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """Share of questions answered right, and mean log p of the right answer."""

    success: float
    log_probability: float


@dataclass(frozen=True, slots=True)
class Taught:
    """One task at one budget: what it scores in the taught wording and in others, and what it cost."""

    task: str
    budget: float
    cells: int
    step: int
    loss_change: float
    taught: AnswerScore
    asked: AnswerScore


@dataclass(frozen=True, slots=True)
class FinetuningResult:
    """Scores by task before, as taught and as asked otherwise; each task at each budget; how many answers a task
    has; (held-out loss change in ‰, loss on the examples) of each check of a task's run."""

    before: dict[str, tuple[AnswerScore, AnswerScore]]
    tasks: list[Taught]
    answers: dict[str, int]
    curves: dict[str, list[tuple[float, float]]]

    @property
    def gains(self) -> dict[float, float]:
        """Points of success gained on questions in other words, mean over tasks, by loss budget."""
        return {
            budget: sum(
                100 * (t.asked.success - self.before[t.task][1].success) for t in self.tasks if t.budget == budget
            )
            / len(self.before)
            for budget in dict.fromkeys(t.budget for t in self.tasks)
        }

    def headline(self) -> Headline:
        return Headline(
            f"points gained on questions in other words {' / '.join(f'{g:+.1f}' for g in self.gains.values())} "
            f"at loss budgets {' / '.join(f'{b:.0e}' for b in self.gains)}",
            "+8.6 / +6.0 / +4.8 on harder tasks",
            "a gain at each budget",
            all(gain > 0 for gain in self.gains.values()),
        )

    def report(self) -> Report:
        rows: list[tuple[str | int | float | None, ...]] = []
        for task, (taught, asked) in self.before.items():
            rows.append((task, "unmodified", None, None, *_answer_row(taught), *_answer_row(asked)))
            for t in (t for t in self.tasks if t.task == task):
                rows.append(
                    (
                        task,
                        f"{t.budget:.0e}",
                        t.cells,
                        f"{t.loss_change:+.1e}",
                        *_answer_row(t.taught),
                        *_answer_row(t.asked),
                    )
                )
        columns = ("task", "budget", "cells", "held-out loss", "taught %", "log p", "asked otherwise %", "log p")
        lead = "Points of success gained on questions in other words: " + ", ".join(
            f"{gain:+.1f} at a loss budget of {budget:.0e}" for budget, gain in self.gains.items()
        )
        chance = ", ".join(f"{100 / n:.0f}% for {task}" for task, n in self.answers.items())
        return Report(
            "Sense finetuning",
            lead + ".",
            (Table("Tasks", columns, tuple(rows), digits=1),),
            (
                lines(
                    "Learning the examples",
                    self.curves,
                    "held-out loss, change in ‰",
                    "loss on the examples (nats)",
                ),
            ),
            (
                f"Success: of the task's answers the right one is the likeliest; by chance {chance}.",
                "Held-out loss is relative to the unmodified model's. No delta is fitted on that text, but how "
                "far they may go within a budget is decided on it.",
                "The tasks are this project's own, of the paper's kind, and small; the paper's baselines (all "
                "weights, LoRA) are not run here.",
            ),
        )


@dataclass(frozen=True, slots=True)
class SenseFinetuning:
    """`text` is a JSON-lines corpus or a plain file: a part to stay close on, the held-out one to be judged on."""

    text: Path
    budgets: tuple[float, ...] = (1e-3, 1e-4, 1e-5)
    tokens: int = 20_000
    plan: Finetuning = field(default_factory=Finetuning)
    NAME: ClassVar[str] = "finetuning"

    def run(self, subject: LabModel, watch: Watch) -> Result:
        near, judged = both_parts(subject, self.text, self.tokens)
        before, tasks, answers, curves = {}, [], {}, {}
        for task in TASKS:
            known = set(subject.single_token_words(other for _, other in task.pairs))
            examples, questions = task.examples(known), task.questions(known)
            if len(known) < 2:
                continue
            answers[task.name] = len(known)
            before[task.name] = _score_tasks(subject, subject.overlay(), examples, questions)
            run = Finetuner(subject, examples, near, judged, self.plan)
            for budget, found in run.run(watch, self.budgets).items():
                overlay = subject.overlay(*found.edits())
                scores = _score_tasks(subject, overlay, examples, questions)
                best = found.best
                tasks.append(Taught(task.name, budget, len(found.edits()), best.step, best.change, *scores))
            curves[task.name] = [(1000 * check.change, check.loss) for check in run.checks]
        if not tasks:
            raise ValueError("this model has none of the tasks' answers as single tokens")
        return FinetuningResult(before, tasks, answers, curves)


def _score_tasks(
    subject: LabModel, overlay: Overlay, examples: Sequence[CanonicalExample], questions: Sequence[CanonicalExample]
) -> tuple[AnswerScore, AnswerScore]:
    return score(subject, overlay, examples), score(subject, overlay, questions)


def score(subject: LabModel, overlay: Overlay, questions: Sequence[CanonicalExample]) -> AnswerScore:
    """Of the answers that occur, is each question's own the likeliest?"""
    answers = sorted({subject.token(question.target) for question in questions})
    right = torch.tensor([answers.index(subject.token(question.target)) for question in questions])
    logs = Prompts(subject, [question.prompt for question in questions]).log_probabilities(overlay)[:, answers]
    hits = (logs.argmax(1) == right).double().mean()
    return AnswerScore(float(hits), float(logs.gather(1, right[:, None]).mean()))


def _answer_row(found: AnswerScore) -> tuple[float, float]:
    return 100 * found.success, found.log_probability
