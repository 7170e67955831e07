"""A tiny random Backpack whose senses matter, and the shape that patches see of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backpack_lm.config import BackpackConfig
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import ModelShape
from torch import Tensor

V, REAL, T, D, K = 61, 57, 20, 16, 4
EOS = 0


def scores(model: Backpack, ids: Tensor, overlay: Overlay) -> list[float]:
    """log p of each of ids [T] but the first, by the model's own forward pass."""
    logs = model(ids[None, :-1], overlay)[0, :, : model.config.tokens].double().log_softmax(-1)
    found: list[float] = logs.gather(1, ids[1:, None])[:, 0].tolist()
    return found


@pytest.fixture(scope="session")
def model() -> Backpack:
    torch.manual_seed(0)
    config = BackpackConfig.gpt2(V, T, D, n_layer=2, n_head=2, num_senses=K, eos_token_id=EOS, num_tokens=REAL)
    model = Backpack(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.1))
    # Small dots E·C, so that annealing is halfway rather than over at once.
    model.sense_network.final_mlp.c_proj.weight *= 0.2
    return model


@pytest.fixture(scope="session")
def table(model: Backpack) -> SenseTable:
    return model.sense_table()


@pytest.fixture(scope="session")
def shape(model: Backpack) -> ModelShape:
    return ModelShape("ab" * 32, REAL, K, D, model.sense_rms())


@pytest.fixture(scope="session")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Transformer in Hugging Face's layout, with a tokenizer, and a text."""
    from tests.models.adapting_run import make_transformer  # here, as transformers takes seconds to load

    return make_transformer(tmp_path_factory.mktemp("transformer"))
