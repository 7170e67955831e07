"""Knowledge editing: the figures equal those of logits computed by hand; what can't be asked is refused."""

from __future__ import annotations

import pytest
import torch
from backpack_lm.experiments.facts import FACTS, FactsResult, KnowledgeEditing
from backpack_lm.lab.subject import Subject
from backpack_lm.lab.swap import Swapped, swap_fact
from backpack_lm.lab.watch import unwatched
from backpack_lm.tokenizer import WordError

PROMPT = "The captain of the ship went out to the"


def test_a_swap_is_measured_on_the_model_itself(subject: Subject) -> None:
    found = swap_fact(subject, "ship", "sea", "land", [PROMPT, "When the ship"], senses=[1, 3])
    ids, sea, land = torch.tensor([subject.ids(PROMPT)]), subject.token("sea"), subject.token("land")
    before = subject.model(ids)[0, -1].softmax(-1)
    after = subject.model(ids, subject.overlay(found.edit(subject)))[0, -1].softmax(-1)
    one = found.prompts[0]
    assert one.old_before == pytest.approx(float(before[sea]), rel=1e-4)
    assert one.new_after == pytest.approx(float(after[land]), rel=1e-4)
    others = [y for y in range(subject.config.tokens) if y not in (sea, land)]
    assert one.moved == pytest.approx(float((after - before)[others].abs().sum()) / 2, rel=1e-3)
    assert one.moved > 1e-4
    assert "ship" in found.report().markdown()


def test_held_and_turned() -> None:
    assert Swapped("", 0.4, 0.1, 0.2, 0.3, 0.0).held
    assert Swapped("", 0.4, 0.1, 0.2, 0.3, 0.0).turned
    assert not Swapped("", 0.1, 0.4, 0.2, 0.3, 0.0).held
    assert Swapped("", 0.3, 0.1, 0.1, 0.3, 0.0).share_before == pytest.approx(0.75)


def test_what_cannot_be_asked_is_refused(subject: Subject) -> None:
    with pytest.raises(ValueError, match="doesn't hold 'ship' as the token ' ship'"):
        swap_fact(subject, "ship", "sea", "land", ["The captain said"])
    with pytest.raises(WordError, match="tokens"):
        swap_fact(subject, "ship", "sea", "seafarer", [PROMPT])


def test_facts_that_the_vocabulary_lacks_are_listed(subject: Subject, folder) -> None:  # type: ignore[no-untyped-def]
    result = KnowledgeEditing(folder / "corpus.jsonl", 256).run(subject, unwatched)
    assert isinstance(result, FactsResult)
    assert len(result.facts) + len(result.unknown) == len(FACTS)
    assert "MacBook: Apple → HP" in result.unknown
    assert [fact.word for fact in result.facts] == ["ship"] or not result.facts
    assert "MacBook" in result.report().markdown()


def test_every_prompt_names_its_word() -> None:
    for fact in FACTS:
        assert len({fact.word, fact.old, fact.new}) == 3
        assert all(fact.word in prompt for prompt in fact.prompts)
