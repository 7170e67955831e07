"""Adapters: what a run has learnt, to begin another with or to put together with its Transformer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backpack_lm import installed
from backpack_lm.adapting import adapter as adapters
from backpack_lm.checkpoint import verify
from backpack_lm.generation import SamplingDefaults
from backpack_lm.layouts import CheckpointError
from backpack_lm.model import FinishedSenses
from backpack_serving.cli.main import app
from typer.testing import CliRunner

from tests.models.adapting_run import RECIPE, trainer_of


def test_an_adapter_is_for_one_transformer(where: Path, tmp_path: Path) -> None:
    trainer = trainer_of(where, tmp_path / "run")
    adapters.write_adapter(trainer.student, adapters.digest(where), where / "tokenizer.json", tmp_path / "adapter")
    other = tmp_path / "other"
    other.mkdir()
    for file in where.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text((where / "config.json").read_text().replace("32", "16"))
    with pytest.raises(CheckpointError, match=r"has SHA-256 .*was made for "):
        adapters.assemble(tmp_path / "adapter", other, tmp_path)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        adapters.assemble(tmp_path, where, tmp_path)


def test_a_run_begins_after_another(where: Path, tmp_path: Path) -> None:
    """With what its adapter has learnt, and with more layers to train."""
    before = trainer_of(where, tmp_path / "before")
    list(before.fit_first_senses())
    list(before.run())
    adapters.write_adapter(before.student, adapters.digest(where), where / "tokenizer.json", tmp_path / "adapter")
    recipe = replace(RECIPE, tuned_layers=2, tuned_share=1.0)
    after = trainer_of(where, tmp_path / "after", recipe, after=tmp_path / "adapter")
    assert not list(after.fit_first_senses())
    theirs, ours = before.held_out()["other"], after.held_out()["other"]
    assert ours.backpack == pytest.approx(theirs.backpack, rel=1e-3)  # the adapter is in int8
    fresh = trainer_of(where, tmp_path / "fresh")
    assert abs(fresh.held_out()["other"].backpack - theirs.backpack) > 0.03
    own = after.student.state_dict()
    for name, tensor in before.student.upper[0].state_dict().items():
        assert own[f"upper.1.{name}"] == pytest.approx(tensor, rel=0.02, abs=0.005)
    lower = {name: tensor.clone() for name, tensor in after.student.upper[0].named_parameters()}
    after.take_step()
    assert any(not torch.equal(lower[name], each) for name, each in after.student.upper[0].named_parameters())
    list(after.run())
    other = trainer_of(where, tmp_path / "after", recipe, after=tmp_path / "adapter")
    assert other.step == recipe.steps
    with pytest.raises(ValueError, match="made by another recipe"):
        trainer_of(where, tmp_path / "after", recipe)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"senses": 4}, "has num_senses 5, this run 4; give a recipe with the adapter's value"),
        ({"sense_inner": 21}, "has sense_inner 20, this run 21"),
        ({"key_layers": (1, 2)}, r"has key_layers \(1, 2, 3\), this run \(1, 2\)"),
        ({"word_layers": (0, 4)}, r"has word_layers \(0, 1, 2, 3, 4\), this run \(0, 4\)"),
        ({"tuned_layers": 0}, "has 1 trained layers, the recipe's tuned_layers is 0; it must be 1 or more"),
    ],
)
def test_an_adapter_that_doesnt_fit_is_nothing_to_begin_after(
    where: Path, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    before = trainer_of(where, tmp_path / "before")
    adapters.write_adapter(before.student, adapters.digest(where), where / "tokenizer.json", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=why):
        trainer_of(where, tmp_path / "after", replace(RECIPE, **change), after=tmp_path / "adapter")


def test_an_adapter_of_another_transformer_is_nothing_to_begin_after(where: Path, tmp_path: Path) -> None:
    before = trainer_of(where, tmp_path / "before")
    adapters.write_adapter(before.student, "ab" * 32, where / "tokenizer.json", tmp_path / "adapter")
    ours = adapters.digest(where)[:12]
    with pytest.raises(CheckpointError, match=f"for the Transformer with SHA-256 abababababab…, this one has {ours}…"):
        trainer_of(where, tmp_path / "after", after=tmp_path / "adapter")


def test_layers_that_another_run_has_trained_are_run_at_once_and_trained_in_the_end(
    where: Path, tmp_path: Path
) -> None:
    """As `tuned_share` says, whatever the run began with; layers that were trained before count from its first step."""
    before = trainer_of(where, tmp_path / "before")
    list(before.fit_first_senses())
    list(before.run())
    adapters.write_adapter(before.student, adapters.digest(where), where / "tokenizer.json", tmp_path / "adapter")
    after = trainer_of(where, tmp_path / "after", after=tmp_path / "adapter")
    begun = [parameter.clone() for parameter in after.student.upper.parameters()]
    batch = after.rows.take([0])
    with torch.no_grad():
        tuned, untuned = (after.student(batch.ids, batch.states, tune) for tune in (True, False))
        after.student.moved = False
        teachers = after.student(batch.ids, batch.states)
    after.student.moved = True
    assert torch.equal(tuned, untuned)
    assert not torch.equal(tuned, teachers)
    assert 0 < RECIPE.tuned_from < RECIPE.steps
    for step in after.run():
        changed = [not torch.equal(*both) for both in zip(after.student.upper.parameters(), begun, strict=True)]
        assert any(changed) is (step.step > RECIPE.tuned_from), step


def test_a_run_without_trained_layers_begins_after_another(where: Path, tmp_path: Path) -> None:
    frozen = replace(RECIPE, tuned_layers=0)
    before = trainer_of(where, tmp_path / "before", frozen)
    list(before.fit_first_senses())
    with torch.no_grad():
        for parameter in before.student.weights.parameters():
            parameter += torch.randn_like(parameter)  # sense weights that depend on the states
    adapters.write_adapter(before.student, adapters.digest(where), where / "tokenizer.json", tmp_path / "adapter")
    after = trainer_of(where, tmp_path / "after", frozen, after=tmp_path / "adapter")
    theirs, ours = before.held_out()["other"], after.held_out()["other"]
    assert ours.backpack == pytest.approx(theirs.backpack, rel=8e-3)  # the adapter is in int8


def test_a_model_that_comes_as_an_adapter_is_installed_once(
    where: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, weights = trainer_of(where, tmp_path / "run"), tmp_path / "weights"
    adapters.write_adapter(trainer.student, adapters.digest(where), where / "tokenizer.json", weights / "small")
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
        (["small", "--transformer", str(where / "tokenizer.json")], "has SHA-256"),
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
    # A small file changes, another goes: a folder of its own, with the same weights and no Transformer.
    (weights / "small" / "generation_config.json").write_text('{"temperature": 0.25}')
    (weights / "small" / "held_out.txt.xz").write_bytes(b"new")
    changed = installed.folder_of("small")
    assert installed.missing(changed) == "small"
    assert run(app, ["model", "install", "small"]).exit_code == 0
    assert verify(changed) == replace(verify(folder), defaults=SamplingDefaults.read(changed))
    assert verify(changed).defaults.temperature == 0.25
    assert verify(folder).defaults.temperature == 0.5  # it may be served now
    assert (changed / "held_out.txt.xz").read_bytes() == b"new"
    (weights / "small" / "held_out.txt.xz").unlink()
    assert run(app, ["model", "install", "small"]).exit_code == 0
    assert {file.name for file in installed.folder_of("small").iterdir()} == {file.name for file in folder.iterdir()}
    # A tokenizer that isn't the adapter's is refused, and not served with the weights of the earlier one.
    (weights / "small" / "tokenizer.json").write_text("{}")
    refused = run(app, ["model", "install", "small"])
    assert "tokenizer.json isn't the one that adapter.json names" in refused.stderr
    assert installed.missing(installed.folder_of("small")) == "small"


def test_a_damaged_table_or_adapter_is_refused(where: Path, tmp_path: Path) -> None:
    trainer = trainer_of(where, tmp_path / "run")
    adapters.write_adapter(trainer.student, adapters.digest(where), where / "tokenizer.json", tmp_path / "adapter")
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
    """Another install rounds otherwise: the model is the same one."""
    trainer = trainer_of(where, tmp_path / "run")
    list(trainer.fit_first_senses())
    adapters.write_adapter(trainer.student, adapters.digest(where), where / "tokenizer.json", tmp_path / "adapter")
    models, finished = [], adapters._finished_senses

    def nudged(*what: Any) -> FinishedSenses:
        table = finished(*what)
        table[0].rows[3, 1, 2] ^= 1
        return table

    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            # Where another install rounds the other way, a cell is one step away.
            patch.setattr(adapters, "_finished_senses", finished if name == "one" else nudged)
            models.append(adapters.assemble(tmp_path / "adapter", where, tmp_path / name))
    assert models[0].fingerprint == models[1].fingerprint
    assert models[0].tables != models[1].tables
    assert all(verify(tmp_path / name).fingerprint == models[0].fingerprint for name in ("one", "other"))
    (tmp_path / "one" / "manifest.json").write_text(
        json.dumps({**json.loads((tmp_path / "one" / "manifest.json").read_text()), "tables": {}})
    )
    with pytest.raises(CheckpointError, match="its manifest names"):
        verify(tmp_path / "one")
