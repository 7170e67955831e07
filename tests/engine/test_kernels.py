"""The engine gives the oracle's tokens on every set of kernels, not only on this machine's fastest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from backpack_lm.kernels import Caches, Kernels
from backpack_lm.kernels.cuda import CudaKernels
from backpack_lm.kernels.plain import PlainKernels
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.graphs import Record
from backpack_serving.engine.runner import Runner
from backpack_serving.engine.scheduler import Scheduler
from backpack_serving.engine.sequence import GenerationRequest
from backpack_serving.engine.slots import OverlayRows, Slots
from backpack_serving.sampling import SamplingParams

from tests.engine.conftest import K, V
from tests.engine.test_oracle import GREEDY, oracle, prompt, run

Make = Callable[[Caches], Kernels]
SAMPLED = SamplingParams(max_tokens=6, temperature=0.8, seed=3, ignore_end_of_text=True)


@pytest.fixture
def make_engine_on(model: Backpack, table: SenseTable) -> Callable[..., Engine]:
    def make(kernels: Make, slots: int, record: Record | None = None) -> Engine:
        space = 4 * V * K
        runner = Runner(model, table.with_room(space), slots, kernels, record)
        return Engine(runner, Slots(slots), OverlayRows(space), Scheduler(16, 64), share_prefixes=True)

    return make


def _requests(overlays: dict[str, Overlay], each: int) -> list[GenerationRequest]:
    """Prompts of different lengths, many beginning alike, that end at different steps: so batches shrink."""
    cases = [(n, name) for n in range(each) for name in overlays]
    return [
        GenerationRequest(
            f"{name} {n}", name, prompt(n, 4 + 3 * n), replace(GREEDY, max_tokens=2 + 2 * at % 14), overlays[name]
        )
        for at, (n, name) in enumerate(cases)
    ]


def _check(engine: Engine, model: Backpack, requests: list[GenerationRequest]) -> None:
    tokens = run(engine, requests)
    for request in requests:
        assert tokens[request.id] == oracle(model, request), request.id


def test_the_plain_kernels(make_engine_on, model, overlays) -> None:
    engine: Engine = make_engine_on(PlainKernels, 5)
    _check(engine, model, _requests(overlays, 3))
    _check(engine, model, [GenerationRequest("sampled", "t", prompt(5, 9), SAMPLED, overlays["topic"])])
    assert engine.prefix_hits


STEERED = ("none", "swap", "topic", "bias", "two topics, one constant, on edited rows")


def test_tritons_kernels(make_engine_on, model, overlays) -> None:
    pytest.importorskip("triton")
    _check(make_engine_on(CudaKernels, 4), model, _requests({name: overlays[name] for name in STEERED}, 1))


def test_a_recorded_step_is_played_again_for_other_sequences(make_engine_on, model, overlays) -> None:
    """What is captured on a GPU is here a computation over the same fixed places, done again for each step: with
    tokens, slots and the releases' topics and biases, and how many there are, changing between."""
    pytest.importorskip("triton")
    sizes: list[int] = []

    def record(compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        result = compute()

        def replay() -> None:
            sizes.append(len(result))
            result.copy_(compute())

        return replay, result

    engine = make_engine_on(CudaKernels, 4, record)
    _check(engine, model, _requests({name: overlays[name] for name in (*STEERED, "add")}, 1))
    assert set(sizes) == {1, 2, 4}  # three were filled up to four
