"""The finetuning experiment: its score is what a plain forward says, its tasks are sound, it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backpack_lm.experiments import finetuning
from backpack_lm.experiments.finetuning import FinetuningResult, SenseFinetuning, score
from backpack_lm.experiments.tasks import TASKS, Task
from backpack_lm.lab.examples import CanonicalExample
from backpack_lm.lab.finetune import Finetuning
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.progress import unwatched

QUESTIONS = [
    CanonicalExample("The captain of the", "ship"),
    CanonicalExample("The king went to the", "court"),
    CanonicalExample("He saw", "sea"),
]


def test_a_score_is_a_choice_among_the_answers(subject: LabModel) -> None:
    overlay, right, logs = subject.overlay(), 0, 0.0
    answers = [subject.token(question.target) for question in QUESTIONS]
    for question, answer in zip(QUESTIONS, answers, strict=True):
        p = subject.model(torch.tensor([subject.ids(question.prompt)]))[0, -1].double().log_softmax(-1)
        right += max(answers, key=lambda y: float(p[y])) == answer
        logs += float(p[answer])
    found = score(subject, overlay, QUESTIONS)
    assert found.success == pytest.approx(right / 3)
    assert found.log_probability == pytest.approx(logs / 3, rel=1e-4)


def test_no_question_is_what_was_taught() -> None:
    for task in TASKS:
        known = {other for _, other in task.pairs}
        assert len(known) == len(task.pairs), "each answer is right once"
        assert not set(task.examples(known)) & set(task.questions(known))
        assert len(task.questions(known)) == 2 * len(task.pairs)


def test_it_learns_and_keeps_to_its_budgets(subject: LabModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = (("king", "sea"), ("nurse", "land"), ("lawyer", "apple"))
    task = Task("pairs", "The {} saw the", ("When the {} came, the",), pairs)
    monkeypatch.setattr(finetuning, "TASKS", (task,))
    plan = Finetuning(cells=4, steps=30, rate=0.1, batch=64, penalty=0.0)
    experiment = SenseFinetuning(folder / "corpus.jsonl", (10.0, 1e-3), 512, plan)
    result = experiment.run(subject, unwatched)
    assert isinstance(result, FinetuningResult)
    assert [t.budget for t in result.tasks] == [10.0, 1e-3]
    assert all(t.loss_change <= t.budget for t in result.tasks)
    assert result.tasks[0].taught.log_probability > result.before["pairs"][0].log_probability + 0.5
    assert "| pairs | unmodified |" in result.report().markdown()
    monkeypatch.setattr(finetuning, "TASKS", (replace(task, pairs=(("king", "Timbuktu"),)),))
    with pytest.raises(ValueError, match="none of the tasks' answers"):
        experiment.run(subject, unwatched)
