"""Pretrained Transformers in GGUF files, llama.cpp's format: shape, tensors and tokenizer as Hugging Face has them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from backpack_lm.layouts import CheckpointError

SUFFIX = ".gguf"

_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
"""Of an architecture's metadata, without its name in front."""

_PARTS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_DIGITS_APART = {"gpt-2": False, "smollm": True}
"""Whether digits are split one by one, before words are split as GPT-2's, by `tokenizer.ggml.pre`."""

_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_INTERLEAVED = ("attn_q", "attn_k")
_SPECIAL = 3  # of `tokenizer.ggml.token_type`: control tokens, which no text makes


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What a file holds: `config` and `tensors` in Hugging Face's spelling, a tokenizer, a chat template if any."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: HFTokenizer
    chat_template: str | None


def read_gguf(path: Path) -> GgufModel:
    """Read a model of the Llama kind; tensors are made dense, float32. Needs the package gguf.

    Raises CheckpointError if the file can't be read, or holds what isn't computed here.
    """
    reader, fields = _open(path)
    from gguf import dequantize

    config = _config_of_metadata(path, fields)
    tensors: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        try:
            values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{path}: {tensor.name} can't be made dense: {error}") from None
        match = _NAME.fullmatch(tensor.name)
        if match is None or match[2] not in _PARTS:
            raise CheckpointError(f"{path}: unknown tensor {tensor.name}")
        layer, part, kind = match.groups()
        if part in _INTERLEAVED and config["model_type"] in ("llama", "mistral"):
            values = _in_halves(values, config["num_key_value_heads" if part == "attn_k" else "num_attention_heads"])
        tensors[f"layers.{layer}.{_PARTS[part]}.{kind}" if layer else f"{_PARTS[part]}.{kind}"] = values
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return GgufModel(config, tensors, _tokenizer_of_metadata(path, fields), fields.get("tokenizer.chat_template"))


def tokenizer_of(path: Path) -> HFTokenizer:
    """The tokenizer of a file alone. Raises CheckpointError."""
    return _tokenizer_of_metadata(path, _open(path)[1])


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """A file's reader, and its metadata."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(f"{path} is a GGUF file; `pip install gguf` to read it") from None
    try:
        reader = GGUFReader(path)
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} can't be read: it is cut off, or no GGUF file: {error}") from None


def _config_of_metadata(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    family = fields.get("general.architecture")
    config: dict[str, Any] = {"model_type": family, "vocab_size": len(fields.get("tokenizer.ggml.tokens", ()))}
    for name, ours in _FIELDS.items():
        if (value := fields.get(f"{family}.{name}")) is not None:
            # A float32 of the file, by the shortest number that it is the nearest of.
            config[ours] = float(str(np.float32(value))) if isinstance(value, float) else value
    if (scaling := fields.get(f"{family}.rope.scaling.type", "none")) != "none":
        raise CheckpointError(f"{path}: rotary positions scaled by {scaling!r} aren't read from GGUF files")
    turned, width = fields.get(f"{family}.rope.dimension_count"), config.get("head_dim")
    whole = width or config.get("hidden_size", 0) // max(1, config.get("num_attention_heads", 1))
    if turned not in (None, whole):
        raise CheckpointError(
            f"{path}: only {turned} of the {whole} dimensions of a head are turned, which isn't computed"
        )
    if (end := fields.get("tokenizer.ggml.eos_token_id")) is not None:
        config["eos_token_id"] = end
    return config


def _in_halves(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp turns neighbouring rows of a head, Hugging Face row i with row i + w/2: the latter's order."""
    halves: Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2)
    return halves.reshape(rows.shape)


def _tokenizer_of_metadata(path: Path, fields: dict[str, Any]) -> HFTokenizer:
    kind, splitter = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or splitter not in _DIGITS_APART:
        raise CheckpointError(
            f"{path}: a tokenizer of the kind {kind!r} that splits as {splitter!r} isn't read; byte-level BPE that "
            f"splits as {' or '.join(map(repr, _DIGITS_APART))} is. Give the model's tokenizer.json"
        )
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = HFTokenizer(models.BPE(vocabulary, pairs))
    words: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _DIGITS_APART[splitter] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, *words])
    tokenizer.decoder = decoders.ByteLevel()
    special = (token for token, of in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if of == _SPECIAL)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer
