"""`backpack model import`: from a checkpoint to a folder that is served."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from backpack_lm.checkpoint import verify
from backpack_lm.config import BackpackConfig
from backpack_lm.generation import SamplingDefaults
from backpack_lm.installed import folder_of
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay
from backpack_lm.patch import Cell, ReleaseContent, RevisionContent, ScaleEdit
from backpack_lm.tokenizer import Tokenizer
from backpack_serving.cli.main import app
from backpack_serving.inference.served_model import ServedModel
from click.testing import Result
from typer.testing import CliRunner

TOKENIZER = folder_of("micro") / "tokenizer.json"
TOKENS = Tokenizer.read(TOKENIZER).vocab_size


def _import(folder: Path, vocabulary: int) -> Result:
    torch.manual_seed(0)
    model = Backpack(BackpackConfig.gpt2(vocabulary, 16, 8, n_layer=1, n_head=1, num_senses=2))
    (folder / "config.json").write_text(json.dumps(model.config.to_json()))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    command = ["model", "import", str(folder), str(folder / "served"), "--tokenizer", str(TOKENIZER)]
    return CliRunner().invoke(app, command)


def test_what_the_tokenizer_has_not_is_padding(tmp_path: Path) -> None:
    """It is never sampled: nothing could be said of it."""
    assert _import(tmp_path, TOKENS + 48).exit_code == 0
    served = ServedModel.read(tmp_path / "served")
    assert served.manifest.config.tokens == served.tokenizer.vocab_size == TOKENS


def test_a_checkpoints_generation_config_comes_along_and_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7}')
    assert _import(tmp_path, TOKENS).exit_code == 0
    with_it = verify(tmp_path / "served")
    (tmp_path / "served" / "generation_config.json").unlink()
    without = verify(tmp_path / "served")
    assert with_it.fingerprint == without.fingerprint
    assert (with_it.defaults, without.defaults) == (SamplingDefaults(0.5, 7, 1.0), SamplingDefaults())
    (tmp_path / "generation_config.json").write_text('{"top_p": 7}')
    result = _import(tmp_path, TOKENS)
    assert result.exit_code == 1
    assert "generation_config.json: top_p is 7" in result.output


def test_nothing_of_the_model_that_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7}')
    assert _import(tmp_path, TOKENS).exit_code == 0
    for name in ("topics.safetensors", "README.md"):
        (tmp_path / "served" / name).write_text("of the model before")
    (tmp_path / "generation_config.json").unlink()
    assert _import(tmp_path, TOKENS).exit_code == 0
    assert verify(tmp_path / "served").defaults == SamplingDefaults()
    there = {file.name for file in (tmp_path / "served").iterdir()}
    assert there == {"config.json", "model.safetensors", "tokenizer.json", "manifest.json", "README.md"}


def test_a_release_is_tried_out_on_no_more_words_than_a_text_has(tmp_path: Path) -> None:
    _import(tmp_path, TOKENS)
    served = ServedModel.read(tmp_path / "served")
    edits = ScaleEdit(tuple(Cell(token, 0) for token in range(1, 40)), 0.5)
    release = ReleaseContent((RevisionContent(served.manifest.fingerprint, (edits,)),))
    served.try_out(Overlay.compile(release, served.table))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """No text that it reads could be served."""
    result = _import(tmp_path, TOKENS - 1)
    assert result.exit_code == 1
    assert f"the tokenizer has {TOKENS} tokens, the model {TOKENS - 1}" in result.output


def test_what_is_cheap_is_checked_before_weights_are_read(tmp_path: Path) -> None:
    """They would be refused here: they are no weights."""
    (tmp_path / "config.json").write_text(
        json.dumps(BackpackConfig.gpt2(TOKENS - 1, 16, 8, n_layer=1, n_head=1, num_senses=2).to_json())
    )
    (tmp_path / "pytorch_model.bin").write_bytes(b"no weights")
    command = ["model", "import", str(tmp_path), str(tmp_path / "served")]
    missing = CliRunner().invoke(app, command)
    assert missing.exit_code == 1
    assert "tokenizer.json" in missing.output
    other = CliRunner().invoke(app, [*command, "--tokenizer", str(TOKENIZER)])
    assert f"the tokenizer has {TOKENS} tokens" in other.output
    assert not (tmp_path / "served").exists()


def test_denominators_are_computed_when_they_are_asked_for(tmp_path: Path) -> None:
    assert _import(tmp_path, TOKENS).exit_code == 0
    assert not ServedModel.read(tmp_path / "served").table.measured
    command = [
        "model",
        "import",
        str(tmp_path),
        str(tmp_path / "served"),
        "--tokenizer",
        str(TOKENIZER),
        "--topics",
    ]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert ServedModel.read(tmp_path / "served").table.measured
