"""Knowledge editing: the figures equal those of logits computed by hand; what can't be asked is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backpack_lm.experiments.fact_lists import FACTS, FRESH, Fact
from backpack_lm.experiments.facts import (
    OTHER_FACTS,
    OTHER_PROMPT,
    Cost,
    FactsResult,
    KnowledgeEditing,
    Strength,
    _on_the_others,
)
from backpack_lm.lab.elsewhere import NEUTRAL
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.progress import unwatched
from backpack_lm.lab.swap import STRENGTHS, Swapped, SwappedFact, fit_swap, swap_edits, swap_fact
from backpack_lm.lab.text import held_out, rows
from backpack_lm.model import Backpack
from backpack_lm.patch import AddEdit, PatchError, SwapEdit
from backpack_lm.tokenizer import Tokenizer, WordError, WordPolicy

from tests.test_house import ROOT

PROMPT = "The captain of the ship went out to the"


def test_a_swap_is_measured_on_the_model_itself(subject: LabModel) -> None:
    found = swap_fact(subject, "ship", "sea", "land", [PROMPT, "When the ship"], senses=[1, 3])
    ids, sea, land = torch.tensor([subject.ids(PROMPT)]), subject.token("sea"), subject.token("land")
    before = subject.model(ids)[0, -1].softmax(-1)
    after = subject.model(ids, subject.overlay(*found.edits(subject)))[0, -1].softmax(-1)
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


def test_a_strength_moves_the_two_logits_so_many_times_as_far(subject: LabModel) -> None:
    token, sea, land = map(subject.token, ("ship", "sea", "land"))
    head = subject.model.embedding
    v, ids = subject.table.rows[token, 1], torch.tensor([[token]])

    def shift(strength: float, senses: tuple[int, ...] = (1,)) -> torch.Tensor:
        overlay = subject.overlay(*swap_edits(subject, "ship", "sea", "land", senses, strength))
        got = overlay.replace(ids, subject.table.rows[ids])[0, 0]
        assert torch.equal(got[0], subject.table.rows[token, 0]), "a sense that wasn't named"
        return head @ (got[1] - v)

    plain = shift(1)
    for strength in (2, 3):
        more = shift(strength)
        assert float(more[land] - more[sea]) == pytest.approx(strength * float(plain[land] - plain[sea]), rel=1e-3)
        others = torch.ones(len(head), dtype=torch.bool)
        others[[sea, land, subject.config.eos_token_id or 0]] = False
        added = (more - plain) / (strength - 1)
        assert float(added[others].square().mean()) < float(plain[others].square().mean()), "the others move less"
    norm = float(torch.linalg.lstsq(head, shift(1e6) - plain).solution.norm())
    assert norm == pytest.approx(0.999 * 8 * subject.manifest.sense_rms[1], rel=1e-3), "as far as a patch may"
    one, two = (swap_edits(subject, "ship", "sea", "land", [0, 1], s) for s in (1, 2))
    assert [type(edit) for edit in one] == [SwapEdit]
    assert [type(edit) for edit in two] == [SwapEdit, AddEdit, AddEdit]
    for bad in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="1 is a plain swap"):
            swap_edits(subject, "ship", "sea", "land", [1], bad)
    with pytest.raises(PatchError, match="sense 9"):
        swap_edits(subject, "ship", "sea", "land", [9], 2)


def test_a_fit_is_the_least_that_moves_enough_after_every_prompt(subject: LabModel) -> None:
    words, prompts = ("ship", "court", "king"), [PROMPT, "When the ship"]
    found = fit_swap(subject, *words, prompts, most_moved=1.0)
    swaps = {s: swap_fact(subject, *words, prompts, strength=s) for s in STRENGTHS}
    turned = [s for s in STRENGTHS if all(p.share_after <= 0.2 for p in swaps[s].prompts)]
    assert turned, "the test has one that turns"
    assert found.reached
    assert found.strength == turned[0]
    assert found.strength > 1


def test_a_fit_stops_before_too_much_else_moves(subject: LabModel) -> None:
    words, prompts = ("ship", "court", "king"), [PROMPT, "When the ship"]
    swaps = {s: swap_fact(subject, *words, prompts, strength=s) for s in STRENGTHS}
    moved = {s: max(swaps[s].farthest.moved, swaps[s].neutral) for s in STRENGTHS}
    free = fit_swap(subject, *words, prompts, most_moved=1.0).strength
    bound = moved[free] - 1e-6  # just too little for the strength that would do
    found = fit_swap(subject, *words, prompts, most_moved=bound)
    within = [s for s in STRENGTHS[: STRENGTHS.index(free)] if moved[s] <= bound]
    assert within
    assert found.strength == max(within, key=lambda s: swaps[s].least), "the one that comes nearest"
    assert (found.reached, found.bounded) == (False, True)
    assert "“king” has less than 80% of the two" in found.reason
    assert f"at strength {free:g} {moved[free]:.0%} of the probability moved elsewhere" in found.reason
    report = found.report()
    assert report.warning == f"Not reached: {found.reason}."
    assert report.title == "“ship” shall say “king” where it said “court”"
    assert "Not reached" in report.markdown()
    assert "Not reached" in report.html()
    plain = fit_swap(subject, *words, prompts, most_moved=0.0)
    assert (plain.strength, plain.reached, plain.bounded) == (1.0, False, False), "nothing moves less"
    with pytest.raises(ValueError, match=r"1.5 of the probability; write a share from 0 to 1"):
        fit_swap(subject, *words, prompts, most_moved=1.5)


def test_what_moves_elsewhere_is_measured_after_neutral_prompts_too(subject: LabModel) -> None:
    found = swap_fact(subject, "ship", "sea", "land", [PROMPT], strength=16)
    sea, land, moved = subject.token("sea"), subject.token("land"), []
    for template in NEUTRAL:
        ids = torch.tensor([subject.ids(template.replace("{}", "ship"))])
        assert subject.token("ship") in ids
        before, after = (
            subject.model(ids, o)[0, -1].softmax(-1) for o in (None, subject.overlay(*found.edits(subject)))
        )
        others = [y for y in range(subject.config.tokens) if y not in (sea, land)]
        moved.append(float((after - before)[others].abs().sum()) / 2)
    assert found.neutral == pytest.approx(sum(moved) / len(moved), rel=1e-3)
    assert found.neutral > 1e-3
    calm = replace(found.prompts[0], moved=0.0)
    assert replace(found, prompts=[calm], most_moved=found.neutral).bounded
    assert not replace(found, prompts=[calm], most_moved=found.neutral - 1e-6).bounded


def test_both_lists_stand_side_by_side_and_the_aim_is_judged_on_the_fresh_one(
    subject: LabModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Fact("ship", "sea", "land", (PROMPT, "When the ship"))
    other = Fact("king", "ship", "nurse", ("The king said that he had a", "They say that the king went to the"))
    monkeypatch.setattr("backpack_lm.experiments.facts.FACTS", (one,))
    monkeypatch.setattr("backpack_lm.experiments.facts.FRESH", (other,))
    result = KnowledgeEditing().run(subject, unwatched)
    assert isinstance(result, FactsResult)
    assert result.fresh is not None
    assert [fact.word for fact in result.fresh.facts] == ["king"]
    text = result.report().markdown()
    for title in ("Both lists", "By strength, first list", "By strength, second list"):
        assert f"**{title}**" in text
    assert "Nothing was chosen on the second, fresh one" in text
    fits = [fit_swap(subject, "king", "ship", "nurse", [p]).strength for p in reversed(other.prompts)]
    swaps = [
        swap_fact(subject, "king", "ship", "nurse", [p], strength=s).prompts[0]
        for p, s in zip(other.prompts, fits, strict=True)
    ]
    assert result.fresh.strengths[-1].prompts == swaps

    turned, held = Swapped("", 0.9, 0.2, 0.1, 0.8, 0.0), Swapped("", 0.9, 0.8, 0.1, 0.2, 0.0)

    def of(prompt: Swapped) -> FactsResult:
        rows = [Strength(name, [prompt], Cost(0.0, 0.0, 0.0)) for name in ("1", OTHER_FACTS, OTHER_PROMPT)]
        return FactsResult([], [], [], rows)

    assert of(turned).headline().reached
    assert not replace(of(turned), fresh=of(held)).headline().reached
    assert replace(of(held), fresh=of(turned)).headline().reached
    assert "on a second list, on which nothing was chosen" in replace(of(held), fresh=of(turned)).headline().figures


def test_the_second_list_is_fit_to_be_asked() -> None:
    tokenizer = Tokenizer.read(ROOT / "models" / "weights" / "micro" / "tokenizer.json")
    words = {fact.word for fact in FACTS}
    assert len(FRESH) >= 12
    for fact in FRESH:
        assert fact.word not in words, "on the first list"
        (token,), *_ = (tokenizer.word_ids(word, WordPolicy.SINGLE) for word in (fact.word, fact.old, fact.new))
        assert len(fact.prompts) == 2
        assert all(token in tokenizer.encode(prompt) for prompt in fact.prompts)


@pytest.mark.parametrize("length", [32, 64])
def test_the_cost_is_that_of_the_model_itself(
    length: int, subject: LabModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are shorter than the context, or as long where that is less."""
    fact = Fact("ship", "sea", "land", (PROMPT, "When the ship"))
    monkeypatch.setattr("backpack_lm.experiments.facts.FACTS", (fact,))
    monkeypatch.setattr("backpack_lm.experiments.facts.FRESH", ())
    monkeypatch.setattr("backpack_lm.experiments.facts.ROW", 32 if length == 32 else 512)
    read: list[int] = []
    real = Backpack.sense_weights

    def counting(model: Backpack, ids: torch.Tensor) -> torch.Tensor:
        read.append(ids.numel())
        return real(model, ids)

    monkeypatch.setattr(Backpack, "sense_weights", counting)
    corpus = folder / "corpus.jsonl"
    result = KnowledgeEditing((corpus,), 256).run(subject, unwatched)
    assert isinstance(result, FactsResult)
    assert [strength.name for strength in result.strengths] == [
        "1",
        "2",
        "4",
        "8",
        "16",
        "32",
        OTHER_FACTS,
        OTHER_PROMPT,
    ]
    assert read.count(length) == 256 // length, "the trunk reads a row once, whatever the number of strengths"
    text, ship = rows(subject, held_out(corpus), 256, length), subject.token("ship")

    def losses(strength: float | None) -> torch.Tensor:
        edits = swap_edits(subject, *("ship", "sea", "land"), range(4), strength) if strength else []
        logits = subject.model(text[:, :-1], subject.overlay(*edits))
        return F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none").double()

    before, next_ = losses(None), text[:, :-1] == ship
    after = next_.cumsum(1) > 0
    assert 0 < next_.sum() < after.sum() < after.numel()
    for strength, cost in ((s, found.cost) for s, found in zip(STRENGTHS, result.strengths, strict=False)):
        assert cost is not None
        for part, share in ((torch.ones_like(after), cost.everywhere), (after, cost.after), (next_, cost.next)):
            expected = float((losses(strength) - before)[part].sum() / before[part].sum())
            assert share == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for at, prompt in enumerate(fact.prompts):  # what is counted wasn't fitted on
        fitted = fit_swap(subject, "ship", "sea", "land", [fact.prompts[1 - at]]).strength
        expected = swap_fact(subject, "ship", "sea", "land", [prompt], strength=fitted).prompts[0]
        assert result.strengths[-1].prompts[at] == expected


def test_a_strength_is_chosen_on_the_other_facts_alone() -> None:
    held, turned = Swapped("", 0.4, 0.4, 0.2, 0.2, 0.0), Swapped("", 0.4, 0.1, 0.2, 0.3, 0.0)
    turns_at = (1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 8.0)  # seven facts of a prompt each

    def fact(least: float, strength: float) -> SwappedFact:
        return SwappedFact("", "", "", [], strength, [turned if strength >= least else held])

    by_strength = {s: [fact(least, s) for least in turns_at] for s in STRENGTHS}
    assert _on_the_others(by_strength, 0) == 2, "four of six turn at 1, five at 2"
    assert _on_the_others(by_strength, 5) == 1, "five of six"
    assert _on_the_others(by_strength, 6) == 1, "five of six"
    assert _on_the_others({s: [fact(99, s)] * 3 for s in STRENGTHS}, 0) == STRENGTHS[-1]


def test_what_cannot_be_asked_is_refused(subject: LabModel) -> None:
    with pytest.raises(ValueError, match="doesn't hold 'ship' as the token ' ship'"):
        swap_fact(subject, "ship", "sea", "land", ["The captain said"])
    with pytest.raises(WordError, match="tokens"):
        swap_fact(subject, "ship", "sea", "seafarer", [PROMPT])


def test_facts_that_the_vocabulary_lacks_are_listed(subject: LabModel, folder: Path) -> None:
    result = KnowledgeEditing((folder / "corpus.jsonl",), 256).run(subject, unwatched)
    assert isinstance(result, FactsResult)
    assert len(result.facts) + len(result.unknown) == len(FACTS)
    assert "MacBook: Apple → HP" in result.unknown
    assert [fact.word for fact in result.facts] == ["ship"] or not result.facts
    assert "MacBook" in result.report().markdown()
    held = len(result.strengths[0].held)  # a fact has two prompts
    assert f"of {held} prompts on which it held the fact turn by a plain swap" in result.headline().figures


def test_the_aim_is_reached_by_swaps_as_the_lab_fits_them() -> None:
    turned, held = Swapped("", 0.9, 0.2, 0.1, 0.8, 0.0), Swapped("", 0.9, 0.8, 0.1, 0.2, 0.0)
    dear, cheap = Cost(0.0, 0.02, 0.0), Cost(0.0, 0.01, 0.0)

    def reached(fitted: list[Swapped], cost: Cost) -> bool | None:
        others = Strength("1", [held], cheap), Strength(OTHER_FACTS, [held], cheap)
        return FactsResult([], [], [], [*others, Strength(OTHER_PROMPT, fitted, cost)]).headline().reached

    assert reached([*[turned] * 5, held], cheap)
    assert not reached([*[turned] * 5, held], dear), "neighbours lose more than a hundredth"
    assert not reached([*[turned] * 4, held], cheap), "four of five aren't over 80 %"


def test_every_prompt_names_its_word() -> None:
    for fact in (*FACTS, *FRESH):
        assert len({fact.word, fact.old, fact.new}) == 3
        assert all(fact.word in prompt for prompt in fact.prompts)
