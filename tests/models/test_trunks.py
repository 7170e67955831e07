"""Trunks of all families: equal to transformers', and the same by every way that computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backpack_lm import trunks
from backpack_lm.checkpoint import CheckpointError, fingerprint, load, read_transformer, save, verify
from backpack_lm.config import BackpackConfig, ConfigError, StoredSenses
from backpack_lm.installed import folder_of
from backpack_lm.lab.batch_sampler import BatchSampler
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.twin import read_twin
from backpack_lm.manifest import Manifest
from backpack_lm.model import PART, Backpack, Trunk
from backpack_lm.overlay import Overlay
from backpack_lm.patch import Cell, ReleaseContent, RevisionContent, ScaleEdit
from backpack_lm.tokenizer import Tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.models.trunk_shapes import FAMILIES, random_model

WORDS = folder_of("micro") / "tokenizer.json"
"""A tokenizer to lie beside the weights; nothing here asks what its ids mean."""

_TINY = {"vocab_size": 90, "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3}
_SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

THEIRS: dict[str, Any] = {
    "llama, 9 heads over 3": lambda: LlamaForCausalLM(
        LlamaConfig(**_TINY, num_attention_heads=9, num_key_value_heads=3, rope_theta=1e5, tie_word_embeddings=True)
    ),
    "llama, scaled, untied": lambda: LlamaForCausalLM(
        LlamaConfig(**_TINY, num_attention_heads=6, num_key_value_heads=2, rope_parameters=_SCALED)
    ),
    "llama, linear, biases": lambda: LlamaForCausalLM(
        LlamaConfig(
            **_TINY,
            num_attention_heads=4,
            head_dim=24,
            rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
            attention_bias=True,
            mlp_bias=True,
        )
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**_TINY, num_attention_heads=6, num_key_value_heads=2, sliding_window=None)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_TINY, num_attention_heads=6, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=90, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    ),
    "llama of 135 million": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=4,
            num_attention_heads=9,
            num_key_value_heads=3,
            rope_theta=1e5,
            tie_word_embeddings=True,
        )
    ),
}


def _theirs(name: str) -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel = THEIRS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():  # biases and gains, too
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("name", THEIRS)
def test_a_trunk_is_transformers(name: str, tmp_path: Path) -> None:
    theirs = _theirs(name)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(90, (2, 60))
    expected = theirs(ids).logits
    twin = read_twin(tmp_path, FAMILIES["gpt2"].with_vocabulary(90, None))
    assert float((twin(ids) - expected).abs().max()) <= 1e-4
    trunk, tensors = read_transformer(tmp_path)
    assert trunks.read(trunks.write(trunk)) == trunk
    ours = Trunk(trunk).eval().requires_grad_(False)
    ours.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    states = theirs(ids, output_hidden_states=True).hidden_states
    for mine, other in zip(ours.states(ids), states, strict=True):  # their last one has the final norm, too
        assert float((mine - other).abs().max()) <= 1e-4


def test_a_checkpoint_of_another_shape_is_refused_naming_all_of_it(tmp_path: Path) -> None:
    theirs = _theirs("llama, 9 heads over 3")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.self_attn.sinks"] = torch.ones(9)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        read_transformer(tmp_path)
    assert "no llama" in str(refused.value)
    assert "missing: layers.1.self_attn.k_proj.weight" in str(refused.value)
    assert "unknown: layers.0.self_attn.sinks" in str(refused.value)


_LLAMA = {**_TINY, "model_type": "llama", "num_attention_heads": 6}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window is 4096: attention over a window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "sliding_window is 8"),
        ({"model_type": "gemma"}, "model_type is 'gemma'; trunks of gpt2, llama, mistral, qwen2 are computed"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; a llama trunk is computed with 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'; 'default', 'linear' and"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor is '2'; it must be a number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "original_max_position_embeddings is None"),
        ({"rope_theta": 0}, "rope_theta is 0; it must be a number above 1"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 does not divide into num_key_value_heads 4"),
        ({"num_attention_heads": 5}, "hidden_size 72 does not divide into num_attention_heads 5"),
        ({"head_dim": 7}, "head_dim is 7; rotary positions turn pairs"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a number between 0 and 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be an integer from 1 to 1024"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"sense_theta": 1.0}, r"sense_theta is 1\.0; it must be a number above 1"),
        ({"sense_theta": True}, "sense_theta is True; it must be a number above 1"),
        (
            {"sense_theta": 500.0, "sense_head": 9},
            "sense heads are 9 wide; sense_theta turns pairs, so sense_head must",
        ),
        ({"key_layers": [9]}, r"key_layers is \(9,\); it must be layers from 0 to 3, ascending"),
        ({"query_layers": [2, 1]}, r"query_layers is \(2, 1\); it must be layers"),
        ({"senses": "float8"}, "senses is 'float8'; it must be one of 'network', 'bfloat16', 'int8'"),
        ({"sense_head": 0}, "sense_head is 0; it must be an integer"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        BackpackConfig.from_json({**_LLAMA, "num_senses": 4, **values})


def test_a_window_that_is_switched_off_is_none() -> None:
    values = {**_LLAMA, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8}
    assert trunks.read(values).layer.qkv_bias


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_comes_back_from_its_json(name: str) -> None:
    config = FAMILIES[name]
    assert BackpackConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_back_from_its_folder(name: str, tmp_path: Path) -> None:
    model = random_model(FAMILIES[name])
    manifest = save(model, WORDS, tmp_path)
    assert verify(tmp_path) == Manifest.read(tmp_path)
    again, ids = load(tmp_path), torch.randint(90, (2, 40))
    assert torch.equal(again(ids), model(ids))
    assert fingerprint(tmp_path) == manifest.fingerprint
    assert torch.equal(again.sense_table().rows, model.sense_table().rows)


def test_a_finished_table_lies_in_parts_and_all_of_them_count(tmp_path: Path) -> None:
    config = FAMILIES["llama, a table of int8"].with_vocabulary(2 * PART + 5, 0)
    model = random_model(config)
    manifest = save(model, WORDS, tmp_path)
    parts = sorted(path.name for path in tmp_path.glob("senses-*"))
    assert parts == [f"senses-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    again, some = load(tmp_path), torch.tensor([0, PART - 1, PART, 2 * PART + 4, 3])
    assert torch.equal(again.compute_senses(some), model.compute_senses(some))
    assert {part.rows.dtype for part in again.sense_rows} == {torch.int8}
    model.sense_rows[2].rows[4, 1, 1] += 1
    assert save(model, WORDS, tmp_path).fingerprint != manifest.fingerprint
    (tmp_path / parts[1]).unlink()
    with pytest.raises(CheckpointError, match="lacks shard 2 of the 3 of senses"):
        load(tmp_path)


def test_a_network_and_its_finished_table_are_one_model() -> None:
    """What is rounded away aside: patches, tokens and readings come from the table, whoever made it."""
    network = random_model(FAMILIES["llama, grouped heads"])
    config = BackpackConfig.from_json({**network.config.to_json(), "senses": StoredSenses.BFLOAT16})
    finished = Backpack(config).eval().requires_grad_(False)
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("sense_network.")}
    finished.load_state_dict(
        {**state, "sense_rows.0.rows": network.sense_table().rows.bfloat16()}, assign=True, strict=True
    )
    ids = torch.randint(90, (1, 30))
    assert torch.equal(finished.sense_weights(ids), network.sense_weights(ids))
    rounded = network.sense_table().rows.bfloat16().float()
    assert torch.equal(finished.sense_table().rows, rounded)
    torch.testing.assert_close(finished(ids), network(ids), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lab_samples_as_the_model_predicts(name: str) -> None:
    model = random_model(FAMILIES[name])
    table = model.sense_table()
    subject = LabModel(Manifest("ab" * 32, model.config, model.sense_rms()), model, table, Tokenizer.read(WORDS))
    edits = (ScaleEdit(tuple(Cell(token, 1) for token in range(1, 60)), -2.0),)
    overlay = Overlay.compile(ReleaseContent((RevisionContent("ab" * 32, edits),)), table)
    ids = torch.randint(1, 90, (3, 20))
    sampler = BatchSampler(subject, overlay, 3, 20)
    for at in range(20):
        logits = sampler.feed(ids[:, at])
        expected = model(ids[:, : at + 1].contiguous(), overlay)[:, -1, : model.config.tokens]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
