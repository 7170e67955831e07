"""Whatever the trunk, the engine gives the oracle's tokens, with a different patch on every row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backpack_lm.kernels import Caches, Kernels, choose
from backpack_lm.kernels.plain import PlainKernels
from backpack_lm.patch import (
    AddEdit,
    Cell,
    Edit,
    ScaleEdit,
    SwapEdit,
    TopicEdit,
    Vector,
)
from backpack_serving.engine.sequence import GenerationRequest
from backpack_serving.sampling import SamplingParams

from tests.engine.conftest import compiled
from tests.engine.test_company import engine_in
from tests.engine.test_oracle import oracle, prompt, run
from tests.models.trunk_shapes import FAMILIES, random_model


def _releases(width: int) -> list[tuple[Edit, ...]]:
    some = tuple(Cell(token, sense) for token in range(1, 90) for sense in range(4))
    vectors = torch.randn(90, width, generator=torch.Generator().manual_seed(3)) * 0.5
    adds = tuple(AddEdit((Cell(token, token % 4),), Vector.of(vectors[token].tolist())) for token in range(1, 80))
    return [(), (ScaleEdit(some[::3], -2.0),), adds, (SwapEdit(some, 17, 18),), (*adds, TopicEdit((11, 12, 13), 3))]


@pytest.mark.parametrize("kernels", [PlainKernels, choose])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_the_oracles_with_a_patch_on_every_row(name: str, kernels: Callable[[Caches], Kernels]) -> None:
    """Greedy and drawn ones, in whatever company, with prompts that begin alike and that are read in chunks."""
    model = random_model(FAMILIES[name])
    table = model.sense_table()
    overlays = [compiled(edits, table) for edits in _releases(model.config.n_embd)]
    requests = [
        GenerationRequest(
            f"{n} {temperature}",
            "t",
            prompt(n % 2, 5 + 4 * n),
            SamplingParams(max_tokens=12, temperature=temperature, seed=n, ignore_end_of_text=True),
            overlay,
        )
        for n, overlay in enumerate(overlays)
        for temperature in (0.0, 0.8)
    ]
    tokens = run(engine_in(torch.float32, model, table, kernels=kernels), requests)
    for request in requests:
        assert tokens[request.id] == oracle(model, request), request.id
    assert len(set(map(tuple, tokens.values()))) > len(overlays)
