"""Logits that aren't numbers end their request, with an error that says so, and nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from backpack_lm.kernels.native import NativeKernels
from backpack_lm.kernels.plain import PlainKernels
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import Cell
from backpack_serving.engine.loop import EngineLoop, NonFiniteLogits
from backpack_serving.engine.sampler import choose_all
from backpack_serving.engine.sequence import Finish, GenerationRequest, Output
from backpack_serving.sampling import SamplingParams

from tests.engine.conftest import D, K, outputs_of
from tests.engine.test_company import engine_in
from tests.engine.test_oracle import GREEDY, oracle, prompt

SAMPLINGS = {
    "greedy": GREEDY,
    "drawn": SamplingParams(max_tokens=20, seed=1, ignore_end_of_text=True),
    "of the likeliest": SamplingParams(max_tokens=20, seed=1, top_k=5, ignore_end_of_text=True),
    "with log-probabilities": replace(GREEDY, log_probabilities=3),
}
WORD = 40
"""The broken release breaks it, and no other."""


@pytest.fixture(params=[float("nan"), float("inf")], ids=["NaN", "infinity"])
def broken(request: pytest.FixtureRequest) -> Overlay:
    """Vectors that no revision may have, and that the memory of a replica may."""
    return Overlay("broken", [Cell(WORD, 1)], torch.full((1, D), request.param), (), K)


def _requests(broken: Overlay, overlays: dict[str, Overlay], sampling: SamplingParams) -> list[GenerationRequest]:
    others = [
        GenerationRequest(name, "t", prompt(n, 6 + n), GREEDY, overlays[name])
        for n, name in enumerate(("none", "topic"))
    ]
    return [*others, GenerationRequest("broken", "t", (5, WORD, 7), sampling, broken)]


@pytest.mark.parametrize("kernels", [NativeKernels, PlainKernels])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_they_end_their_request_and_no_other(
    kernels: type, sampling: str, broken: Overlay, model: Backpack, table: SenseTable, overlays: dict[str, Overlay]
) -> None:
    engine = engine_in(torch.float32, model, table, kernels=kernels)
    requests = _requests(broken, overlays, SAMPLINGS[sampling])
    made = outputs_of(engine, requests)
    assert made.pop("broken") == [Output("broken", -1, "broken", None, Finish.NON_FINITE)]
    for request in requests[:2]:
        assert [output.token for output in made[request.id]] == oracle(model, request)
    engine.add(GenerationRequest("again", "t", prompt(0, 6), GREEDY, overlays["none"]))  # in the slot that they left
    assert len([output for _ in range(20) for output in engine.step()]) == 20


async def test_the_loop_raises_it_to_whom_it_concerns(
    broken: Overlay, model: Backpack, table: SenseTable, overlays: dict[str, Overlay]
) -> None:
    loop = EngineLoop(engine_in(torch.float32, model, table))

    async def ask(request: GenerationRequest) -> list[int]:
        return [output.token async for outputs in loop.generate(request) for output in outputs]

    requests = _requests(broken, overlays, GREEDY)
    first, second, error = await asyncio.gather(*map(ask, requests), return_exceptions=True)
    assert [first, second] == [oracle(model, request) for request in requests[:2]]
    assert isinstance(error, NonFiniteLogits)
    assert "release broken" in str(error)
    assert loop.healthy
    await loop.stop()


@pytest.mark.parametrize("kernels", [NativeKernels, PlainKernels])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_one_logit_is_enough(
    kernels: Callable[..., NativeKernels], sampling: str, model: Backpack, table: SenseTable
) -> None:
    """Wherever it stands; −∞ is a logit like another, until there is nothing else."""
    draw = engine_in(torch.float32, model, table, kernels=kernels)._executor.kernels.draw
    logits = torch.randn(7, 93, generator=torch.Generator().manual_seed(1))
    logits[1, 92] = logits[2, 0] = float("nan")
    logits[3, 50] = float("inf")
    logits[4, 1:] = float("-inf")
    logits[5] = float("-inf")
    chosen: Sequence[int | None] = choose_all(logits, [SAMPLINGS[sampling]] * 7, range(7), draw)
    assert [token is None for token in chosen] == [False, True, True, True, False, True, False]
    assert chosen[4] == 0
