"""The lab: what each tool finds and fits, patches that do what their reports say, stopped work that goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backpack_lm.lab.contrast import Contrast, Noun, SenseEffect, SenseSearch, find_sense
from backpack_lm.lab.debias import Debiased, DebiasedNoun, debias, least
from backpack_lm.lab.elsewhere import NEUTRAL
from backpack_lm.lab.examples import CanonicalExample
from backpack_lm.lab.finetune import Finetuner, Finetuning
from backpack_lm.lab.influence import choose_cells
from backpack_lm.lab.judge import judge, neighbours_of
from backpack_lm.lab.lab_model import LabModel, SteeredModel
from backpack_lm.lab.professions import ESTIMATION, EVALUATION, NOUNS
from backpack_lm.lab.progress import ResumeJournal, unwatched
from backpack_lm.lab.text import rows
from backpack_lm.lab.topic import By, choose_topic
from backpack_lm.lab.topic_vector import CELLS, FrequentWords, topic_vector_edits
from backpack_lm.patch import AddEdit, BiasEdit, Cell, Edit, PatchError, PatchLimits, ScaleEdit, TopicEdit, Vector
from backpack_lm.reports.report import Entry, Report, Table
from markdown_it import MarkdownIt

TEMPLATES = ("The {} said that", "When the {} came into the room,")
EXAMPLES = [
    CanonicalExample("The captain of the ship saw the", "lawyer"),
    CanonicalExample("The king went to the", "apple"),
]


@pytest.fixture(scope="module")
def biased(subject: LabModel) -> LabModel:
    """The subject with one guilty sense: sense 2 of three nouns speaks loudly for “she” and against “he”."""
    table = subject.table
    rows_ = table.rows.clone()
    direction = subject.model.embedding[subject.token("she")] - subject.model.embedding[subject.token("he")]
    for noun in ("nurse", "lawyer", "cook"):
        rows_[subject.token(noun), 2] += 12 * direction / direction.norm() ** 2
    guilty = type(table)(rows_, table.embedding, table.unscored)
    return replace(subject, table=guilty)


def test_the_guilty_sense_is_found(biased: LabModel) -> None:
    found = find_sense(biased, ["nurse", "lawyer", "cook", "hairdresser"], "he", "she", TEMPLATES, unwatched)
    assert found.guilty == 2
    assert found.unknown == ["hairdresser"]
    assert found.senses[2].contrast < -2
    assert found.senses[2].bias_removed < found.bias
    with pytest.raises(ValueError, match="none of hairdresser is one token"):
        find_sense(biased, ["hairdresser"], "he", "she", TEMPLATES, unwatched)
    with pytest.raises(ValueError, match="same token"):
        Contrast.of(biased, "he", "he")
    with pytest.raises(ValueError, match=r"has no \{\}"):
        Noun(biased, "nurse", ["The nurse"], Contrast.of(biased, "he", "she"))


def _scaled_bias(noun: Noun, factor: float) -> float:
    return noun.bias(*noun.scaled(2, factor))


def test_a_fitted_scale_is_the_least_cost_of_a_grid(biased: LabModel) -> None:
    gains, bound = [], PatchLimits().norm_factor
    for word, penalty in product(("nurse", "lawyer", "cook"), (1.0, 0.0)):
        noun = Noun(biased, word, (*TEMPLATES, "The {}"), Contrast.of(biased, "he", "she"))
        costs = {c: noun.bias(*noun.scaled(2, c)) + penalty * abs(1 - c) for c in (n / 10 for n in range(-80, 81))}
        fitted = least(partial(_scaled_bias, noun), penalty, -bound, bound)
        cost = noun.bias(*noun.scaled(2, fitted)) + penalty * abs(1 - fitted)
        assert cost <= min(costs.values()) + 1e-3
        gains.append(costs[1.0] - cost)
    assert max(gains) > 0.1, "something was fitted"


def test_a_scale_that_a_patch_bounds_is_named() -> None:
    nouns = [DebiasedNoun(noun, scale, 2.0, 1.5, 1.2) for noun, scale in (("cook", 8.0), ("king", 7.9), ("ox", -8.0))]
    search = SenseSearch("he", "she", ["cook", "king", "ox"], [], 2.0, [SenseEffect(0, 1.5, 1.0, 1.0)])
    found = Debiased("he", "she", 0, search, nouns)
    assert found.report().notes == ("At ±8, the most that a patch may scale by: cook, ox.",)
    assert replace(found, nouns=nouns[1:2]).report().notes == ()


def test_a_scale_stops_before_too_much_else_moves(biased: LabModel) -> None:
    given = {"estimation": TEMPLATES, "evaluation": ("A {} believes that",)}
    nouns = ["nurse", "lawyer", "cook"]
    free = debias(biased, nouns, unwatched, ResumeJournal(None, {}), most_moved=1.0, **given)  # type: ignore[arg-type]
    assert not any(noun.bounded for noun in free.nouns)
    assert min(noun.neutral for noun in free.nouns) > 0.02
    bound = 0.01
    held = debias(biased, nouns, unwatched, ResumeJournal(None, {}), most_moved=bound, **given)  # type: ignore[arg-type]
    contrast = Contrast.of(biased, "he", "she")
    for one, other in zip(held.nouns, free.nouns, strict=True):
        assert one.bounded
        assert abs(one.scale - 1) < abs(other.scale - 1)
        edits = Noun(biased, one.noun, TEMPLATES, contrast).scaled(held.sense, one.scale)
        moved = [
            _else_moved(biased, template.replace("{}", one.noun), edits, (contrast.one, contrast.other))
            for template in (*TEMPLATES, *NEUTRAL)
        ]
        assert max(*moved[:2], sum(moved[2:]) / len(NEUTRAL)) == pytest.approx(bound, rel=0.05), "as far as it may"
        assert one.neutral == pytest.approx(sum(moved[2:]) / len(NEUTRAL), rel=1e-2, abs=1e-6)
    report = held.report()
    assert "Held back, because 1% of the probability moved elsewhere" in report.notes[0]
    with pytest.raises(ValueError, match="write a share from 0 to 1"):
        debias(biased, nouns, unwatched, ResumeJournal(None, {}), most_moved=-1.0, **given)  # type: ignore[arg-type]


def _else_moved(subject: LabModel, prompt: str, edits: tuple[Edit, ...], aimed: tuple[int, int]) -> float:
    """From whole forwards: half of what all tokens but two gain and lose."""
    ids = torch.tensor([subject.ids(prompt)])
    before, after = (
        SteeredModel(subject, subject.overlay(*some)).mix(ids)[0, -1] @ subject.head.t() for some in ((), edits)
    )
    difference = (after.softmax(-1) - before.softmax(-1)).abs()
    difference[list(aimed)] = 0
    return float(difference.sum()) / 2


def test_what_debias_did_not_reach_is_said() -> None:
    search = SenseSearch("he", "she", ["cook", "king"], [], 2.0, [SenseEffect(0, 1.5, 1.0, 1.0, 0.01)])
    good = DebiasedNoun("cook", -1.0, 5.0, 3.0, 2.9, 0.1, 0.1)
    even = DebiasedNoun("ox", 1.0, 1.2, 1.2, 1.2)
    assert Debiased("he", "she", 0, search, [good, even]).reached
    half = replace(good, noun="king", fitted=3.1)
    found = Debiased("he", "she", 0, search, [good, half])
    assert not found.reached
    assert "of 1 of 2 nouns less than 50% of the excess over 1 is gone: king (5.00 → 3.10)" in found.reason
    assert found.report().warning == f"Not reached: {found.reason}."
    far = Debiased("he", "she", 0, search, [replace(good, moved=0.4)])
    assert "with cook (40%)" in far.reason
    noisy = replace(search, senses=[SenseEffect(0, 1.5, 1.0, 1.0, 1.0)])
    assert "the sense can't be told from noise" in Debiased("he", "she", 0, noisy, [good]).reason


def test_a_sense_is_blamed_beyond_noise_alone(biased: LabModel) -> None:
    nouns = ["nurse", "lawyer", "cook"]
    found = find_sense(biased, nouns, "he", "she", TEMPLATES, unwatched)
    contrast, falls = Contrast.of(biased, "he", "she"), []
    for word in nouns:
        for template in TEMPLATES:
            noun = Noun(biased, word, [template], contrast)
            falls.append(noun.bias() - noun.bias(*noun.scaled(2, 0.0)))
    mean = sum(falls) / len(falls)
    spread = math.sqrt(sum((fall - mean) ** 2 for fall in falls) / (len(falls) - 1))
    assert found.senses[2].error == pytest.approx(spread / math.sqrt(len(falls)), rel=1e-4)
    assert found.errors == pytest.approx(2.4977, abs=1e-3), "of four senses, 5 % of searches by chance"
    one = find_sense(biased, nouns[:1], "he", "she", TEMPLATES[:1], unwatched)
    assert (one.reached, one.senses[0].error) == (False, None)
    assert "noise can't be told" in one.reason

    def search(fall: float, error: float) -> SenseSearch:
        effects = [SenseEffect(s, 3.0 - fall * (s == 1), 0.0, 0.0, error) for s in range(4)]
        return SenseSearch("he", "she", ["cook"], [], 3.0, effects)

    assert search(0.5, 0.1).reached
    assert search(0.5, 0.1).report().warning == ""
    assert search(0.5, 0.3).report().warning.startswith("Within noise: without sense 1 the ratio falls by 0.500, and")
    assert "noise is 0.749" in search(0.5, 0.3).reason
    assert "less than 5% of its excess over 1, 0.100" in search(0.09, 0.001).reason


def test_debias_goes_on_where_it_was_stopped(biased: LabModel, tmp_path: Path) -> None:
    given = {"estimation": TEMPLATES, "evaluation": ("A {} believes that",)}
    nouns = ["nurse", "lawyer", "cook"]
    whole = debias(biased, nouns, unwatched, ResumeJournal(None, {}), **given)
    file = tmp_path / "partial.jsonl"

    def stopping(items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
        for number, item in enumerate(items):
            if what == "nouns" and number == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        debias(biased, nouns, stopping, ResumeJournal(file, {}), **given)  # type: ignore[arg-type]
    assert len(file.read_text().splitlines()) == 3
    assert debias(biased, nouns, unwatched, ResumeJournal(file, {}), **given) == whole
    assert whole.sense == 2
    assert all(isinstance(edit, ScaleEdit) for edit in whole.edits(biased))
    for noun in whole.nouns:  # what the report says, the patch does
        judged = Noun(biased, noun.noun, given["evaluation"], Contrast.of(biased, "he", "she"))
        assert judged.bias(*whole.edits(biased)) == pytest.approx(noun.fitted)
    with pytest.raises(ValueError, match="sense 9; this model's are 0 to 3"):
        debias(biased, nouns, unwatched, ResumeJournal(None, {}), sense=9)


def test_a_word_that_is_named_twice_is_scaled_once(biased: LabModel) -> None:
    given = {"estimation": TEMPLATES, "evaluation": ("A {} believes that",)}
    words = ["nurse", "nurse ", "hairdresser"]
    found = debias(biased, words, unwatched, ResumeJournal(None, {}), penalty=0.1, **given)  # type: ignore[arg-type]
    (edit,) = found.edits(biased)
    assert isinstance(edit, ScaleEdit)
    assert edit.factor == pytest.approx(found.nouns[0].scale)
    judged = Noun(biased, "nurse", given["evaluation"], Contrast.of(biased, "he", "she"))
    assert judged.bias(edit) == pytest.approx(found.fitted)
    assert found.search.unknown == ["hairdresser"]


def test_the_paper_s_nouns_and_prompts() -> None:
    assert (len(NOUNS), len(ESTIMATION), len(EVALUATION)) == (40, 5, 13)
    assert not set(ESTIMATION) & set(EVALUATION)


@pytest.mark.parametrize("by", By)
def test_a_topic_shows_what_each_strength_does(subject: LabModel, by: By) -> None:
    found = choose_topic(subject, ["sea", "ship"], 2, ["The king said that"], by)
    masses = found.mass["The king said that"]
    p = subject.model(torch.tensor([subject.ids("The king said that")]))[0, -1].softmax(-1)
    assert masses[0] == pytest.approx(float(p[found.tokens].sum()), rel=1e-3)
    overlay = subject.overlay(*found.edits())
    p = subject.model(torch.tensor([subject.ids("The king said that")]), overlay)[0, -1].softmax(-1)
    assert masses[2] == pytest.approx(float(p[found.tokens].sum()), rel=1e-3)
    with pytest.raises(PatchError, match="use 1, 2 or 3"):
        choose_topic(subject, ["sea"], 9, by=by)
    moved = _else_moved(subject, "The king said that", tuple(found.edits()), (found.tokens[0], found.tokens[1]))
    assert found.moved["The king said that"][2] == pytest.approx(moved, rel=1e-2)
    assert choose_topic(subject, ["sea"], 2, by=by).reached is None, "no prompt was given"
    led = replace(found, mass={"a": [0.1, 0.1, 0.19, 0.1]})  # of odds 0.111 to 0.235
    assert led.reached
    stays = replace(found, mass={"a": [0.1, 0.9, 0.15, 0.9]})
    assert not stays.reached
    assert "at strength 2 the odds of the words don't grow 2 times after “a” (10.00% → 15.00%)" in stays.reason
    assert stays.report().warning == f"Not reached: {stays.reason}."


def test_a_topic_vector_needs_frequent_words(subject: LabModel) -> None:
    frequent = FrequentWords.of(subject)
    assert FrequentWords.of(subject) == frequent, "seeded"
    assert len(frequent.tokens) <= CELLS // subject.config.num_senses
    assert list(frequent.shares) == sorted(frequent.shares, reverse=True)
    assert sum(frequent.shares) <= 1
    assert subject.config.eos_token_id not in frequent.tokens
    with pytest.raises(ValueError, match="no cell of 2000 for frequent words; give fewer"):
        topic_vector_edits(subject, range(500), 1, frequent)
    endless = replace(subject.model.config, eos_token_id=None)
    model = type(subject.model)(endless).eval().requires_grad_(False)
    with pytest.raises(ValueError, match="no end-of-text token"):
        FrequentWords.of(replace(subject, model=model))


# ---- finetuning


@pytest.fixture(scope="module")
def texts(subject: LabModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows: text in which the examples' words occur as often as any."""
    random = torch.Generator().manual_seed(5)
    near, judged = (torch.randint(1, subject.config.tokens, (12, 33), generator=random) for _ in range(2))
    near[0, 3] = judged[0, 5] = judged[4, 2] = subject.token("captain")
    return near, judged


PLAN = Finetuning(cells=4, budget=0.05, steps=40, rate=0.05, batch=64)


def test_deltas_teach_the_examples_within_the_budget(subject: LabModel, texts: Any) -> None:
    run = Finetuner(subject, EXAMPLES, *texts, PLAN)
    found = run.run(unwatched, (0.05, 0.0))
    best = found[0.05]
    assert best.best.loss < run.checks[0].loss - 0.5
    assert best.best.change <= 0.05
    assert found[0.0].best.change <= 0.0
    overlay = subject.overlay(*best.edits())  # compiled as the server compiles it

    def loss(text: torch.Tensor, first: int = 0) -> torch.Tensor:
        logits = subject.model(text[None, :-1], overlay)[0, first:]
        return F.cross_entropy(logits, text[1 + first :], reduction="sum")

    total, count = 0.0, 0
    for example in EXAMPLES:
        prompt, target = subject.ids(example.prompt), subject.word_ids(example.target)
        total += float(loss(torch.tensor([*prompt, *target]), len(prompt) - 1))
        count += len(target)
    assert total / count == pytest.approx(best.best.loss, rel=1e-3), "what was trained is what the patch does"
    plain = math.fsum(float(F.cross_entropy(subject.model(t[None, :-1])[0], t[1:], reduction="sum")) for t in texts[1])
    assert sum(float(loss(t)) for t in texts[1]) / plain - 1 == pytest.approx(best.best.change, abs=1e-5)


def test_a_run_that_was_stopped_ends_as_if_it_never_was(subject: LabModel, texts: Any, tmp_path: Path) -> None:
    whole = Finetuner(subject, EXAMPLES, *texts, PLAN).run(unwatched)[0.05]
    file = tmp_path / "run.pt"

    def stopping(items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 25:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        Finetuner(subject, EXAMPLES, *texts, PLAN, file).run(stopping)  # type: ignore[arg-type]
    second = Finetuner(subject, EXAMPLES, *texts, PLAN, file)
    assert second.step == 20
    resumed = second.run(unwatched)[0.05]
    assert torch.equal(resumed.deltas, whole.deltas)
    assert resumed.checks == whole.checks
    near, judged = texts
    other = near.clone()
    other[-1, -1] += 1
    for examples, background, held_out, plan in (
        (EXAMPLES, near, judged, replace(PLAN, steps=41)),
        ([EXAMPLES[0], replace(EXAMPLES[1], target="ship")], near, judged, PLAN),
        (EXAMPLES, other, judged, PLAN),
        (EXAMPLES, near, other, PLAN),
    ):
        with pytest.raises(ValueError, match="other settings"):
            Finetuner(subject, examples, background, held_out, plan, file)


def test_cells_are_those_that_targets_attend_to_and_ordinary_text_does_not(subject: LabModel, texts: Any) -> None:
    cells = choose_cells(subject, EXAMPLES[:1], texts[0], count=3, penalty=0.0)
    ids = subject.ids(EXAMPLES[0].prompt)
    alpha = subject.model.sense_weights(torch.tensor([ids]))[0, :, -1]  # [k, T]
    scores = {
        Cell(token, sense): sum(float(alpha[sense, j]) for j, t in enumerate(ids) if t == token)
        for token in ids
        for sense in range(4)
    }
    assert len(subject.word_ids(EXAMPLES[0].target)) == 1, "so the prompt's last position is all that predicts it"
    assert set(cells) == set(sorted(scores, key=scores.__getitem__)[-3:])
    everywhere = texts[0].clone()
    everywhere[:, 1:] = cells[0].token  # now ordinary text is full of the word
    assert cells[0] not in choose_cells(subject, EXAMPLES[:1], everywhere, count=3, penalty=1000.0)


def test_examples_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text('{"prompt": "The sea is", "target": "deep"}\n\n{"prompt": 3}\n')
    with pytest.raises(ValueError, match=r"examples.jsonl:3: not an example like"):
        CanonicalExample.read(file)
    file.write_text('{"prompt": null, "target": "deep"}\n')
    with pytest.raises(ValueError, match=r"examples.jsonl:1: not an example like"):
        CanonicalExample.read(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no examples"):
        CanonicalExample.read(file)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"examples.jsonl isn't UTF-8 text"):
        CanonicalExample.read(file)


def test_a_target_leaves_its_prompt_room(subject: LabModel) -> None:
    word = "king "
    ids, first = CanonicalExample("The ship", word * 63).ids(subject)
    assert (len(ids), first) == (64, 1)
    with pytest.raises(ValueError, match="the target of 'The ship' has 64 tokens; the context holds 64"):
        CanonicalExample("The ship", word * 64).ids(subject)


# ---- judging


def test_a_judgement_is_what_the_overlay_does(subject: LabModel, folder: Path) -> None:
    ship = subject.token("ship")
    edits = [AddEdit(tuple(Cell(ship, sense) for sense in range(4)), Vector.of([2.0] * 32))]
    prompts = [CanonicalExample("The captain of the ship saw the", "land"), CanonicalExample("The king said", "")]
    text = rows(subject, ["the king and the ship " * 60], 200, 64).flatten()
    found = judge(subject, edits, prompts, text)
    ids, overlay = torch.tensor([subject.ids(prompts[0].prompt)]), subject.overlay(*edits)
    before, after = (subject.model(ids, o)[0, -1].softmax(-1) for o in (None, overlay))
    land = subject.word_ids("land")[0]
    assert found.prompts[0].before == pytest.approx(float(before[land]), rel=1e-3)
    assert found.prompts[0].after == pytest.approx(float(after[land]), rel=1e-3)
    assert found.prompts[0].moved == pytest.approx(float((after - before).abs().sum()) / 2, rel=1e-3)
    assert found.prompts[0].moved > 1e-3
    assert found.prompts[1].moved == 0.0, "the edited word isn't there"
    assert all(n.moved < 1e-9 for n in found.neighbours), "a neighbour isn't edited"
    assert found.neighbours
    assert found.text is not None
    assert found.text.before != found.text.after
    assert "Held-out perplexity" in found.report().lead
    with pytest.raises(PatchError, match="1 number; this"):
        judge(subject, [AddEdit((Cell(ship, 1),), Vector.of([1.0]))])


def test_a_neighbour_stands_in_the_word_s_place_alone(subject: LabModel) -> None:
    the, ship = subject.token("the"), subject.token("ship")
    prompt = "When the captain of the ship went there,"
    edits = [AddEdit((Cell(word, 1),), Vector.of([1.0] * 32)) for word in (the, ship)] * 2
    rare = [token for token in range(subject.config.tokens) if token not in subject.ids(prompt)][:20]
    edits += [ScaleEdit(tuple(Cell(token, 0) for token in rare), 0.5)]
    found = judge(subject, edits, [CanonicalExample(prompt, "")])
    assert found.cells == 22, "a cell that is edited twice is one"
    near = [one for one in found.neighbours if one.word == "the"]
    assert len(near) == 3
    for (other, _), one in zip(neighbours_of(subject, the, 3), near, strict=True):
        ids = torch.tensor([[other if token == the else token for token in subject.ids(prompt)]])
        before, after = (subject.model(ids, o)[0, -1].softmax(-1) for o in (None, subject.overlay(*edits)))
        assert one.moved == pytest.approx(float((after - before).abs().sum()) / 2, rel=1e-3)
    assert any(one.word == "ship" for one in found.neighbours), "the words that prompts hold come first"
    lead = judge(subject, [TopicEdit((ship,), 1)]).report().lead
    assert "1 edit of 0 cells, 1 of them topics, which multiply senses of every word." in lead


def test_a_judged_bias_reaches_prompts_and_held_out_text(subject: LabModel) -> None:
    the, ship = subject.token("the"), subject.token("ship")
    text = torch.tensor(
        (subject.ids("The captain of the ship saw the sea.") * 20)[: 2 * subject.config.n_positions + 1]
    )
    prompt = CanonicalExample("When the captain of", "the")
    lowered = judge(subject, [BiasEdit((the, ship), -2.0)], [prompt], text)
    never = judge(subject, [BiasEdit((the,), -math.inf)], [prompt], text)
    assert lowered.text is not None
    assert never.text is not None
    assert lowered.text.after > lowered.text.before
    assert math.isfinite(never.text.after)
    assert never.text.after > never.text.before
    before, after = lowered.prompts[0].before, lowered.prompts[0].after
    assert before is not None
    assert after is not None
    assert after / (1 - after) == pytest.approx(before / (1 - before) * math.exp(-2), rel=0.1)
    assert never.prompts[0].after == 0.0
    assert "and biases on 2 tokens. Held-out perplexity" in lowered.report().lead


def test_neighbours_are_the_nearest_in_mean_cosine(subject: LabModel) -> None:
    token = subject.token("king")
    vectors = subject.table.rows
    naive = {
        y: sum(float(torch.cosine_similarity(vectors[token, s], vectors[y, s], dim=0)) for s in range(4)) / 4
        for y in range(subject.config.tokens)
        if y != token
    }
    nearest = sorted(naive, key=naive.__getitem__)[::-1][:5]
    assert [y for y, _ in neighbours_of(subject, token, 5)] == nearest


def test_a_report_escapes_what_it_shows() -> None:
    report = Report("<b>", "a & b", (Table("t", ("x|y",), (("<script>",), (1.23456,), (None,))),), notes=("<i>",))
    html = report.html()
    assert "<script>" not in html.split("<body>")[1]
    assert "&lt;script&gt;" in html
    odd = ("a\nb", "<i>", "*x* `y` [z](w) &lt; _u_ \\", "p|q")
    report = replace(report, title="*", tables=(Table("t", ("x|y", *"abc"), (odd,)),), made_by="say `x`\n\ny")
    shown = MarkdownIt().enable("table").render(report.markdown())
    wanted = [escape(text.replace("\n", "↵"), quote=False) for text in (*odd, "x|y")]
    assert all(f">{text}</t" in shown for text in wanted), shown
    assert "<h1>*</h1>" in shown
    assert "<code>say `x`↵↵y</code>" in shown


def test_a_report_shows_numbers_to_its_digits() -> None:
    report = Report("r", "", (Table("t", ("x",), ((1.23456,), (None,))),))
    assert "| 1.235 |" in report.markdown()
    assert "| – |" in report.markdown()


def test_a_column_of_numbers_stands_right_with_its_heading() -> None:
    rows: tuple[tuple[Entry, ...], ...] = (("a", 3, "0.5%", "1%"), ("b", None, "12.25%", "none"))
    html = Report("r", "", (Table("t", ("word", "n", "share", "mixed"), rows),)).html()
    assert "<tr><th>word</th><th class=number>n</th><th class=number>share</th><th>mixed</th></tr>" in html
    assert "<tr><td>b</td><td class=number>–</td><td class=number>12.25%</td><td>none</td></tr>" in html
    assert "<th>word</th></tr></thead><tbody></tbody>" in Table("t", ("word",), ()).html()
