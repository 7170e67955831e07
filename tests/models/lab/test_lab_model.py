"""What the lab and the experiments compute with equals the reference model under the same overlay."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backpack_lm.config import BackpackConfig
from backpack_lm.lab.batch_sampler import BatchSampler, sample
from backpack_lm.lab.lab_model import LabModel, Prompts, SteeredModel
from backpack_lm.lab.progress import ResumeJournal
from backpack_lm.lab.text import background, both_parts, held_out, rows
from backpack_lm.lab.twin import read_twin
from backpack_lm.layouts import CheckpointError
from backpack_lm.model import TransformerTwin
from backpack_lm.patch import BiasEdit, Cell, Edit, PatchError, ScaleEdit, SwapEdit, TopicEdit
from backpack_lm.training.data import Rows
from backpack_lm.training.evaluation import perplexity
from backpack_lm.training.trainer import Recipe, Trainer

TEXTS = ("The king said that", "The nurse", "When the captain of the ship looked over the sea, he")


def _edits(subject: LabModel) -> dict[str, tuple[Edit, ...]]:
    king, ship, sea, land = map(subject.token, ("king", "ship", "sea", "land"))
    swap = SwapEdit(tuple(Cell(ship, s) for s in range(4)), sea, land)
    scale = ScaleEdit((Cell(king, 1), Cell(king, 2)), -2.0)
    return {
        "none": (),
        "sparse": (scale, swap),
        "topic": (scale, TopicEdit((sea, ship), 3)),
        "biases": (swap, TopicEdit((sea,), 2), BiasEdit((sea, land), 3.0), BiasEdit((king, 0), -math.inf)),
        "topics": (swap, TopicEdit((sea, ship), 2), TopicEdit((king,), 3, annealed=False)),
    }


@pytest.mark.parametrize("kind", ["none", "sparse", "topic", "topics", "biases"])
def test_prompts_of_unequal_length_equal_the_model(subject: LabModel, kind: str) -> None:
    overlay = subject.overlay(*_edits(subject)[kind])
    got = Prompts(subject, TEXTS).log_probabilities(overlay)
    for text, row in zip(TEXTS, got, strict=True):
        logits = subject.model(torch.tensor([subject.ids(text)]), overlay)[0, -1]
        torch.testing.assert_close(row, logits.double().log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["none", "sparse", "topic", "topics", "biases"])
def test_the_batch_sampler_and_the_steered_model_equal_the_model_at_every_position(
    subject: LabModel, kind: str
) -> None:
    overlay = subject.overlay(*_edits(subject)[kind])
    ids = torch.randint(1, subject.config.tokens, (3, 24), generator=torch.Generator().manual_seed(2))
    ids[:, 3], ids[:, 9] = subject.token("king"), subject.token("ship")
    expected = subject.model(ids, overlay)
    sampler = BatchSampler(subject, overlay, 3, 24)
    got = torch.stack([sampler.feed(column) for column in ids.t()], 1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    steered = SteeredModel(subject, overlay)
    torch.testing.assert_close(steered.mix(ids) @ steered.embedding.t(), expected, atol=1e-4, rtol=1e-4)
    assert kind == "none" or (expected - subject.model(ids)).abs().max() > 1e-2


def test_samples_are_seeded_and_a_bias_forces_a_token(subject: LabModel) -> None:
    overlay = subject.overlay(*_edits(subject)["topic"])
    one, again, other = (sample(subject, overlay, [0], 4, 10, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    bias = torch.zeros(subject.config.tokens)
    bias[7] = 1e4
    assert (sample(subject, overlay, [0], 2, 5, 0, bias) == 7).all()
    with pytest.raises(ValueError, match="the context holds 1 to 64"):
        sample(subject, overlay, [0], 1, 64, 0)


def test_perplexity_under_an_overlay(subject: LabModel) -> None:
    overlay = subject.overlay(*_edits(subject)["sparse"])
    ids = torch.randint(1, subject.config.tokens, (2 * 64 + 1,), generator=torch.Generator().manual_seed(4))
    ids[::7] = subject.token("king")
    logits = subject.model(torch.stack([ids[:64], ids[64:128]]), overlay)
    expected = F.cross_entropy(logits.flatten(0, 1), ids[1:])
    assert perplexity(SteeredModel(subject, overlay), ids) == pytest.approx(math.exp(expected), rel=1e-4)


def test_a_token_of_spaces_is_quoted(subject: LabModel) -> None:
    assert subject.shown(subject.token("king")) == "king"
    assert subject.shown(subject.tokenizer.encode("\n")[0]) == "'\\n'"


def test_edits_that_the_server_would_refuse_are_refused(subject: LabModel) -> None:
    with pytest.raises(PatchError, match="scaling by 1"):
        subject.overlay(ScaleEdit((Cell(3, 0),), 1.0))


def test_text_is_parted_as_training_parts_it(subject: LabModel, folder: Path, tmp_path: Path) -> None:
    kept, other = (list(part(folder / "corpus.jsonl")) for part in (held_out, background))
    assert len(kept) + len(other) == 400
    assert 0 < len(kept) < 20
    plain = tmp_path / "plain.txt"
    plain.write_text("".join(f"The king, line {n}.\n" for n in range(100)))
    first, last = "".join(background(plain)), "".join(held_out(plain))
    assert first + last == plain.read_text()
    assert last.startswith("The king, line 8")
    for text in ("The king. " * 100, "king" * 100):  # one line, one word
        plain.write_text(text)
        one, other = "".join(background(plain)), "".join(held_out(plain))
        assert one + other == text
        assert len(one) == pytest.approx(0.8 * len(text), abs=10)
    made = rows(subject, [first], 100, 16)
    assert made.shape == (6, 17)
    assert made[1, 0] == made[0, 16], "each row begins with the last target of the one before"
    with pytest.raises(ValueError, match="at least 65 are needed"):
        rows(subject, ["The king"], 100, 64)
    plain.write_text("The king. " * 100)
    with pytest.raises(ValueError, match=r"the held-out part of .*plain\.txt has \d+ tokens; at least 65"):
        both_parts(subject, plain, 100)
    plain.write_text("\n" + "The king." * 50)
    with pytest.raises(ValueError, match=r"the part of .*plain\.txt to stay close on has \d+ tokens"):
        both_parts(subject, plain, 100)


# ---- the Transformer to compare with


def test_a_gpt2_folder_is_a_twin(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=90, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    shape = BackpackConfig.gpt2(90, 16, 24, 2, 2, num_senses=4)
    ids = torch.randint(90, (2, 16))
    torch.testing.assert_close(read_twin(tmp_path, shape)(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(CheckpointError, match="vocabulary of 90, the Backpack one of 91"):
        read_twin(tmp_path, BackpackConfig.gpt2(91, 16, 24, 2, 2, num_senses=4))


def test_the_run_of_a_twin_is_a_twin_and_that_of_a_backpack_is_not(tmp_path: Path) -> None:
    config = BackpackConfig.gpt2(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, num_senses=4)
    recipe = Recipe(steps=1, tokens_per_step=32, tokens_per_pass=32, short_row=16)
    data = Rows([torch.randint(50, (200,)).numpy().astype("uint16")], [1.0], seed=0)
    for twin in (True, False):
        trainer = Trainer(config, recipe, data, tmp_path / str(twin), twin)
        list(trainer.run())
        if twin:
            found = read_twin(tmp_path / "True", config)
            assert isinstance(trainer.model, TransformerTwin)
            ids = torch.randint(50, (1, 16))
            torch.testing.assert_close(found(ids), trainer.model(ids))
    with pytest.raises(CheckpointError, match="run of a Backpack"):
        read_twin(tmp_path / "False", config)
    with pytest.raises(CheckpointError, match="no Transformer to compare with"):
        read_twin(tmp_path / "nothing", config)


# ---- stopped and taken up again


def test_a_journal_does_nothing_twice_and_forgets_what_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "work" / "journal.jsonl"
    first = ResumeJournal(file, {"seed": 1})
    assert first.once("a", lambda: [1.5, "x"]) == [1.5, "x"]
    first.once("b", lambda: {"n": 2})
    file.write_text(file.read_text()[:-4])  # killed while it wrote b
    second = ResumeJournal(file, {"seed": 1})
    assert second.once("a", lambda: pytest.fail("done already")) == [1.5, "x"]
    assert second.once("b", lambda: {"n": 3}) == {"n": 3}
    assert json.loads(file.read_text().splitlines()[-1]) == ["b", {"n": 3}]
    with pytest.raises(ValueError, match="work of other settings"):
        ResumeJournal(file, {"seed": 2})
    second.finish()
    assert not file.exists()


def test_a_journal_that_was_cut_off_anywhere_can_be_opened(tmp_path: Path) -> None:
    file, results = tmp_path / "journal.jsonl", {"a": [[1, 2], ["]"]], "b": [[3, [4]], [5]]}
    first = ResumeJournal(file, {"seed": [1]})
    for key, result in results.items():
        first.once(key, lambda result=result: result)  # type: ignore[misc]
    whole = file.read_text()
    ends = [at for at, character in enumerate(whole) if character == "\n"]
    for length in range(len(whole) + 1):
        file.write_text(whole[:length])
        again = ResumeJournal(file, {"seed": [1]})
        assert len(file.read_text().splitlines()) == max(1, sum(end <= length for end in ends))
        for key, result in results.items():
            assert again.once(key, lambda result=result: result) == result  # type: ignore[misc]
        assert file.read_text() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]
