"""Decode steps as captured CUDA graphs: one launch where the step has hundreds.

A graph is one sequence of kernels over fixed places in memory, for one number of tokens. So what a step works on
is copied to where the graph reads it, and a step with fewer tokens is filled up with tokens of a scratch slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from backpack_lm.kernels import MixSpan, StepInput, TokenSpan
from backpack_lm.kernels.cuda import CudaKernels
from torch import Tensor

WARM_UP = 2
"""Runs before a step is captured: libraries allocate and kernels are compiled in them."""


Step = Callable[[StepInput, Sequence[TokenSpan], Sequence[MixSpan]], Tensor]
"""A decode step: logits [B, tokens] of one new token in each of B slots."""

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Runs a computation over fixed places; how to repeat it, and where its result then is."""


@dataclass(slots=True)
class _Recorded:
    """A step of a number of tokens, and the places that it works on."""

    new: StepInput
    spans: list[TokenSpan]
    predictions: list[MixSpan]
    replay: Callable[[], object] = field(init=False)
    logits: Tensor = field(init=False)


class Graphs:
    """Decode steps of 1, 2, 4, … and at most all slots, recorded at the start.

    `scratch` is a slot of the caches that no sequence has. Logits are valid until the next step.
    """

    def __init__(self, step: Step, kernels: CudaKernels, slots: int, record: Record | None = None) -> None:
        self._kernels, self._scratch, self._record = kernels, slots, record or _Capture()
        device, senses = kernels.caches.table.device, kernels.caches.rows.shape[2]
        tokens, places, positions = torch.zeros(3, slots, dtype=torch.int64, device=device)
        rows = torch.zeros(slots, senses, dtype=torch.int32, device=device)
        self._new = StepInput(tokens, places, positions, rows)
        self._recorded = {size: self._make(step, size) for size in reversed(list(_batch_sizes(slots)))}  # largest first

    def run(self, new: StepInput, spans: Sequence[TokenSpan], predictions: Sequence[MixSpan]) -> Tensor:
        """Logits [B, tokens] of a step of B spans of one token; `new` are on the CPU."""
        recorded = self._recorded[min(size for size in self._recorded if size >= len(spans))]
        self._fill(recorded, new, spans, predictions)
        recorded.replay()
        return recorded.logits[: len(spans)]

    def _fill(
        self, into: _Recorded, new: StepInput, spans: Sequence[TokenSpan], predictions: Sequence[MixSpan]
    ) -> None:
        """Copy a step's input to where the graph reads it, padded with tokens of the scratch slot."""
        count, size, scratch = len(spans), len(into.spans), self._scratch
        for place, part, rest in zip(into.new, new, (0, scratch, 0, 0), strict=True):
            padding = (0,) * (2 * part.ndim - 1) + (size - count,)  # behind the first dimension
            place.copy_(F.pad(part, padding, value=rest), non_blocking=True)
        into.spans[:] = *spans, *(TokenSpan(n, scratch, 0, 1) for n in range(count, size))
        into.predictions[:] = *predictions, *(MixSpan(scratch, 1, False) for _ in range(count, size))
        self._kernels.describe(into.spans, into.predictions)

    def _make(self, step: Step, size: int) -> _Recorded:
        """Record a step of the scratch slot alone: recording runs it, which must not touch a sequence."""
        new = StepInput._make(part[:size] for part in self._new)
        made = _Recorded(new, [TokenSpan(0, 0, 0, 1)] * size, [])
        self._fill(made, StepInput._make(part[:0].cpu() for part in new), [], [])
        made.replay, made.logits = self._record(lambda: step(made.new, made.spans, made.predictions))
        return made


def _batch_sizes(slots: int) -> Iterator[int]:
    size = 1
    while size < slots:
        yield size
        size *= 2
    yield slots


class _Capture:
    """`Record` by CUDA graphs, which share the memory of what is between their kernels."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                compute()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            result = compute()
        return graph.replay, result
