"""Adapting a Transformer: what is learnt from, the losses, the run, and the model that comes out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backpack_lm import installed
from backpack_lm.adapting import adapter as adapters
from backpack_lm.adapting.lessons import Lessons
from backpack_lm.adapting.loss import distillation, expected_embedding
from backpack_lm.adapting.recipe import AdaptRecipe
from backpack_lm.adapting.student import LeastSquares, start_weights
from backpack_lm.adapting.trainer import AdaptTrainer, within
from backpack_lm.checkpoint import load, read_transformer, verify
from backpack_lm.kernels import Precision
from backpack_lm.layouts import CheckpointError
from backpack_lm.model import Trunk
from backpack_lm.tokenizer import Tokenizer
from backpack_lm.training.data import Rows, Source, train_tokenizer
from backpack_serving.cli.main import app
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

RECIPE = AdaptRecipe(
    steps=8, fresh=12, senses=5, sense_head=8, sense_theta=50.0, inner=20, row=24, rows_per_step=2, start_rows=12,
    tuned_layers=1, precision=Precision.FLOAT32,
)  # fmt: skip
TEXT = "The king of the ship and the queen of the court went down to the sea, and the ship was gone.\n"


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in Hugging Face's layout, with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("transformer")
    text = folder / "text.jsonl"
    words = TEXT.split()
    random = np.random.default_rng(0)
    text.write_text("".join(json.dumps({"text": " ".join(random.choice(words, 60))}) + "\n" for _ in range(600)))
    size = train_tokenizer([Source(text)], 300, folder / "tokenizer.json").vocab_size
    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def trunk_of(where: Path) -> Trunk:
    spec, tensors = read_transformer(where)
    trunk = Trunk(spec).requires_grad_(False)
    trunk.load_state_dict(tensors)
    return trunk


def trainer_of(where: Path, out: Path, recipe: AdaptRecipe = RECIPE) -> AdaptTrainer:
    trunk = trunk_of(where)
    size = trunk.spec.vocab_size
    random = np.random.default_rng(2)
    streams = [random.integers(1, size, 4000).astype(np.uint16) for _ in range(2)]
    rows = Rows(streams[:1], [1.0], recipe.seed, 0)
    config = recipe.config(trunk.spec, 0, size)
    return AdaptTrainer(trunk, trunk.wte.weight, config, recipe, rows, {"other": streams[1]}, out)


def test_the_loss_is_the_divergence_and_the_cross_entropy() -> None:
    """Value and gradient, against all logits of both in double."""
    torch.manual_seed(0)
    E = torch.randn(300, 16)
    teacher, o = torch.randn(600, 16), torch.randn(600, 16, requires_grad=True)
    targets = torch.randint(300, (600,))
    m, entropy = expected_embedding(teacher, E)
    means = distillation(o, m, targets, E, 0.3)
    means[0].backward()
    ours, o.grad = o.grad, None
    p, logits = (teacher @ E.t()).double().softmax(-1), (o.double() @ E.double().t())
    divergence = F.kl_div(logits.log_softmax(-1), p, reduction="batchmean")
    cross = F.cross_entropy(logits, targets)
    torch.testing.assert_close(means[0] - entropy.mean(), divergence.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(means[1], cross.float(), rtol=1e-5, atol=1e-6)
    (divergence + 0.3 * cross).backward()
    torch.testing.assert_close(ours, o.grad, rtol=1e-3, atol=1e-7)


def test_lessons_are_what_the_transformer_makes_of_the_rows(where: Path, tmp_path: Path) -> None:
    trunk = trunk_of(where)
    rows = Rows([np.arange(1, 200, dtype=np.uint16)], [1.0], 0)
    lessons = Lessons(trunk, trunk.wte.weight, [2, 4], rows, 0, 6, 20, tmp_path)
    lesson = lessons.take([3, 4, 1])
    assert lesson.ids[1, 0] == 0  # every second row begins with the end-of-text token
    assert (lesson.ids[[0, 2], 0] != 0).all()
    states = list(trunk.states(lesson.ids))
    for at, layer in enumerate((2, 4)):
        torch.testing.assert_close(lesson.states[:, :, at].float(), states[layer], rtol=0.01, atol=0.01)
    p = (states[4] @ trunk.wte.weight.t()).softmax(-1)
    torch.testing.assert_close(lesson.expected.float(), p @ trunk.wte.weight, rtol=0.01, atol=0.01)
    trunk.h = torch.nn.ModuleList()  # it is needed no more
    again = Lessons(trunk, trunk.wte.weight, [2, 4], rows, 0, 6, 20, tmp_path).take([1, 4, 3])
    assert torch.equal(again.states, lesson.states.flip(0))
    assert torch.equal(again.entropy, lesson.entropy.flip(0))


def test_senses_begin_by_reading_one_place_or_a_stretch(where: Path, tmp_path: Path) -> None:
    student = trainer_of(where, tmp_path, replace(RECIPE, senses=8, sense_head=64, sense_theta=10_000.0)).student
    start_weights(student.weights, 10_000.0)
    for linear in (student.weights.c_query, student.weights.c_key):
        linear.weight.data.zero_()
    with torch.no_grad():
        alpha = student.alpha(torch.zeros(1, 40, len(student.layers), 32), tune=False)[0]
    for sense in range(4):
        assert alpha[sense, 39].argmax() == 39 - sense
        assert alpha[sense, 39].max() > 0.5
    widths = [float((alpha[sense, 39] * torch.arange(39, -1, -1)).sum()) for sense in range(4, 8)]
    assert widths == sorted(widths)


def test_the_first_senses_are_the_least_squares(where: Path, tmp_path: Path) -> None:
    trainer = trainer_of(where, tmp_path)
    list(trainer.start())
    student, lesson = trainer.student, trainer.lessons.take(range(12))
    alpha = student.alpha(lesson.states, tune=False)
    words = student.words[lesson.ids, -1].float()
    inputs = torch.einsum("bkij,bjd->bikd", alpha, words).flatten(2).flatten(0, 1)
    wanted = lesson.states[:, :, -1].float().flatten(0, 1)
    ridge = 1e-3 * inputs.square().sum(0).mean()
    solved = torch.linalg.solve(inputs.t() @ inputs + ridge * torch.eye(inputs.shape[1]), inputs.t() @ wanted)
    torch.testing.assert_close(student(lesson.ids, lesson.states).flatten(0, 1), inputs @ solved, rtol=0.01, atol=0.01)
    once = LeastSquares(student)
    once.add(lesson.ids[:6], lesson.states[:6])
    once.add(lesson.ids[6:], lesson.states[6:])
    before = student.senses.direct.weight.clone()
    once.solve()
    torch.testing.assert_close(student.senses.direct.weight, before, rtol=0.01, atol=0.01)


def test_a_run_comes_nearer_to_the_original(where: Path, tmp_path: Path) -> None:
    trainer = trainer_of(where, tmp_path, replace(RECIPE, steps=60, matrix_lr=0.02, lr=0.01))
    first = trainer.held_out()["other"]  # senses of which nobody has made anything
    steps = list(trainer.run())
    assert steps[-1].divergence < 0.5 * steps[0].divergence
    assert trainer.held_out()["other"].original == first.original
    assert abs(first.original - first.backpack) > 0.01


def test_a_run_goes_on_where_it_stopped(where: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=40)
    whole = trainer_of(where, tmp_path / "whole", recipe)
    list(whole.start())
    list(whole.run())
    stopped = trainer_of(where, tmp_path / "stopped", recipe)
    list(stopped.start())
    run = stopped.run()
    for _ in range(30):  # into the part that trains the trunk
        next(run)
    stopped.save()
    again = trainer_of(where, tmp_path / "stopped", recipe)
    assert again.step == 30
    assert list(again.start()) == []
    list(again.run())
    for (name, one), other in zip(whole.student.named_parameters(), again.student.parameters(), strict=True):
        assert torch.equal(one, other), name
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    with pytest.raises(ValueError, match="made by another recipe"):
        trainer_of(where, tmp_path / "stopped", replace(recipe, lr=1e-5))


def test_only_the_uppermost_layers_are_trained_and_only_in_the_end(where: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, tuned_share=0.25)
    trainer, original = trainer_of(where, tmp_path, recipe), trunk_of(where)
    list(trainer.start())
    run = trainer.run()
    for _ in range(6):
        next(run)
    assert all(map(torch.equal, trainer.student.upper.parameters(), original.h[3:].parameters()))
    list(run)
    assert not any(map(torch.equal, trainer.student.upper.parameters(), original.h[3:].parameters()))
    ids = torch.arange(10)[None]
    assert torch.equal(trainer._trunk(ids), original(ids))  # what lessons are made by


def test_a_row_is_taken_once_each_time_through(where: Path, tmp_path: Path) -> None:
    trainer = trainer_of(where, tmp_path)
    numbers = [number for step in range(18) for number in trainer.numbers(step)]
    assert numbers[:12] == list(range(12))
    assert sorted(numbers[12:24]) == sorted(numbers[24:36]) == list(range(12))
    assert numbers[12:24] != numbers[24:36]


@pytest.mark.parametrize("tuned", [0, 2])
def test_the_model_is_what_was_trained(where: Path, tmp_path: Path, tuned: int) -> None:
    """The student's o, within what int8 leaves of its matrices and senses."""
    recipe = replace(RECIPE, tuned_layers=tuned)
    trainer = trainer_of(where, tmp_path / "run", recipe)
    list(trainer.start())
    list(trainer.run())
    adapters.write_adapter(trainer.student, where, where / "tokenizer.json", tmp_path / "adapter")
    (tmp_path / "model").mkdir()
    done: list[int] = []
    manifest = adapters.assemble(tmp_path / "adapter", where, tmp_path / "model", lambda count, of: done.append(count))
    assert verify(tmp_path / "model").fingerprint == manifest.fingerprint
    model = load(tmp_path / "model")
    assert done[-1] == model.config.vocab_size
    lesson = trainer.lessons.take([0, 1])
    own = trainer.student(lesson.ids, lesson.states, tune=tuned > 0)
    assert (model.mix(lesson.ids) - own).norm() < 0.05 * own.norm()
    assert Tokenizer.read(tmp_path / "model" / "tokenizer.json").vocab_size == model.config.vocab_size


def test_an_adapter_is_for_one_transformer(where: Path, tmp_path: Path) -> None:
    trainer = trainer_of(where, tmp_path / "run")
    adapters.write_adapter(trainer.student, where, where / "tokenizer.json", tmp_path / "adapter")
    other = tmp_path / "other"
    other.mkdir()
    for file in where.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text((where / "config.json").read_text().replace("32", "16"))
    with pytest.raises(CheckpointError, match=r"has SHA-256 .*was made for "):
        adapters.assemble(tmp_path / "adapter", other, tmp_path)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        adapters.assemble(tmp_path, where, tmp_path)


def test_steps_fit_into_a_budget() -> None:
    recipe = replace(RECIPE, tuned_share=0.5, rows_per_step=8)
    fitted = within(recipe, 100.0, (1.0, 2.0, 2.0), most_fresh=10**6)
    assert fitted.fresh * 1.0 / 8 + fitted.steps * 3.0 <= 100.0 + 3.0
    assert fitted.steps / (fitted.fresh / 8) == pytest.approx(3, rel=0.1)
    little = within(recipe, 100.0, (1.0, 2.0, 2.0), most_fresh=16)
    assert little.fresh == 16
    assert little.steps > fitted.steps
    assert within(recipe, 0.1, (1.0, 2.0, 2.0), 100).steps == 1


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"steps": 1}, "has no fresh"),
        ({"steps": 1, "fresh": 1, "learning_rate": 1}, "has learning_rate; a recipe has clip"),
        ({"steps": 0, "fresh": 1}, "steps is 0; it must be an integer from 1 on"),
        ({"steps": 1, "fresh": 1, "decay": 2.0}, "decay is 2.0; it is a share of the steps"),
    ],
)
def test_what_a_recipe_cant_be_is_named(tmp_path: Path, values: dict[str, object], why: str) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=why):
        AdaptRecipe.read(tmp_path / "recipe.json")


def test_recipes_come_back_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE.to_json()))
    assert AdaptRecipe.read(tmp_path / "recipe.json") == RECIPE
    assert AdaptRecipe.read(tmp_path / "recipe.json", seed=3) == replace(RECIPE, seed=3)


def test_the_command_makes_a_model_and_resumes(where: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = {**RECIPE.to_json(), "steps": 4, "precision": "float32"}
    (tmp_path / "recipe.json").write_text(json.dumps(small))
    words = ["adapt", str(where), str(where / "text.jsonl"), "--out", str(out), "--threads", "1"]
    result = CliRunner().invoke(app, [*words, "--recipe", str(tmp_path / "recipe.json")])
    assert result.exit_code == 0, result.output
    assert "held-out text: " in result.stderr
    manifest = verify(out / "model")
    assert (out / "loss.svg").read_text().startswith("<?xml")
    again = CliRunner().invoke(app, words)  # finished: nothing to do but to write the model again
    assert again.exit_code == 0, again.output
    assert verify(out / "model") == manifest
    for more, why in (
        (["--budget", "10"], "--budget '10': write a number and s, m or h"),
        (["--budget", "0m"], "--budget '0m': write a number and s, m or h"),
    ):
        refused = CliRunner().invoke(app, [*words, *more])
        assert refused.exit_code == 1
        assert why in refused.stderr
    nothing = CliRunner().invoke(app, [*words[:3], "--out", str(tmp_path / "new")])
    assert "say how long it may take with --budget" in nothing.stderr
    missing = CliRunner().invoke(app, ["adapt", "no/such", *words[2:]])
    assert missing.exit_code == 1
    assert "no/such is no folder or file here: the hub " in missing.stderr


def test_a_budget_chooses_the_steps(where: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "recipe.json").write_text(json.dumps({**RECIPE.to_json(), "steps": 1, "fresh": 1}))
    words = ["adapt", str(where), str(where / "text.jsonl"), "--out", str(out), "--threads", "1", "--budget", "3s"]
    result = CliRunner().invoke(app, [*words, "--recipe", str(tmp_path / "recipe.json"), "--disk", "0.1"])
    assert result.exit_code == 0, result.output
    chosen = AdaptRecipe.read(out / "recipe.json")
    assert chosen.steps > 5
    assert math.isclose(chosen.lr, RECIPE.lr)
    assert f"{chosen.steps} steps on {chosen.fresh} rows" in result.stderr.replace("\n", " ")


def test_a_model_that_comes_as_an_adapter_is_installed_once(
    where: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, weights = trainer_of(where, tmp_path / "run"), tmp_path / "weights"
    adapters.write_adapter(trainer.student, where, where / "tokenizer.json", weights / "small")
    (weights / "small" / "generation_config.json").write_text('{"temperature": 0.5}')
    monkeypatch.setattr(installed, "weights", lambda: weights)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = CliRunner(env={"BACKPACK_MODEL": "small"}).invoke
    assert "`backpack model install small`" in run(app, ["model", "list"]).output
    refused = run(app, ["model", "verify"])
    assert refused.exit_code == 1
    assert "`backpack model install NAME`" in refused.stderr
    for words, why in (
        (["small"], "transformer.json doesn't say where its Transformer comes from"),
        (["large"], "no model is called `large`: small"),
        (["small", "--transformer", str(tmp_path / "run" / "kept" / "rows" / "made.bin")], "has SHA-256"),
    ):
        refused = run(app, ["model", "install", *words])
        assert refused.exit_code == 1
        assert why in refused.stderr
    assert not list((tmp_path / "cache" / "backpack" / "models").glob("small-*"))
    done = run(app, ["model", "install", "small", "--transformer", str(where)])
    assert done.exit_code == 0, done.output
    folder = installed.folder_of("small")
    assert verify(folder).defaults.temperature == 0.5
    assert str(folder) in "".join(run(app, ["model", "list"]).output.split())  # it is folded
    assert "small is installed" in run(app, ["model", "install", "small"]).output
    assert "intact" in run(app, ["model", "verify", "small"]).output


def test_a_damaged_table_or_adapter_is_refused(where: Path, tmp_path: Path) -> None:
    trainer = trainer_of(where, tmp_path / "run")
    adapters.write_adapter(trainer.student, where, where / "tokenizer.json", tmp_path / "adapter")
    (tmp_path / "model").mkdir()
    adapters.assemble(tmp_path / "adapter", where, tmp_path / "model")
    (table,) = (tmp_path / "model").glob("senses-*")
    table.write_bytes(table.read_bytes()[:-1] + b"\x05")
    with pytest.raises(CheckpointError, match=r"senses-.* isn't its manifest's"):
        verify(tmp_path / "model")
    (part,) = (tmp_path / "adapter").glob("adapter-*")
    part.write_bytes(part.read_bytes()[:-1] + b"\x05")
    with pytest.raises(CheckpointError, match=r"isn't the one that adapter.json names"):
        adapters.assemble(tmp_path / "adapter", where, tmp_path / "other")


def test_the_fingerprint_is_over_what_the_table_is_computed_from(where: Path, tmp_path: Path) -> None:
    """Another processor rounds otherwise: the model is the same one."""
    trainer = trainer_of(where, tmp_path / "run")
    list(trainer.start())
    adapters.write_adapter(trainer.student, where, where / "tokenizer.json", tmp_path / "adapter")
    models = []
    for name, chunk in (("one", 64), ("other", 7)):
        (tmp_path / name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapters, "CHUNK", chunk)
            models.append(adapters.assemble(tmp_path / "adapter", where, tmp_path / name))
    assert models[0].fingerprint == models[1].fingerprint
    assert models[0].origin == models[1].origin is not None
