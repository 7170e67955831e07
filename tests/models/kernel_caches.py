"""Shapes of trunks, and caches filled with random numbers, that tests of kernels compute on."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from backpack_lm.config import BackpackConfig
from backpack_lm.int8 import store
from backpack_lm.kernels import Caches, TokenSpan
from backpack_lm.overlay import TopicMultipliers


def llama(vocabulary: int, width: int, layers: int, heads: int, groups: int, **more: Any) -> BackpackConfig:
    return BackpackConfig.from_json(
        {
            "model_type": "llama",
            "vocab_size": vocabulary,
            "max_position_embeddings": 80,
            "hidden_size": width,
            "intermediate_size": width + 14,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "tie_word_embeddings": True,
            "num_senses": 16,
            **more,
        }
    )


# Widths that fill whole vectors and widths that don't; a context that is no multiple of 16.
SHAPES = {
    "of the published kind": BackpackConfig.gpt2(60, 80, 128, n_layer=2, n_head=2, num_senses=16),
    "of our default model's kind": BackpackConfig.gpt2(60, 80, 96, n_layer=2, n_head=3, num_senses=16),
    "odd": BackpackConfig.gpt2(50, 70, 60, n_layer=1, n_head=3, num_senses=5),
    "llama": llama(60, 72, 2, 9, 3, num_senses=5),
    "qwen2, whose sense weights read several states": llama(
        60, 64, 2, 4, 2, model_type="qwen2", head_dim=32, sense_head=24, query_layers=[1, 2], key_layers=[0, 1]
    ),
    "llama, whose sense weights turn": llama(
        60, 64, 2, 4, 2, head_dim=32, sense_head=36, query_layers=[2], key_layers=[0, 1], sense_theta=100.0
    ),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def filled(config: BackpackConfig, dtype: torch.dtype, int8: bool = False, page_size: int = 16) -> Caches:
    """Caches in which each of four slots holds random tokens with random keys, values and annealing. Their pages lie in
    no order; of 16, the first two slots share the first one."""
    torch.manual_seed(3)
    V, k, d = config.vocab_size, config.num_senses, config.n_embd
    table = store(torch.randn(V * k + 7, d) * 0.3, torch.int8 if int8 else dtype)
    embedding = torch.randn(V, d) * 0.3
    caches = Caches.empty(config, 4, table, embedding, dtype, page_size=page_size)
    caches.page_table.copy_(torch.tensor(Random(page_size).sample(range(caches.pages), caches.pages)).view(4, -1))
    if page_size == 16:
        caches.page_table[1, 0] = caches.page_table[0, 0]
    T, generator = -(-config.n_positions // 16) * 16, torch.Generator().manual_seed(4)
    groups, width = caches.values.shape[2], caches.values.shape[4]
    for slot in (1, 0, 2, 3):  # the same numbers whatever the pages
        for layer in range(config.trunk.depth):
            caches.write(layer, slot, 0, *torch.randn(2, T, groups, width, generator=generator).to(dtype))
        keys = torch.randn(T, k, config.sense_head_width, generator=generator).to(dtype)
        caches.write_sense_keys(keys, torch.full((T,), slot), torch.arange(T))
    caches.ids[:, :T] = torch.randint(0, V, (4, T), generator=generator)
    caches.rows.copy_(caches.ids[..., None] * k + torch.arange(k))
    caches.rows[1][caches.ids[1] % 3 == 0, 2] = V * k + 5  # a release's
    for slot in range(4):
        last: dict[int, int] = {}
        for position, token in enumerate(caches.ids[slot].tolist()):
            caches.previous[slot, position] = last.get(token, -1)
            if token in last:
                caches.following[slot, last[token]] = position
            last[token] = position
    return caches


def topics(config: BackpackConfig) -> tuple[TopicMultipliers, ...]:
    draw = torch.Generator().manual_seed(5)
    shape = (config.vocab_size, config.num_senses)
    return tuple(
        TopicMultipliers(
            torch.randint(0, 4, shape, generator=draw, dtype=torch.uint8),
            torch.tensor([3.3, 2.0, 1.5, 1.0]),
            scale,
            annealed,
        )
        for scale, annealed in ((0.44, True), (0.3, True), (0.2, False))
    )


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> None:
    scale = float(b.float().abs().max())
    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=TOLERANCE[dtype] * scale)


SPANS = (TokenSpan(0, 0, 40, 1), TokenSpan(1, 3, 0, 1), TokenSpan(2, 1, 16, 21), TokenSpan(23, 2, 69, 1))
