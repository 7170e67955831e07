"""How often tokens occur: counted as text is tokenised for training, and kept with a model."""

from __future__ import annotations

import json
import lzma
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backpack_lm.checkpoint import TOKENIZER, fingerprint, verify
from backpack_lm.installed import folder_of, weights
from backpack_lm.token_counts import NAME, TokenCounts
from backpack_lm.tokenizer import Tokenizer
from backpack_lm.training.data import DataError, Source, count_tokens, encode, stream
from backpack_serving.cli.main import app
from typer.testing import CliRunner

TEXTS = ["The king and the queen.\n\nThe ship sails.", "A king", "naïve \N{SNOWMAN}" * 300]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With micro's tokenizer."""
    shutil.copyfile(folder_of("micro") / TOKENIZER, tmp_path / TOKENIZER)
    return tmp_path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    return path


def _count(folder: Path, *texts: Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["model", "count", str(folder), *map(str, texts)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_counts_are_those_of_the_streams_that_training_reads(folder: Path, text: Path) -> None:
    tokenizer, source = Tokenizer.read(folder / TOKENIZER), Source(text)
    *_, done = encode(source, tokenizer, folder)
    tokens = Counter(int(token) for part in ("train", "heldout") for token in stream(source, folder, part))
    said = _count(folder, text, text)
    found = TokenCounts.read(folder, tokenizer.vocab_size)
    assert found is not None
    assert {token: count for token, count in enumerate(found.counts) if count} == {t: 2 * n for t, n in tokens.items()}
    assert done == 1
    total = sum(found.counts)
    assert f"{total:,} tokens counted, {len(tokens):,} of 16,384 tokens occur" in said
    frequencies = found.per_million
    assert float(frequencies.double().sum()) == pytest.approx(1e6)
    token = tokenizer.word_ids("king")[0]
    assert float(frequencies[token]) == pytest.approx(1e6 * found.counts[token] / total)
    assert float(frequencies[tokenizer.word_ids("horse")[0]]) == 0.0


def test_records_of_ids_are_counted_and_unknown_ones_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer, ids = Tokenizer.read(folder / TOKENIZER), tmp_path / "ids.jsonl"
    ids.write_text('{"input_ids": [5, 5, 9]}\n{"input_ids": []}\n')
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    assert list(count_tokens(Source(ids), tokenizer, counts)) == [0.5, 1.0]
    assert (counts[5], counts[9], counts.sum()) == (2, 1, 3)
    ids.write_text('{"input_ids": [5]}\n{"input_ids": [16384]}\n')
    with pytest.raises(DataError, match=r"ids.jsonl:2: .*16384"):
        list(count_tokens(Source(ids), tokenizer, counts))


def test_what_cant_be_counted_is_refused_and_nothing_written(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "no text to count" in _count(folder, empty, code=1)
    assert "nowhere.jsonl" in _count(folder, tmp_path / "nowhere.jsonl", code=1)
    assert "tokenizer" in _count(tmp_path / "none", empty, code=1)
    assert not (folder / NAME).exists()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"counts": [1, 2]}, "counts of 2 tokens, the tokenizer has 16384"),
        ({"counts": [1.5] * 16384}, "whole numbers"),
        ({"counts": [-1] * 16384}, "whole numbers"),
        ({"counts": [0] * 16384, "tokenizer": "ab" * 32}, "another tokenizer.json"),
        ({}, "counts"),
        ("no object", "no counts"),
    ],
)
def test_a_file_that_cant_be_used_is_refused_with_the_fix(folder: Path, values: Any, says: str) -> None:
    TokenCounts.of(folder, [0] * 16384).write(folder)
    about = json.loads(lzma.decompress((folder / NAME).read_bytes()))
    assert about["tokenizer"] == TokenCounts.of(folder, ()).tokenizer
    values = {"tokenizer": about["tokenizer"], **values} if isinstance(values, dict) else values
    (folder / NAME).write_bytes(lzma.compress(json.dumps(values).encode()))
    with pytest.raises(ValueError, match=says) as refused:
        TokenCounts.read(folder, 16384)
    assert "backpack model count" in str(refused.value)
    (folder / NAME).write_bytes(b"no xz")
    with pytest.raises(ValueError, match="backpack model count"):
        TokenCounts.read(folder, 16384)
    (folder / NAME).unlink()
    assert TokenCounts.read(folder, 16384) is None


@pytest.mark.parametrize("name", ["micro", "smollm2"])
def test_the_models_that_come_with_the_project_have_counts(name: str) -> None:
    own = weights() / name
    tokenizer = Tokenizer.read(own / TOKENIZER)
    found = TokenCounts.read(own, tokenizer.vocab_size)
    assert found is not None
    assert sum(found.counts) > 40_000_000
    assert (own / NAME).stat().st_size < 200_000
    often, seldom = (found.counts[tokenizer.word_ids(word)[0]] for word in ("the", "nurse"))
    assert often > 100 * seldom > 0


def test_counts_are_no_part_of_the_fingerprint_and_are_imported(tmp_path: Path) -> None:
    micro = folder_of("micro")
    assert (micro / NAME).exists()
    assert verify(micro).fingerprint == fingerprint(micro)
    words = ["model", "import", str(micro), str(tmp_path / "model")]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / "model" / NAME).read_bytes() == (micro / NAME).read_bytes()
    other = ["model", "import", str(micro), str(tmp_path / "other"), "--tokenizer", str(micro / TOKENIZER)]
    assert CliRunner().invoke(app, other).exit_code == 0
    assert not (tmp_path / "other" / NAME).exists(), "counts of which tokenizer, nobody knows"
