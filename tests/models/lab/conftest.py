"""A tiny random Backpack with a real tokenizer in a servable folder, and one of Small's shape but few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backpack_lm.checkpoint import save
from backpack_lm.config import SMALL, BackpackConfig
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.manifest import Manifest
from backpack_lm.model import Backpack
from backpack_lm.training.data import Source, train_tokenizer

TEXT = """The nurse said that she would see the king. The king said that he had a ship on the sea.
The lawyer came into the room and the nurse asked what the ship carried. When the captain of the ship looked over
the sea, he saw the land. A king went to the court, and the lawyer went there too, because the court is where he
works. The cook believes that the teacher has an apple; the teacher said that she likes the apple.
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{n}. {TEXT}"}) + "\n" for n in range(400)))
    tokenizer = train_tokenizer([Source(corpus)], 420, folder / "tokenizer.json")
    torch.manual_seed(0)
    config = BackpackConfig.gpt2(tokenizer.vocab_size, 64, 32, 2, 2, num_senses=4, eos_token_id=tokenizer.end_of_text)
    model = Backpack(config).eval().requires_grad_(False)
    # As initialised, a position weighs itself most: here, what stands before has to count.
    torch.nn.init.normal_(model.sense_weight_net.c_attn.weight, std=0.02)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.1))
    # Small dots E·C, so that annealing is halfway rather than over at once.
    model.sense_network.final_mlp.c_proj.weight *= 0.2
    save(model, folder / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def subject(folder: Path) -> LabModel:
    return LabModel.read(folder)


@pytest.fixture(scope="session")
def small(subject: LabModel) -> LabModel:
    """Small in everything but its vocabulary: 50,264 words would take half an hour of denominators."""
    torch.manual_seed(1)
    config = SMALL.with_vocabulary(subject.config.vocab_size, 0)
    model = Backpack(config).eval().requires_grad_(False)
    model.embedding.mul_(10)
    torch.nn.init.normal_(model.sense_weight_net.c_attn.weight, std=0.1)
    manifest = Manifest("ab" * 32, config, model.sense_rms())
    return LabModel(manifest, model, model.sense_table(), subject.tokenizer)
