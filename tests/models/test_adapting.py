"""Adapting a Transformer: what is learnt from, the losses, the run, and the model that comes out."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backpack_lm.adapting import adapter as adapters
from backpack_lm.adapting.loss import distillation, expected_embedding
from backpack_lm.adapting.recipe import AdaptRecipe
from backpack_lm.adapting.student import LeastSquares, start_weights
from backpack_lm.adapting.teacher_cache import TeacherCache
from backpack_lm.adapting.trainer import AdaptTrainer, StepCosts, Teacher, fit_to_budget
from backpack_lm.adapting.words import word_states
from backpack_lm.checkpoint import load, read_trunk, verify
from backpack_lm.model import Trunk
from backpack_lm.tokenizer import Tokenizer
from backpack_lm.training.data import Rows
from backpack_serving.cli.main import app
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.models.adapting_run import RECIPE, trainer_of
from tests.models.trunk_shapes import FAMILIES


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


def test_the_cache_holds_what_the_teacher_makes_of_the_rows(where: Path, tmp_path: Path) -> None:
    trunk, _ = read_trunk(where)
    rows = Rows([np.arange(1, 200, dtype=np.uint16)], [1.0], 0)
    cache = TeacherCache(trunk, trunk.wte.weight, [2, 4], rows, 0, 6, 20, tmp_path)
    batch = cache.take([3, 4, 1])
    assert batch.ids[1, 0] == 0  # every second row begins with the end-of-text token
    assert (batch.ids[[0, 2], 0] != 0).all()
    states = list(trunk.states(batch.ids))
    for at, layer in enumerate((2, 4)):
        torch.testing.assert_close(batch.states[:, :, at].float(), states[layer], rtol=0.01, atol=0.01)
    p = (states[4] @ trunk.wte.weight.t()).softmax(-1)
    torch.testing.assert_close(batch.expected.float(), p @ trunk.wte.weight, rtol=0.01, atol=0.01)
    trunk.h = torch.nn.ModuleList()  # it is needed no more
    again = TeacherCache(trunk, trunk.wte.weight, [2, 4], rows, 0, 6, 20, tmp_path).take([1, 4, 3])
    assert torch.equal(again.states, batch.states.flip(0))
    assert torch.equal(again.entropy, batch.entropy.flip(0))


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
    list(trainer.fit_first_senses())
    student, batch = trainer.student, trainer.rows.take(range(12))
    alpha = student.alpha(batch.states, tune=False)
    words = student.words[batch.ids, -1].float()
    inputs = torch.einsum("bkij,bjd->bikd", alpha, words).flatten(2).flatten(0, 1)
    wanted = batch.states[:, :, -1].float().flatten(0, 1)
    ridge = 1e-3 * inputs.square().sum(0).mean()
    solved = torch.linalg.solve(inputs.t() @ inputs + ridge * torch.eye(inputs.shape[1]), inputs.t() @ wanted)
    torch.testing.assert_close(student(batch.ids, batch.states).flatten(0, 1), inputs @ solved, rtol=0.01, atol=0.01)
    once = LeastSquares(student)
    once.add(batch.ids[:6], batch.states[:6])
    once.add(batch.ids[6:], batch.states[6:])
    before = student.senses.direct.weight.clone()
    once.solve()
    torch.testing.assert_close(student.senses.direct.weight, before, rtol=0.01, atol=0.01)


def test_a_run_comes_nearer_to_the_original(where: Path, tmp_path: Path) -> None:
    trainer = trainer_of(where, tmp_path, replace(RECIPE, steps=60, matrix_lr=0.02, lr=0.01))
    first = trainer.held_out()["other"]  # senses of which nobody has made anything
    steps = list(trainer.run())
    assert steps[-1].divergence < 0.5 * steps[0].divergence
    assert trainer.held_out()["other"].teacher == first.teacher


def test_a_run_goes_on_where_it_stopped(where: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=40)
    whole = trainer_of(where, tmp_path / "whole", recipe)
    list(whole.fit_first_senses())
    list(whole.run())
    stopped = trainer_of(where, tmp_path / "stopped", recipe)
    list(stopped.fit_first_senses())
    run = stopped.run()
    for _ in range(30):  # into the part that trains the trunk
        next(run)
    stopped.save()
    again = trainer_of(where, tmp_path / "stopped", recipe)
    assert again.step == 30
    assert list(again.fit_first_senses()) == []
    list(again.run())
    for (name, one), other in zip(whole.student.named_parameters(), again.student.parameters(), strict=True):
        assert torch.equal(one, other), name
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    with pytest.raises(ValueError, match="made by another recipe"):
        trainer_of(where, tmp_path / "stopped", replace(recipe, lr=1e-5))


def test_only_the_uppermost_layers_are_trained_and_only_in_the_end(where: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, tuned_share=0.25)
    trainer, original = trainer_of(where, tmp_path, recipe), read_trunk(where)[0]
    list(trainer.fit_first_senses())
    run = trainer.run()
    for _ in range(6):
        next(run)
    assert all(map(torch.equal, trainer.student.upper.parameters(), original.h[3:].parameters()))
    list(run)
    assert not any(map(torch.equal, trainer.student.upper.parameters(), original.h[3:].parameters()))
    ids = torch.arange(10)[None]
    assert torch.equal(trainer.trunk(ids), original(ids))  # the teacher


def test_a_row_is_taken_once_each_time_through(where: Path, tmp_path: Path) -> None:
    trainer = trainer_of(where, tmp_path)
    numbers = [number for step in range(18) for number in trainer.row_numbers(step)]
    assert numbers[:12] == list(range(12))
    assert sorted(numbers[12:24]) == sorted(numbers[24:36]) == list(range(12))
    assert numbers[12:24] != numbers[24:36]


@pytest.mark.parametrize("tuned", [0, 2])
def test_the_model_is_what_was_trained(where: Path, tmp_path: Path, tuned: int) -> None:
    """The student's o, within what int8 leaves of its matrices and senses, whatever part of it training has changed."""
    recipe, parts = replace(RECIPE, tuned_layers=tuned), ("senses", "weights", *(("upper", "norm") if tuned else ()))
    trainer = trainer_of(where, tmp_path / "run", recipe)
    list(trainer.fit_first_senses())
    list(trainer.run())
    with torch.no_grad():
        for part in parts:
            for parameter in getattr(trainer.student, part).parameters():
                spread = float(parameter.std()) if parameter.ndim > 1 else 1.0
                parameter += 0.5 * spread * torch.randn_like(parameter)
    adapters.write_adapter(trainer.student, adapters.digest(where), where / "tokenizer.json", tmp_path / "adapter")
    (tmp_path / "model").mkdir()
    done: list[int] = []
    manifest = adapters.assemble(tmp_path / "adapter", where, tmp_path / "model", lambda count, of: done.append(count))
    assert verify(tmp_path / "model").fingerprint == manifest.fingerprint
    model = load(tmp_path / "model")
    assert done[-1] == model.config.vocab_size
    batch = trainer.rows.take([0, 1])
    own = trainer.student(batch.ids, batch.states, tune=tuned > 0)
    error = (model.mix(batch.ids) - own).norm()
    assert error < 0.05 * own.norm()
    untrained = trainer_of(where, tmp_path / "other", recipe).student
    for part in parts:
        kept = {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}
        getattr(trainer.student, part).load_state_dict(getattr(untrained, part).state_dict())
        without = trainer.student(batch.ids, batch.states, tune=tuned > 0)
        assert (without - own).norm() > 1.5 * error, f"this test wouldn't notice if {part} were left out"
        trainer.student.load_state_dict(kept)
    assert Tokenizer.read(tmp_path / "model" / "tokenizer.json").vocab_size == model.config.vocab_size


def test_steps_fit_into_a_budget() -> None:
    recipe, costs = replace(RECIPE, tuned_share=0.5, rows_per_step=8), StepCosts(1.0, 2.0, 2.0)
    fitted = fit_to_budget(recipe, 100.0, costs, most_rows=10**6)
    assert 90.0 < fitted.distinct_rows * 1.0 / 8 + fitted.steps * 3.0 <= 100.0 + 3.0
    assert fitted.steps / (fitted.distinct_rows / 8) == pytest.approx(3, rel=0.1)
    little = fit_to_budget(recipe, 100.0, costs, most_rows=16)
    assert little.distinct_rows == 16
    assert little.steps > fitted.steps
    assert fit_to_budget(recipe, 0.1, costs, 100).steps == 1


LENGTH = {"steps": 1, "distinct_rows": 1}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"steps": 1}, "has no distinct_rows"),
        ({**LENGTH, "learning_rate": 1}, "has learning_rate; a recipe has clip"),
        ({**LENGTH, "steps": 0}, "steps is 0; it must be an integer from 1 on"),
        ({**LENGTH, "steps": True}, "steps is True; it must be an integer from 1 on"),
        ({**LENGTH, "decay": 2.0}, "decay is 2.0; it must be a number from 0 to 1"),
        ({**LENGTH, "lr": "a"}, "lr is 'a'; it must be a number from 0 on"),
        ({**LENGTH, "lr": -1}, "lr is -1.0; it must be a number from 0 on"),
        ({**LENGTH, "tuned_layers": -1}, "tuned_layers is -1; it must be an integer from 0 on"),
        ({**LENGTH, "key_layers": 3}, "key_layers is 3; it must be a list of layers"),
        ({**LENGTH, "key_layers": ["a"]}, "it must be a list of layers"),
        ({**LENGTH, "precision": "int8"}, "it must be float32 or bfloat16"),
        ([1], "holds no object"),
    ],
)
def test_what_a_recipe_cant_be_is_named(tmp_path: Path, values: object, why: str) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=why):
        AdaptRecipe.read(tmp_path / "recipe.json")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tuned_layers": 5}, "tuned_layers is 5; the trunk has 4 layers"),
        ({"row_tokens": 65}, "row_tokens is 65; the context holds 64"),
        ({"word_layers": (0, 2)}, r"word_layers is \(0, 2\); it must ascend, from 0 on, to 4"),
        ({"word_layers": (0, 9)}, "it must ascend, from 0 on, to 4"),
        ({"key_layers": (9,)}, "key_layers is"),
    ],
)
def test_what_a_trunk_hasnt_is_named(where: Path, change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        replace(RECIPE, **change).config(read_trunk(where)[0].spec, 0, 100)


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
    tokenizer = Tokenizer.read(out / "model" / "tokenizer.json")
    assert tokenizer.bos_ids == (tokenizer.end_of_text,)
    assert (out / "loss.svg").read_text().startswith("<?xml")
    again = CliRunner().invoke(app, words)  # finished: nothing to do but to write the model again
    assert again.exit_code == 0, again.output
    assert verify(out / "model") == manifest
    (tmp_path / "recipe.json").write_text(json.dumps({**small, "lr": 0.5}))
    for more, why in (
        (["--recipe", str(tmp_path / "recipe.json")], "is the recipe of this run, and another than is asked for"),
        (["--seed", "9"], "is the recipe of this run, and another than is asked for"),
        (["--device", "tpu"], "--device 'tpu': there is cpu"),
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
    (tmp_path / "recipe.json").write_text(
        json.dumps({**RECIPE.to_json(), "steps": 1, "distinct_rows": 1, "rows_per_step": 60})
    )
    words = ["adapt", str(where), str(where / "text.jsonl"), "--out", str(out), "--threads", "1", "--budget", "3s"]
    result = CliRunner().invoke(app, [*words, "--recipe", str(tmp_path / "recipe.json"), "--disk", "0.1"])
    assert result.exit_code == 0, result.output
    chosen = AdaptRecipe.read(out / "recipe.json")
    assert chosen.steps > 5
    assert math.isclose(chosen.lr, RECIPE.lr)
    assert f"{chosen.steps} steps on {chosen.distinct_rows} rows" in result.stderr.replace("\n", " ")


def test_rows_of_another_run_are_never_taken_for_those_of_this(where: Path, tmp_path: Path) -> None:
    """Runs share what can be made again, where it is made of the same."""
    shared = tmp_path / "cache"
    first = trainer_of(where, tmp_path / "first", cache=shared)
    batch = first.rows.take([0, 1, 2])
    for name, change in (("seed", {"seed": 5}), ("row", {"row_tokens": 20}), ("layers", {"key_layers": (1, 2)})):
        changed = replace(RECIPE, **change)
        fresh = trainer_of(where, tmp_path / f"{name} alone", changed).rows.take([0, 1, 2])
        beside = trainer_of(where, tmp_path / name, changed, cache=shared).rows.take([0, 1, 2])
        assert torch.equal(fresh.ids, beside.ids)
        assert torch.equal(fresh.states, beside.states)
    same = trainer_of(where, tmp_path / "same", replace(RECIPE, lr=0.1), cache=shared)
    same.trunk.h = torch.nn.ModuleList()  # nothing is read again
    assert torch.equal(same.rows.take([0, 1, 2]).states, batch.states)


def test_another_transformer_of_the_same_shape_is_another_run(where: Path, tmp_path: Path) -> None:
    trainer = trainer_of(where, tmp_path / "run")
    list(trainer.fit_first_senses())
    other = tmp_path / "other"
    shutil.copytree(where, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors")
    with pytest.raises(ValueError, match="made by another recipe"):
        trainer_of(other, tmp_path / "run")


def test_the_first_senses_are_kept(where: Path, tmp_path: Path) -> None:
    trainer = trainer_of(where, tmp_path)
    list(trainer.fit_first_senses())
    again = trainer_of(where, tmp_path)
    assert again.has_first_senses
    assert torch.equal(again.student.senses.direct.weight, trainer.student.senses.direct.weight)


def test_a_full_disk_is_an_error_and_ends_no_process(where: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left|File too large"):
        trainer_of(where, tmp_path, replace(RECIPE, distinct_rows=2**40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lone_word_s_states_are_the_trunk_s(where: Path, dtype: torch.dtype) -> None:
    trunk, _ = read_trunk(where)
    found = torch.cat(list(word_states(trunk, (0, 2, 4), 7, dtype, chunk=50)))
    pairs = torch.stack([torch.full((trunk.spec.vocab_size,), 7), torch.arange(trunk.spec.vocab_size)], dim=1)
    states = [state[:, 1] for layer, state in enumerate(trunk.states(pairs)) if layer in (0, 2, 4)]
    wanted = F.rms_norm(torch.stack(states, dim=1), (trunk.spec.width,))
    assert (found - wanted).norm() < (1e-5 if dtype is torch.float32 else 0.02) * wanted.norm()


@pytest.mark.parametrize("family", ["gpt2", "llama, untied, wide heads, scaled"])
def test_other_trunks_are_adapted_too(tmp_path: Path, family: str) -> None:
    spec = FAMILIES[family].trunk
    torch.manual_seed(0)
    trunk = Trunk(spec).eval()
    head = trunk.wte.weight if spec.tied else torch.randn(spec.vocab_size, spec.width)
    recipe = replace(RECIPE, senses=3, tuned_layers=2)
    rows = Rows([np.random.default_rng(0).integers(1, 90, 2000).astype(np.uint16)], [1.0], 0, 0)
    config = recipe.config(spec, 0, spec.vocab_size)
    trainer = AdaptTrainer(Teacher(trunk, head, "ab"), config, recipe, rows, {}, tmp_path / "run", tmp_path / "cache")
    list(trainer.fit_first_senses())
    steps = list(trainer.run())
    assert len(steps) == recipe.steps
    batch = trainer.rows.take([0])
    p = (trunk(batch.ids) @ head.t()).softmax(-1)
    torch.testing.assert_close(batch.expected.float(), p @ head, rtol=0.02, atol=0.02)
