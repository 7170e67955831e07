"""JSON of others: nothing in it is lost without a word, wherever it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from backpack_lm import strict_json
from backpack_lm.checkpoint import CheckpointError, load
from backpack_lm.config import BackpackConfig, ConfigError
from backpack_lm.installed import folder_of
from backpack_lm.lab.examples import CanonicalExample
from backpack_lm.manifest import Manifest, ManifestError
from backpack_lm.strict_json import JsonError
from backpack_lm.tokenizer import Tokenizer
from backpack_lm.training.data import Source
from backpack_serving.auth.oidc import Issuer
from backpack_serving.cli.patch_file import PatchFile
from backpack_serving.gateway.limits import Limit, read_limits
from backpack_serving.settings import Settings
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

BOM = b"\xef\xbb\xbf"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_what_is_json_is_read_as_it_is(value: object) -> None:
    assert strict_json.parse(json.dumps(value)) == value
    assert strict_json.parse(BOM + json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"factor": 2, "factor": 3}', "'factor' stands twice"),
        (b'[{"a": {"b": 1, "b": 1}}]', "'b' stands twice"),
        (b'{"a": 1, "\\u0061": 2}', "'a' stands twice"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "1e999 is more than a number can be"),
        (b"[" + b"9" * 5000 + b"]", "more digits"),
        (b"[" * 200_000, "nest too deeply"),
        (b'["\\ud800"]', "half a character"),
        (b'{"\\uDFFF": 1}', "half a character"),
        (b'{"a": 1,\n "b" 2}', "line 2 column 6"),
        (b'{"a": "\xff"}', "it isn't UTF-8 text: byte 7 is 0xff"),
        (b"", "line 1 column 1"),
    ],
)
def test_what_readers_would_understand_differently_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(JsonError, match=reason):
        strict_json.parse(text)


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert strict_json.parse(b'["\\ud83d\\ude00"]') == ["\N{GRINNING FACE}"]


def _settings(file: Path) -> Settings:
    return Settings(certificates=file.read_text("utf-8-sig"))


HEAD = '{"fingerprint": "00", "sense_rms": [1], '
PATCH = '{"edits": [{"scale": {"cells": [{"word": {"token": 3}, "senses": [1]}], "factor": 2'
READERS: dict[str, tuple[Callable[[Path], object], str, type[Exception]]] = {
    "patch": (PatchFile.read, PATCH + ', "factor": 3}}]}', ValueError),
    "patch, two edits": (PatchFile.read, '{"edits": [], "edits": []}', ValueError),
    "config": (BackpackConfig.read, '{"n_head": 4, "n_head": 2}', ConfigError),
    "checkpoint": (lambda file: load(file.parent, config=file), '{"n_head": 4, "n_head": 2}', CheckpointError),
    "manifest": (lambda f: Manifest.read(f.parent), HEAD + '"fingerprint": "11"}', ManifestError),
    "tokenizer": (Tokenizer.read, '{"model": {"vocab": {"a": 1, "a": 2}}}', ValueError),
    "examples": (CanonicalExample.read, '{"prompt": "The sea is", "target": "deep", "target": "dry"}', ValueError),
    "training text": (lambda file: list(Source(file).records()), '{"text": "a", "text": "b"}', ValueError),
    "keys of an issuer": (
        lambda f: Issuer("https://i", "a", str(f)).read(),
        '{"keys": [], "keys": []}',
        ValueError,
    ),
    "certificates": (_settings, '{"a": {"tenant": "x"}, "a": {"tenant": "y"}}', ValidationError),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_key_that_stands_twice_is_refused_in_every_file(reader: str, tmp_path: Path) -> None:
    read, text, refusal = READERS[reader]
    file = tmp_path / "manifest.json"
    file.write_text(text, "utf-8")
    with pytest.raises(refusal, match="stands twice"):
        read(file)


@pytest.mark.parametrize("reader", READERS)
def test_brackets_without_end_are_refused_in_every_file(reader: str, tmp_path: Path) -> None:
    read, _, refusal = READERS[reader]
    file = tmp_path / "manifest.json"
    file.write_text("[" * 200_000, "utf-8")
    with pytest.raises(refusal, match="nest too deeply"):
        read(file)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    def marked(name: str, text: str | bytes) -> Path:
        file = tmp_path / name
        file.write_bytes(BOM + (text.encode() if isinstance(text, str) else text))
        return file

    patch = PatchFile.read(marked("patch.json", PATCH + "}}]}"))
    assert patch.edits[0].scale.factor == 2
    assert CanonicalExample.read(marked("examples.jsonl", '{"prompt": "a", "target": "b"}')) == [
        CanonicalExample("a", "b")
    ]
    assert [text for text, _ in Source(marked("text.jsonl", '{"text": "a"}')).records()] == ["a"]
    assert (
        read_limits(marked("limits.toml", "[acme]\nrequests_per_minute = 2"), Limit())["acme"].requests_per_minute == 2
    )
    tokenizer = Tokenizer.read(marked("tokenizer.json", (folder_of("micro") / "tokenizer.json").read_bytes()))
    assert tokenizer.piece(300) == Tokenizer.read(folder_of("micro") / "tokenizer.json").piece(300)
    marked("manifest.json", (folder_of("micro") / "manifest.json").read_bytes())
    assert Manifest.read(tmp_path) == Manifest.read(folder_of("micro"))


def test_a_file_that_git_lfs_did_not_fetch_is_named_as_such(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    for read in (Tokenizer.read, BackpackConfig.read, PatchFile.read):
        with pytest.raises(ValueError, match=r"tokenizer\.json.*git lfs pull"):
            read(file)


def test_limits_that_nest_without_end_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("a = " + "[" * 200_000)
    with pytest.raises(ValueError, match=r"limits\.toml: no TOML"):
        read_limits(file, Limit())
