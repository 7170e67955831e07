"""How tokens are drawn where nobody says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from backpack_lm.generation import NAME, UNTRUNCATED, SamplingDefaults
from backpack_lm.installed import folder_of
from backpack_lm.manifest import Manifest, ManifestError


@pytest.mark.parametrize(
    ("values", "meant"),
    [
        ({"temperature": 0.8, "top_k": 50, "top_p": 0.95}, (0.8, 50, 0.95)),
        ({"temperature": 0.6}, (0.6, 0, 1.0)),  # as vLLM reads it: what isn't named leaves the whole vocabulary
        ({"top_k": 40}, (1.0, 40, 1.0)),
        ({"top_p": 0.9, "top_k": -1, "temperature": None}, (1.0, 0, 0.9)),
        ({"temperature": 0}, (0.0, 0, 1.0)),
        ({"repetition_penalty": 1.1, "min_p": 0.05}, (1.0, 0, 1.0, 0.05, 1.1)),
        # As transformers writes it for a model that has no wishes; and what this server doesn't do.
        ({"_from_model_config": True, "eos_token_id": 50256, "num_beams": 4}, (0.7, 30, 1.0)),
        ({}, (0.7, 30, 1.0)),
    ],
)
def test_a_models_generation_config_is_read(tmp_path: Path, values: dict[str, Any], meant: Any) -> None:
    (tmp_path / NAME).write_text(json.dumps(values))
    assert SamplingDefaults.read(tmp_path) == SamplingDefaults(*meant)


def test_a_model_without_one_gets_the_one_table(tmp_path: Path) -> None:
    assert SamplingDefaults.read(tmp_path) == SamplingDefaults()
    assert SamplingDefaults(1.0, 0, 1.0) == UNTRUNCATED


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"temperature": -1}', "temperature is -1; 0 (greedy) or more"),
        ('{"temperature": NaN}', "temperature is nan"),
        ('{"temperature": "hot"}', "temperature is 'hot'; it must be a number"),
        ('{"temperature": true}', "temperature is True"),
        ('{"top_k": 2.5}', "top_k is 2.5"),
        ('{"top_k": -2}', "top_k is -2; 1 or more"),
        ('{"top_k": 4294967296}', "top_k is 4294967296"),
        ('{"top_p": 0}', "top_p is 0; above 0"),
        ('{"min_p": 1.5}', "min_p is 1.5; 0 to 1"),
        ('{"repetition_penalty": 0}', "repetition_penalty is 0; above 0"),
        ("[]", "it isn't an object"),
        ("{", "Expecting property name"),
    ],
)
def test_one_that_no_request_could_ask_for_is_refused_with_its_file(tmp_path: Path, text: str, says: str) -> None:
    manifest = Manifest.read(folder_of("micro"))
    manifest.write(tmp_path)
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ManifestError) as refused:
        Manifest.read(tmp_path)
    assert str(tmp_path / NAME) in str(refused.value)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("{}", {0}),
        ('{"eos_token_id": 7}', {0, 7}),
        ('{"eos_token_id": [0, 2, 5]}', {0, 2, 5}),
        ('{"eos_token_id": 50256}', {0}),  # GPT-2's, which transformers writes where nobody said
        ('{"eos_token_id": null}', {0}),
    ],
)
def test_a_text_may_end_in_several_ways(tmp_path: Path, text: str, ends: set[int]) -> None:
    Manifest.read(folder_of("micro")).write(tmp_path)
    (tmp_path / NAME).write_text(text)
    assert Manifest.read(tmp_path).end_tokens == ends


@pytest.mark.parametrize("token", ["-1", "16384", '"</s>"', "true", "[0, 99999]"])
def test_an_end_that_the_model_hasnt_is_refused(tmp_path: Path, token: str) -> None:
    Manifest.read(folder_of("micro")).write(tmp_path)
    (tmp_path / NAME).write_text(f'{{"eos_token_id": {token}}}')
    with pytest.raises(ManifestError, match=r"eos_token_id is .*; this model's tokens are 0 to 16383"):
        Manifest.read(tmp_path)


def test_the_manifest_brings_it_and_does_not_write_it(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"temperature": 0.5}')
    default = Manifest.read(folder_of("micro"))
    default.write(tmp_path)
    read = Manifest.read(tmp_path)
    assert (read.fingerprint, read.defaults) == (default.fingerprint, SamplingDefaults(0.5, 0, 1.0))
    assert "temperature" not in (tmp_path / "manifest.json").read_text()
