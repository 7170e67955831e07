"""`backpack experiment`: files written, refusals in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from backpack_serving.cli.main import app
from backpack_serving.install import install_command
from typer.testing import CliRunner

from tests.models.experiments.test_lexical import _write


def _call(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["experiment", *words])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_an_experiment_writes_json_markdown_and_a_page(folder: Path, tmp_path: Path) -> None:
    words = ("lexical", "--data", str(_write(tmp_path)), "--model", str(folder), "--out", str(tmp_path / "out"))
    assert "minimum over senses" in _call(*words)
    values = json.loads((tmp_path / "out" / "lexical.json").read_text())
    assert values["model"] == json.loads((folder / "manifest.json").read_text())["fingerprint"]
    assert set(values["result"]["senses"]) == {"SimLex-999", "SimVerb-3500", "RG-65", "WordSim-353"}
    first = (tmp_path / "out" / "lexical.html").read_text()
    _call(*words)
    assert (tmp_path / "out" / "lexical.html").read_text() == first, "the same command, the same page"


def test_language_reads_held_out_records_and_plain_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("The king said that the ship is on the sea.\n" * 200)
    corpus = str(folder / "corpus.jsonl")
    words = ("language", "--corpus", corpus, "--text", str(plain), "--tokens", "256", "--model", str(folder))
    assert "No twin was given" in _call(*words, "--out", str(tmp_path / "out"))
    texts = json.loads((tmp_path / "out" / "language.json").read_text())["result"]["texts"]
    assert [text["tokens"] for text in texts] == [256, 256]
    monkeypatch.chdir(tmp_path)
    relative = ("language", "--text", "plain.txt", "--tokens", "64", "--model", str(folder), "--out", "out")
    assert " plain.txt | 64 " in _call(*relative)
    plain.write_bytes(b"\xff")
    assert "plain.txt isn't UTF-8 text" in _call(*relative, code=1)
    assert all(text["perplexity"] > 10 for text in texts)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("bias",), "excess gone"),
        (("facts", "--text", "CORPUS", "--tokens", "256"), "hold"),
    ],
)
def test_the_other_experiments_have_commands(folder: Path, words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    named = {"CORPUS": str(folder / "corpus.jsonl")}
    given = [named.get(word, word) for word in words]
    assert says in _call(*given, "--model", str(folder), "--out", str(tmp_path))
    assert "<h1>" in (tmp_path / f"{words[0]}.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("lexical", "--data", "/nowhere"), "/nowhere/SimLex-999.txt doesn't exist"),
        (("lexical", "--data", ".", "--model", "/nowhere"), "backpack model import"),
        (("language",), "no text; give a JSON-lines file with --corpus"),
        (("bias", "--sense", "99"), "sense 99; this model's are 0 to 3"),
        (("lexical", "--data", "DATA", "--twin", "/nowhere"), "/nowhere is no Transformer to compare with"),
    ],
)
def test_a_refusal_is_one_line(folder: Path, words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    named = {"DATA": str(_write(tmp_path))}
    model = () if "--model" in words else ("--model", str(folder))
    output = _call(*(named.get(word, word) for word in words), *model, "--out", str(tmp_path), code=1)
    assert says in output
    assert "Traceback" not in output


def test_a_folder_that_cannot_be_made_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("")
    output = _call("bias", "--model", "/nowhere", "--out", str(tmp_path / "notes" / "out"), code=2)
    assert "is no folder that can be written to" in output.replace("│ ", "")


def test_what_the_extra_brings_is_named_where_it_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    data = str(_write(tmp_path))
    words = ("lexical", "--data", data, "--model", str(folder), "--out", str(tmp_path))
    assert f"this needs scipy.stats: {install_command('lab')}" in _call(*words, code=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("backpack_lm.experiments.bias", "backpack_lm.reports.plots"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    output = _call("bias", "--model", "/nowhere", code=1)
    assert f"this needs matplotlib: {install_command('lab')}" in output, "before any work"
    monkeypatch.setitem(sys.modules, "torch", None)
    output = _call(*words, code=1)
    assert f"this needs torch: {install_command('engine')}; for the experiments: {install_command('lab')}" in output
