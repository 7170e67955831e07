"""Every experiment in one command: what is found, what a stopped run repeats, what the page says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backpack_lm.experiments import summary
from backpack_lm.experiments.bias import GenderBias
from backpack_lm.experiments.experiment import Experiment
from backpack_lm.experiments.language import LanguageModelling
from backpack_lm.experiments.lexical import LexicalSimilarity
from backpack_lm.experiments.summary import Data, plan, run_all
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.progress import unwatched
from backpack_serving.cli.main import app
from typer.testing import CliRunner

from tests.models.experiments.test_lexical import _write


def _few(folder: Path, data: Path) -> list[Experiment]:
    return [
        LanguageModelling((folder / "corpus.jsonl",), tokens=128),
        LexicalSimilarity(_write(data)),
        GenderBias(),
    ]


def test_the_data_that_is_there_is_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no text: \*.jsonl"):
        Data.find(tmp_path)
    (tmp_path / "corpus").mkdir()
    for name in ("b.jsonl", "a.jsonl.xz"):
        (tmp_path / "corpus" / name).touch()
    found = Data.find(tmp_path)
    assert [p.name for p in found.corpora] == ["a.jsonl.xz", "b.jsonl"]
    assert (found.lexical, found.texts) == (None, ())
    assert [e.NAME for e in plan(found, None, None, tmp_path)] == "language bias facts topics finetuning".split()
    (tmp_path / "lexical").mkdir()
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").touch()
    twin = tmp_path / "twin"
    found = Data.find(tmp_path)
    experiments = plan(found, twin, None, tmp_path)
    assert [e.NAME for e in experiments] == "language lexical bias facts topics finetuning".split()
    assert [getattr(e, "twin", twin) for e in experiments] == [twin] * 6


def test_a_run_that_was_stopped_goes_on_at_its_experiment(subject: LabModel, folder: Path, tmp_path: Path) -> None:
    experiments = _few(folder, tmp_path)

    def stopping(items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
        for item in items:
            if what == "nouns":
                raise KeyboardInterrupt
            yield item

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        list(run_all(experiments, subject, stopping, out, "again"))  # type: ignore[arg-type]
    assert not (out / "experiments.md").exists()
    first = (out / "lexical.json").stat().st_mtime_ns
    assert [name for name, _ in run_all(experiments, subject, unwatched, out, "again")] == [
        "language",
        "lexical",
        "bias",
    ]
    assert (out / "lexical.json").stat().st_mtime_ns == first, "it was done"
    assert not list(out.glob("*.partial*"))
    text = (out / "experiments.md").read_text()
    assert "| experiment | this model | the paper's Small | aim | reached |" in text
    for name, heading in (("language", "Language modelling"), ("lexical", "Lexical"), ("bias", "Gender bias")):
        values = json.loads((out / f"{name}.json").read_text())["headline"]
        assert f"| {name} | {values['figures']} | {values['paper']} | {values['aim']} |" in text
        assert f"\n## {heading}" in text
    assert "| no twin to compare with |" in text
    assert "What is chosen on what it is evaluated on, a report's notes say." in text
    for note in ("what of a model was chosen on them, its card says", "picked on the data that it is scored on"):
        assert note in text


def test_one_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "corpus.jsonl").touch()
    monkeypatch.setattr(summary, "plan", lambda found, twin, judge, folder_: _few(folder, tmp_path))
    words = ["experiment", "all", "--data", data, "--judge", tmp_path, "--model", folder, "--out", out]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert "no lexical similarity" in result.output
    assert "In short" in result.output
    assert (out / "experiments.md").exists()
