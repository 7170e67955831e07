"""Training: resumable to the bit, and a loss that is the loss."""

from __future__ import annotations

import json
import lzma
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backpack_lm.checkpoint import load, verify
from backpack_lm.config import BackpackConfig
from backpack_lm.installed import folder_of
from backpack_lm.model import Backpack, TransformerTwin
from backpack_lm.tokenizer import Tokenizer
from backpack_lm.training.data import DataError, Rows, Source, encode, stream, train_tokenizer
from backpack_lm.training.evaluation import perplexity
from backpack_lm.training.loss import head_loss
from backpack_lm.training.muon import BlockMuon, matrices
from backpack_lm.training.trainer import Recipe, Trainer
from backpack_serving.cli.main import app
from backpack_serving.install import install_command
from typer.testing import CliRunner

from tests.models.trunk_shapes import FAMILIES

CONFIG = BackpackConfig.gpt2(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_senses=4)
RECIPE = Recipe(steps=6, tokens_per_step=128, tokens_per_pass=64, short_row=16)


def test_the_chunked_loss_is_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(700, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    targets = torch.randint(300, (700,))
    loss = head_loss(hidden, head, targets)
    (loss * 0.5).backward()
    ours = hidden.grad, head.grad
    hidden.grad = head.grad = None
    expected = F.cross_entropy(hidden @ head.t(), targets)
    (expected * 0.5).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, (hidden.grad, head.grad))


def test_the_loss_in_bfloat16_is_near_that_in_float32() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(70, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    targets = torch.randint(300, (70,))
    exact, near = (head_loss(hidden, head, targets, dtype) for dtype in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(near, exact, rtol=2e-3, atol=0)
    wanted, got = (torch.autograd.grad(loss, [hidden, head]) for loss in (exact, near))
    for a, b in zip(wanted, got, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).norm() / a.norm() < 1e-2


@pytest.mark.parametrize("twin", [False, True])
def test_muon_orthogonalises_each_matrix_of_a_weight_by_itself(twin: bool) -> None:
    torch.manual_seed(0)
    model = TransformerTwin(CONFIG) if twin else Backpack(CONFIG)
    muon = BlockMuon(matrices(model), lr=0.1, weight_decay=0.01)
    names = {id(weight): name for name, weight in model.named_parameters()}
    split = {names[id(weight)]: (dim, count) for weight, dim, count in muon.weights}
    assert split["gpt2_model.h.0.attn.c_attn.weight"] == (1, 3)
    if not twin:
        assert split["sense_weight_net.c_attn.weight"] == (0, 2)
        assert split["sense_network.final_mlp.c_proj.weight"] == (1, CONFIG.num_senses)
    assert not any("wte" in name or "wpe" in name or "bias" in name for name in split)
    apart = {
        name: [part.detach().clone() for part in weight.chunk(split[name][1], split[name][0])]
        for weight, name in ((w, names[id(w)]) for w, _, _ in muon.weights)
    }
    plain = torch.optim.Muon(
        [part for parts in apart.values() for part in parts], 0.1, 0.01, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for weight, dim, count in muon.weights:
            weight.grad = torch.randn_like(weight)
            for part, gradient in zip(apart[names[id(weight)]], weight.grad.chunk(count, dim), strict=True):
                part.grad = gradient.clone()
        muon.step()
        plain.step()
    for name, weight in model.named_parameters():
        if name in apart:
            torch.testing.assert_close(weight.detach(), torch.cat(apart[name], split[name][0]))


@pytest.fixture
def rows() -> Rows:
    ids = torch.randint(300, (5000,), generator=torch.Generator().manual_seed(0)).numpy().astype("uint16")
    return Rows([ids, ids[::-1].copy()], [3, 1], seed=0)


@pytest.mark.parametrize("twin", [False, True])
def test_a_run_that_was_stopped_ends_as_if_it_never_was(rows: Rows, tmp_path: Path, twin: bool) -> None:
    whole = Trainer(CONFIG, RECIPE, rows, tmp_path / "whole", twin)
    losses = [step.loss for step in whole.run()]
    first = Trainer(CONFIG, RECIPE, rows, tmp_path / "stopped", twin)
    for step in first.run(save_every=2):
        if step.step == 3:  # one step after the last save
            break
    second = Trainer(CONFIG, RECIPE, rows, tmp_path / "stopped", twin)
    assert second.step == 2
    assert [step.loss for step in second.run()] == losses[2:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="another recipe"):
        Trainer(CONFIG, Recipe(steps=7), rows, tmp_path / "whole", twin)


def test_a_run_goes_on_with_the_text_that_it_began_with(rows: Rows, tmp_path: Path) -> None:
    next(Trainer(CONFIG, RECIPE, rows, tmp_path, False).run(save_every=1))
    one, two = rows.streams
    for other in (
        Rows([one, two], [3, 1], 0, names=["0", "other"]),
        Rows([one, two], [1, 1], 0),
        Rows([one, two[:-1]], [3, 1], 0),
        Rows([one], [1], 0),
    ):
        with pytest.raises(ValueError, match="from other text"):
            Trainer(CONFIG, RECIPE, other, tmp_path, False)
    assert Trainer(CONFIG, RECIPE, Rows([one, two], [6, 2], 0), tmp_path, False).step == 1
    state = torch.load(tmp_path / "checkpoint.pt")
    made_by = json.loads(state["made_by"])
    del made_by["text"]  # as an earlier version left it
    torch.save({**state, "made_by": json.dumps(made_by)}, tmp_path / "checkpoint.pt")
    assert Trainer(CONFIG, RECIPE, rows, tmp_path, False).step == 1


def test_a_run_begins_with_the_weights_of_the_run_that_it_comes_after(rows: Rows, tmp_path: Path) -> None:
    first = Trainer(CONFIG, RECIPE, rows, tmp_path / "first", False)
    next(steps := first.run(save_every=1))
    with pytest.raises(ValueError, match="has taken 1 of 6 steps: finish it first"):
        Trainer(CONFIG, RECIPE, rows, tmp_path / "second", False, tmp_path / "first")
    list(steps)
    second = Trainer(CONFIG, RECIPE, rows, tmp_path / "second", False, tmp_path / "first")
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    next(second.run(save_every=1))
    stopped = Trainer(CONFIG, RECIPE, rows, tmp_path / "second", False, tmp_path / "first")
    assert stopped.step == 1
    assert torch.equal(stopped.model.embedding, second.model.embedding)
    assert not torch.equal(stopped.model.embedding, first.model.embedding)
    with pytest.raises(ValueError, match="another recipe"):
        Trainer(CONFIG, RECIPE, rows, tmp_path / "second", False)
    with pytest.raises(ValueError, match="has twin False, this run True"):
        Trainer(CONFIG, RECIPE, rows, tmp_path / "third", True, tmp_path / "first")
    with pytest.raises(ValueError, match=r"no checkpoint.pt to begin after"):
        Trainer(CONFIG, RECIPE, rows, tmp_path / "third", False, tmp_path / "nowhere")


def test_perplexity_of_a_uniform_model_is_the_vocabulary() -> None:
    model = TransformerTwin(CONFIG)
    torch.nn.init.zeros_(model.embedding)
    assert perplexity(model, torch.randint(300, (200,))) == pytest.approx(300)
    with pytest.raises(ValueError, match="at least 33"):
        perplexity(model, torch.randint(300, (32,)))


def test_a_model_learns(rows: Rows, tmp_path: Path) -> None:
    pattern = torch.arange(5000).remainder(7).numpy().astype("uint16")
    recipe = Recipe(steps=400, tokens_per_step=128, lr=3e-2, matrix_lr=2e-2)
    trainer = Trainer(CONFIG, recipe, Rows([pattern], [1], 0), tmp_path, False)
    losses = [step.loss for step in trainer.run()]
    assert losses[0] == pytest.approx(math.log(300), abs=0.3)
    assert losses[-1] < 0.5


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    words = "the king and the queen went down to the sea and the ship was lost in the storm".split()
    lines = [
        json.dumps({"text": f"Story {n}. " + " ".join(words[(n * k) % len(words)] for k in range(60))})
        for n in range(400)
    ]
    path = tmp_path / "tales.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_command_trains_a_model_that_can_be_served(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    sizes = "--layers 2 --heads 2 --width 32 --senses 4 --context 32 --vocabulary 300 --tokens-per-step 256".split()
    command = ["train", str(corpus), "--out", str(out), "--steps", "4", *sizes]
    for _ in range(2):  # the second finds everything done
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, [*command, "--twin"]).exit_code == 0
    assert verify(out / "model").config.num_senses == 4
    assert isinstance(load(out / "model"), Backpack)
    assert {p.name for p in out.glob("*")} >= {"loss.svg", "model", "backpack", "twin"}
    assert json.loads((out / "backpack" / "perplexity.json").read_text())["tales"] > 1
    more = ["--after", str(out), "--out", str(tmp_path / "more"), "--seed", "1"]
    result = CliRunner().invoke(app, [*command, *more])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "more/data/tokenizer.json").read_text() == (out / "data/tokenizer.json").read_text()
    assert (tmp_path / "more/loss.svg").exists()
    for again, refusal in (
        (["--after", str(tmp_path), "--out", str(tmp_path / "other")], "is no run to begin after"),
        (["--after", str(out), "--out", str(tmp_path / "other")], "isn't the tokenizer of"),
    ):
        result = CliRunner().invoke(app, [*command, *again])
        assert result.exit_code == 1
        assert refusal in " ".join(result.output.split())
        (tmp_path / "other/data/tokenizer.json").write_text("{}")


def test_the_command_trains_a_trunk_of_another_family(corpus: Path, tmp_path: Path) -> None:
    llama = FAMILIES["llama, grouped heads"].with_vocabulary(300, None)
    (tmp_path / "config.json").write_text(json.dumps(llama.to_json()))
    command = ["train", str(corpus), "--out", str(tmp_path / "run"), "--steps", "2", "--tokens-per-step", "64"]
    result = CliRunner().invoke(app, [*command, "--config", str(tmp_path / "config.json")])
    assert result.exit_code == 0, result.output
    made = load(tmp_path / "run" / "model").config
    assert made.trunk == replace(llama.trunk, vocab_size=made.vocab_size)
    (tmp_path / "config.json").write_text("{}")
    result = CliRunner().invoke(app, [*command, "--config", str(tmp_path / "config.json")])
    assert "config lacks n_embd, n_head, n_layer" in " ".join(result.output.split())


def test_a_loss_that_is_no_number_is_one_line(corpus: Path, tmp_path: Path) -> None:
    sizes = "--layers 1 --heads 2 --width 16 --senses 2 --context 32 --vocabulary 300 --tokens-per-step 64".split()
    rates = "--lr 1e30 --matrix-lr 1e30 --precision float32".split()
    command = ["train", str(corpus), "--out", str(tmp_path / "run"), "--steps", "9", *sizes, *rates]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, SystemExit), "no traceback"
    assert result.exit_code == 1
    assert "lower the learning rates" in " ".join(result.output.split())


def test_what_a_run_cannot_be_is_refused_before_any_work(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(code: int, *options: str) -> str:
        words = ["train", str(corpus), "--out", str(tmp_path / "run"), "--steps", "2", *options]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == code, result.output
        assert not (tmp_path / "run").exists(), options
        return " ".join(result.output.split())

    for option in ("--tokens-per-step=0", "--vocabulary=-5", "--vocabulary=65537", "--threads=-1", "--lr=nan"):
        assert f"'{option.partition('=')[0]}'" in refused(2, option)
    assert "n_embd 192 does not divide into n_head 5 heads" in refused(1, "--heads", "5")
    assert "'x' is not one of 'auto'" in refused(2, "--precision", "x")
    monkeypatch.delitem(sys.modules, "backpack_lm.training.curve", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert f"this needs matplotlib.figure: {install_command('train')}" in refused(1)


def test_a_source_that_fills_no_row_is_named_before_any_step(rows: Rows, tmp_path: Path) -> None:
    short = Rows([rows.streams[0], rows.streams[1][:32]], [1, 1], 0, names=["long", "short"])
    with pytest.raises(DataError, match="short has 32 tokens to train on; a row takes 33"):
        Trainer(CONFIG, RECIPE, short, tmp_path, False)


def test_a_run_does_not_go_on_with_another_file_of_the_same_name(corpus: Path, tmp_path: Path) -> None:
    sizes = "--layers 1 --heads 2 --width 16 --senses 2 --context 32 --vocabulary 300 --tokens-per-step 64".split()
    command = ["train", str(corpus), "--out", str(tmp_path / "run"), "--steps", "2", *sizes]
    assert CliRunner().invoke(app, command).exit_code == 0
    text = corpus.read_text()
    corpus.write_text(text.replace("Story", "Tales"))
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "holds the tokens of a tales.jsonl with other content" in " ".join(result.output.split())
    corpus.write_text(text)
    assert CliRunner().invoke(app, command).exit_code == 0
    corpus.write_text("")
    (tmp_path / "run" / "data" / "tales.sha256").unlink()  # as an earlier version left it
    assert CliRunner().invoke(app, command).exit_code == 0


@pytest.mark.parametrize("left", [0, 100])
def test_a_damaged_checkpoint_is_named(rows: Rows, tmp_path: Path, left: int) -> None:
    next(Trainer(CONFIG, RECIPE, rows, tmp_path, False).run(save_every=1))
    (tmp_path / "checkpoint.pt").write_bytes((tmp_path / "checkpoint.pt").read_bytes()[:left])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        Trainer(CONFIG, RECIPE, rows, tmp_path, False)


@pytest.mark.parametrize("held", [0, 1])
def test_a_corpus_too_small_to_be_judged_on_is_trained(tmp_path: Path, held: int) -> None:
    path, out = tmp_path / "few.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps({"text": f"Story {n} of the sea."}) + "\n" for n in range(400)))
    kept, aside = ([text for text, part in Source(path).records() if part is wanted] for wanted in (False, True))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in kept + aside[:held]))
    sizes = "--layers 1 --heads 2 --width 16 --senses 2 --context 64 --vocabulary 300 --tokens-per-step 64".split()
    result = CliRunner().invoke(app, ["train", str(path), "--out", str(out), "--steps", "2", *sizes])
    assert result.exit_code == 0, result.output
    assert verify(out / "model").config.num_senses == 2
    assert "held-out perplexity, few: none, fewer than 65 tokens are held out" in " ".join(result.output.split())
    assert json.loads((out / "backpack" / "perplexity.json").read_text()) == {}
    assert (out / "loss.svg").exists()


def test_held_out_text_is_not_trained_on(corpus: Path, tmp_path: Path) -> None:
    source = Source.parse(f"{corpus}:2")
    assert (source.name, source.share) == ("tales", 2.0)
    tokenizer = train_tokenizer([source], 300, tmp_path / "t.json")
    assert list(encode(source, tokenizer, tmp_path))[-1] == 1.0
    held_out = [text for text, held in source.records() if held]
    assert 0 < len(held_out) < 40
    train = tokenizer.decode(stream(source, tmp_path, "train").tolist())
    assert tokenizer.decode(stream(source, tmp_path, "heldout").tolist()).count("Story") == len(held_out)
    assert not any(text in train for text in held_out)


def test_long_texts_are_parted_into_passages_between_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"{n} " + "and so on and on " * 20 for n in range(100)]
    path = tmp_path / "book.jsonl"
    path.write_text(json.dumps({"text": "\n\n".join(paragraphs)}) + "\n")
    source = Source.parse(str(path))
    tokenizer = train_tokenizer([source], 300, tmp_path / "t.json")
    assert list(encode(source, tokenizer, tmp_path)) == [1.0]
    ids, end = stream(source, tmp_path, "train"), tokenizer.end_of_text
    assert end is not None
    first, *passages = tokenizer.decode(ids.tolist()).split("<|endoftext|>")
    assert first == ""
    assert "".join(passages) == "\n\n".join(paragraphs)
    assert 2 < len(passages) < 100
    assert all(passage.endswith("\n\n") for passage in passages[:-1])
    found = Rows([ids], [1], 0, end).at(0, 400, 16)[:, 0] == end
    assert 60 < found.sum() < 160  # a quarter of the rows
    with pytest.raises(DataError, match="a row takes 100001"):
        Rows([ids], [1], 0, end).check(100_000)


@pytest.mark.parametrize("names", [("a/notes.jsonl", "b/notes.jsonl:2"), ("books.v1.jsonl", "books.v2.jsonl.xz")])
def test_two_sources_of_one_name_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["train", *names, "--out", str(out), "--steps", "1"])
    assert result.exit_code == 1
    assert f"{names[0]} and {names[1].removesuffix(':2')} are both called" in " ".join(result.output.split())
    assert not out.exists()


def test_a_bad_record_is_named_by_its_line(tmp_path: Path) -> None:
    many = (
        '{"input_ids": 5}',
        '{"input_ids": [0.5]}',
        '{"input_ids": [-1]}',
        '{"input_ids": "a"}',
        '{"input_ids": [1]}',
    )
    for bad in ('{"no": 1}', '{"text": 5}', '{"text": "\\ud800"}', "3", *many):
        (tmp_path / "bad.jsonl").write_text(f'{{"text": "a"}}\n{bad}\n')
        with pytest.raises(DataError, match=r"bad\.jsonl:2"):
            list(Source.parse(str(tmp_path / "bad.jsonl")).records())
    for share in ("x:nan", "x:-1", "x:y"):
        with pytest.raises(DataError):
            Source.parse(share)


def test_a_record_may_be_tokenised_already(tmp_path: Path) -> None:
    tokenizer = Tokenizer.read(folder_of("micro") / "tokenizer.json")
    ids = [[5, 0, 7 + n] for n in range(200)]
    for name, records in (("a", ids), ("b", [[1], [9, tokenizer.vocab_size]])):
        lines = [json.dumps({"input_ids": each}) + "\n" for each in records]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    source = Source(tmp_path / "a.jsonl")
    assert list(encode(source, tokenizer, tmp_path))[-1] == 1
    streams = {part: stream(source, tmp_path, part).tolist() for part in ("train", "heldout")}
    held_out = {tuple(each) for each, held in source.contents() if held}
    assert 0 < len(held_out) < 20
    for part, wanted in (("heldout", True), ("train", False)):
        expected = [[tokenizer.end_of_text, *each] for each in ids if (tuple(each) in held_out) is wanted]
        assert streams[part] == [token for each in expected for token in each]
    with pytest.raises(DataError, match=r"b\.jsonl:2: its input_ids aren't all below the tokenizer's 16384"):
        list(encode(Source(tmp_path / "b.jsonl"), tokenizer, tmp_path))


def test_a_file_that_is_cut_off_or_of_another_kind_is_named(tmp_path: Path) -> None:
    whole = lzma.compress(b'{"text": "a"}\n' * 1000)
    for name, content in (("a.jsonl.xz", whole[:-20]), ("b.jsonl.xz", b"no xz"), ("c.jsonl", b'{"text": "\xff"}')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} can't be read to its end"):
            list(Source(tmp_path / name).records())
