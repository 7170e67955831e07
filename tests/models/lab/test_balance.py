"""One vector for each word that makes two others equally likely: fitted, bounded, as a patch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from backpack_lm.lab.balance import Balanced, BalancedNoun, balance
from backpack_lm.lab.contrast import Contrast, Noun
from backpack_lm.lab.elsewhere import NEUTRAL
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.progress import ResumeJournal, unwatched
from backpack_lm.lab.swap import quiet_direction
from backpack_lm.patch import AddEdit, Vector

TEMPLATES = ("The {} said that", "When the {} came into the room,")
TOLD = ("A {} believes that", "The {} saw the")
NOUNS = ["nurse", "lawyer", "cook"]


@pytest.fixture(scope="module")
def leaning(subject: LabModel) -> LabModel:
    """The subject whose senses of three nouns speak for “she” and against “he”, each a little: no sense is guilty."""
    rows = subject.table.rows.clone()
    towards = quiet_direction(subject, subject.token("he"), subject.token("she"))
    for noun in NOUNS:
        rows[subject.token(noun)] += 3 * towards
    return replace(subject, table=type(subject.table)(rows, subject.table.embedding, subject.table.unscored))


def _balance(subject: LabModel, words: list[str], most_moved: float = 1.0, journal: Path | None = None) -> Balanced:
    kept = ResumeJournal(journal, {})
    return balance(subject, words, unwatched, kept, "he", "she", TEMPLATES, TOLD, most_moved)


def test_the_direction_turns_one_logit_over_another_by_one_and_others_less(subject: LabModel) -> None:
    he, she = subject.token("he"), subject.token("she")
    moved = subject.head @ quiet_direction(subject, he, she)
    assert float(moved[she] - moved[he]) == pytest.approx(1, abs=1e-4)
    others = moved.clone()
    others[[he, she]] = 0
    assert float(others.abs().mean()) < 0.25 * float((moved[she] - moved[he]).abs())


def test_a_bias_that_no_sense_carries_alone_goes_by_a_vector(leaning: LabModel) -> None:
    found = _balance(leaning, [*NOUNS, "hairdresser"])
    assert found.unknown == ["hairdresser"]
    edits = found.edits(leaning)
    assert all(isinstance(edit, AddEdit) and len(edit.cells) == leaning.config.num_senses for edit in edits)
    contrast = Contrast.of(leaning, "he", "she")
    for noun in found.nouns:
        assert noun.amount < 0, "“she” was too likely"
        asked, judged = (Noun(leaning, noun.noun, some, contrast) for some in (TEMPLATES, TOLD))
        assert judged.bias() == pytest.approx(noun.unmodified)
        assert judged.bias(*edits) == pytest.approx(noun.fitted), "what the report says, the patch does"
        assert asked.bias(*edits) < 0.5 * asked.bias()
        (own,) = (edit for edit in edits if edit.cells[0].token == leaning.token(noun.noun))
        for share in (0.9, 1.1):
            beside = AddEdit(own.cells, Vector.of([share * value for value in own.delta.values()]))
            assert asked.bias(beside) > asked.bias(own), "no amount beside it does better"
    assert "Left out, because they are several tokens in this model: hairdresser." in found.report().notes


def test_a_vector_stops_before_too_much_else_moves(leaning: LabModel) -> None:
    free = _balance(leaning, NOUNS)
    assert not any(noun.bounded for noun in free.nouns)
    bound = 0.3 * max(max(noun.moved, noun.neutral) for noun in free.nouns)
    held = _balance(leaning, NOUNS, bound)
    contrast = Contrast.of(leaning, "he", "she")
    assert any(noun.bounded for noun in held.nouns)
    for one, other in zip(held.nouns, free.nouns, strict=True):
        assert abs(one.amount) <= abs(other.amount) + 1e-3
        edits = held.edits(leaning)
        moved, aside = (Noun(leaning, one.noun, some, contrast).moved(*edits) for some in (TEMPLATES, NEUTRAL))
        assert max(max(moved), sum(aside) / len(aside)) <= bound * 1.001
    assert held.report().notes[0].startswith(f"Held back, because {bound:.0%} of the probability moved elsewhere")
    with pytest.raises(ValueError, match="write a share from 0 to 1"):
        _balance(leaning, NOUNS, -1.0)


def test_what_a_vector_did_not_reach_is_said() -> None:
    good = BalancedNoun("cook", -1.0, 5.0, 2.9, 0.1, 0.1, False)
    assert Balanced("he", "she", [good], []).reached
    found = Balanced("he", "she", [good, replace(good, noun="king", fitted=3.1)], [])
    assert "of 1 of 2 nouns less than 50% of the excess over 1 is gone: king (5.00 → 3.10)" in found.reason
    assert found.report().warning == f"Not reached: {found.reason}."
    assert "with cook (40%)" in Balanced("he", "she", [replace(good, moved=0.4)], []).reason
    even = Balanced("he", "she", [BalancedNoun("ox", 0.0, 1.0, 1.0, 0.0, 0.0, False)], [])
    assert "excess" not in even.report().lead, "there was none"
    assert even.report().warning == ""


def test_balancing_goes_on_where_it_was_stopped(leaning: LabModel, tmp_path: Path) -> None:
    whole, file = _balance(leaning, NOUNS), tmp_path / "partial.jsonl"

    def stopping(items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        balance(leaning, NOUNS, stopping, ResumeJournal(file, {}), "he", "she", TEMPLATES, TOLD, 1.0)
    assert len(file.read_text().splitlines()) == 3
    assert _balance(leaning, NOUNS, journal=file) == whole
