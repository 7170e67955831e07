"""On a GPU: the oracle's tokens, and captured steps that compute what their kernels do one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backpack_lm.kernels import Caches, Kernels, choose
from backpack_lm.kernels.cuda import CudaKernels
from backpack_lm.kernels.plain import PlainKernels
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.executor import Step
from backpack_serving.engine.runner import Runner
from backpack_serving.engine.scheduler import Batch, Chunk, Scheduler
from backpack_serving.engine.sequence import GenerationRequest, Sequence
from backpack_serving.engine.slots import OverlayRows, Slots

from tests.engine.conftest import K, V
from tests.engine.test_oracle import GREEDY, oracle, prompt, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

SPACE = 4 * V * K
Make = Callable[[Caches], Kernels]


def _runner(
    model: Backpack, table: SenseTable, slots: int, kernels: Make = choose, dtype: torch.dtype = torch.float32
) -> Runner:
    return Runner(model, table.with_room(SPACE, dtype).cuda(), slots, kernels)


def _engine(runner: Runner, slots: int) -> Engine:
    return Engine(runner, Slots(slots), OverlayRows(SPACE), Scheduler(16, 64), share_prefixes=True)


@pytest.mark.parametrize("kernels", [choose, CudaKernels, PlainKernels])
def test_the_oracles_tokens(model, table, overlays, kernels) -> None:
    requests = [
        GenerationRequest(f"{name} {n}", name, prompt(n, 5 + 3 * n), GREEDY, overlay)
        for n in range(3)
        for name, overlay in overlays.items()
    ]
    engine = _engine(_runner(model, table, 7, kernels), 7)
    tokens = run(engine, requests)
    assert tokens == {request.id: oracle(model, request) for request in requests}
    assert engine.prefix_hits


def _decoded(runner: Runner, overlays: dict[str, Overlay], steps: int = 4) -> torch.Tensor:
    """Logits [steps, B, tokens] of forced tokens, one sequence for each release."""
    sequences = []
    for slot, (name, overlay) in enumerate(overlays.items()):
        sequence = Sequence(GenerationRequest(name, "t", prompt(slot, 9 + slot), GREEDY, overlay))
        sequence.slot = slot
        first_row = sum(len(other.rows) for other in list(overlays.values())[:slot])
        runner.load(overlay, first_row)
        runner.start(slot, overlay, first_row)
        sequences.append(sequence)
    runner.run(Step.of(Batch((), tuple(Chunk(s, 0, len(s.tokens)) for s in sequences))))
    made = []
    for step in range(steps):
        for n, sequence in enumerate(sequences):
            sequence.tokens.append((7 * step + n) % 90)
        made.append(runner.run(Step.of(Batch(tuple(sequences), ()))).clone())
    return torch.stack(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_captured_steps_compute_what_their_kernels_do(model, table, overlays, dtype) -> None:
    few = {name: overlays[name] for name in ("none", "swap", "topic")}  # 3 of 4 slots: one is filled up
    captured, eager = (_runner(model, table, 4, choose, dtype) for _ in range(2))
    assert isinstance(captured.kernels, CudaKernels)
    eager._graphs = None
    expected = _decoded(eager, few)
    # The graph's matrix products have one row more, so cuBLAS may sum in another order.
    tolerance = (1e-5 if dtype is torch.float32 else 2e-2) * float(expected.abs().max())
    torch.testing.assert_close(_decoded(captured, few), expected, rtol=0, atol=tolerance)


def test_bfloat16_is_near_float32(model, table, overlays) -> None:
    few = {name: overlays[name] for name in ("none", "swap", "topic")}
    exact = _decoded(Runner(model, table.with_room(SPACE), 3, PlainKernels), few)
    rounded = _decoded(_runner(model, table, 3, choose, torch.bfloat16), few).cpu()
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1 * float(exact.abs().max()))
