"""What tests of adapting share: a small random Transformer, a recipe, and a run of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from backpack_lm.adapting import adapter as adapters
from backpack_lm.adapting.recipe import AdaptRecipe
from backpack_lm.adapting.trainer import AdaptTrainer, Teacher
from backpack_lm.checkpoint import read_trunk
from backpack_lm.kernels import Precision
from backpack_lm.training.data import Rows, Source, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

RECIPE = AdaptRecipe(
    steps=8, distinct_rows=12, senses=5, sense_head=8, sense_theta=50.0, sense_inner=20, row_tokens=24,
    rows_per_step=2, start_rows=12, tuned_layers=1, precision=Precision.FLOAT32,
)  # fmt: skip
TEXT = "The king of the ship and the queen of the court went down to the sea, and the ship was gone.\n"


def make_transformer(folder: Path) -> Path:
    """A random Llama in Hugging Face's layout, with a tokenizer, and a text."""
    text = folder / "text.jsonl"
    words = TEXT.split()
    random = np.random.default_rng(0)
    text.write_text("".join(json.dumps({"text": " ".join(random.choice(words, 60))}) + "\n" for _ in range(600)))
    size = train_tokenizer([Source(text)], 300, folder / "tokenizer.json").vocab_size
    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    made = LlamaForCausalLM(shape)
    made.model.norm.weight.data.uniform_(0.5, 1.5)  # as after training; at 1, to apply it twice is to apply it once
    made.save_pretrained(folder)
    return folder


def trainer_of(
    where: Path, out: Path, recipe: AdaptRecipe = RECIPE, cache: Path | None = None, after: Path | None = None
) -> AdaptTrainer:
    trunk, embedding = read_trunk(where)
    size = trunk.spec.vocab_size
    random = np.random.default_rng(2)
    streams = [random.integers(1, size, 4000).astype(np.uint16) for _ in range(2)]
    rows = Rows(streams[:1], [1.0], recipe.seed, 0)
    teacher = Teacher(trunk, embedding, adapters.digest(where))
    config = recipe.config(trunk.spec, 0, size)
    held_out, cache = {"other": streams[1]}, cache or out / "cache"
    return AdaptTrainer(teacher, config, recipe, rows, held_out, out, cache, after=after)
