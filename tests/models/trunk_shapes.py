"""Small Backpacks on trunks of every family, whose sense weights read whatever they may."""

from __future__ import annotations

from typing import Any

import torch
from backpack_lm.config import BackpackConfig, StoredSenses
from backpack_lm.model import Backpack

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 48,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
_SENSES: dict[str, Any] = {"num_senses": 4, "eos_token_id": 0, "num_tokens": 93}
_SCALED = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

FAMILIES: dict[str, BackpackConfig] = {
    "gpt2": BackpackConfig.gpt2(97, 48, 32, 3, 4, **_SENSES),
    "gpt2, keys of a middle layer": BackpackConfig.gpt2(97, 48, 32, 3, 4, **_SENSES, key_layers=[2]),
    "llama, grouped heads": BackpackConfig.from_json({**_LLAMA, **_SENSES}),
    "llama, untied, wide heads, scaled": BackpackConfig.from_json(
        {
            **_LLAMA,
            **_SENSES,
            "head_dim": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            "rope_scaling": _SCALED,
        }
    ),
    "qwen2, all states": BackpackConfig.from_json(
        {
            **_LLAMA,
            **_SENSES,
            "model_type": "qwen2",
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "query_layers": [3],
            "key_layers": [0, 1, 2, 3],
            "sense_head": 16,
        }
    ),
    "llama, sense weights by distance": BackpackConfig.from_json(
        {**_LLAMA, **_SENSES, "query_layers": [2, 3], "key_layers": [1], "sense_head": 10, "sense_theta": 500.0}
    ),
    "gpt2, sense weights by distance": BackpackConfig.gpt2(97, 48, 32, 3, 4, **_SENSES, sense_theta=10_000),
    "llama, a table of int8": BackpackConfig.from_json({**_LLAMA, **_SENSES, "senses": "int8", "key_layers": [1]}),
    "llama, a table of bfloat16": BackpackConfig.from_json({**_LLAMA, **_SENSES, "senses": "bfloat16"}),
}


def random_model(config: BackpackConfig, seed: int = 0) -> Backpack:
    """Random weights, large enough that senses, positions and patches all matter to the argmax."""
    torch.manual_seed(seed)
    model = Backpack(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.25) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    if config.senses is StoredSenses.NETWORK:
        # Small dots E·C, so that annealing is halfway rather than over at once.
        model.sense_network.final_mlp.c_proj.weight *= 0.1
        model.sense_network.final_mlp.c_proj.bias *= 0.1
        return model
    for part in model.sense_rows:
        if part.scales is None:
            part.rows.copy_(torch.randn(part.rows.shape) * 0.3)
        else:
            part.rows.random_(-127, 128)
            part.scales.uniform_(0.002, 0.006)
    return model
