"""A Transformer in a GGUF file is the one that was written into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from backpack_lm.checkpoint import CheckpointError, read_transformer
from backpack_lm.gguf_file import read_gguf
from backpack_lm.model import Trunk
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, GROUPS, LAYERS = 6, 2, 2
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOKENS = ["<|end|>", *(chr(c) for c in range(33, 127)), "Ġ", "Ġt", "he", "Ġthe"]
MERGES = ["Ġ t", "h e", "Ġt he"]


def _theirs(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=64,
        rope_theta=100_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """As llama.cpp's converter orders the rows of queries and keys."""
    return rows.view(heads, 2, len(rows) // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


def _write(path: Path, model: LlamaForCausalLM, **changed: Any) -> Path:
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    fields: dict[str, Any] = {
        "block_count": LAYERS,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": HEADS,
        "head_count_kv": GROUPS,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": 100_000.0,
        "rope_dimension_count": config.hidden_size // HEADS,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": TOKENS,
        "token_types": [3] + [1] * (len(TOKENS) - 1),
        "token_merges": MERGES,
        "eos_token_id": 0,
        **changed,
    }
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = name.removeprefix("model.").removesuffix(".weight")
        layer, _, part = name.removeprefix("layers.").partition(".") if name.startswith("layers.") else ("", "", name)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = _interleaved(tensor, HEADS if part == "self_attn.q_proj" else GROUPS)
        top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        writer.add_tensor(f"blk.{layer}.{PARTS[part]}.weight" if layer else f"{top[name]}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_a_trunk_in_a_gguf_file_is_the_transformer_in_it(tied: bool, tmp_path: Path) -> None:
    theirs = _theirs(tied)
    trunk, tensors = read_transformer(_write(tmp_path / "model.gguf", theirs))
    assert (trunk.tied, trunk.context, trunk.epsilon, trunk.layer.kv_heads) == (tied, 64, 1e-5, GROUPS)
    ours, ids = Trunk(trunk).eval().requires_grad_(False), torch.randint(len(TOKENS), (2, 50))
    ours.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    logits = ours(ids) @ tensors["wte.weight" if tied else "lm_head.weight"].t()
    assert float((logits - theirs(ids).logits).abs().max()) <= 1e-4


def test_its_tokenizer_splits_digits_one_by_one_and_keeps_special_tokens_whole(tmp_path: Path) -> None:
    found = read_gguf(_write(tmp_path / "model.gguf", _theirs())).tokenizer
    assert found.encode("of the 19<|end|>").tokens == ["o", "f", "Ġthe", "Ġ", "1", "9", "<|end|>"]
    assert found.decode(found.encode("of the 19").ids) == "of the 19"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokenizer_pre": "qwen2"}, "that splits as 'qwen2' isn't read"),
        ({"tokenizer_model": "llama"}, "a tokenizer of the kind 'llama'"),
        ({"rope_dimension_count": 4}, "only 4 of the 8 dimensions of a head are turned"),
        ({"rope_scaling_type": gguf.RopeScalingType.YARN}, "scaled by 'yarn'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_gguf(_write(tmp_path / "model.gguf", _theirs(), **changed))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "model.gguf", _theirs())
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(CheckpointError, match="cut off, or no GGUF file"):
        read_gguf(path)
    path.write_bytes(np.zeros(100, np.uint8).tobytes())
    with pytest.raises(CheckpointError, match="cut off, or no GGUF file"):
        read_gguf(path)
