"""The operations on a CUDA device: Triton for mix, single tokens' attention and drawing, torch for the rest.

What a launch works on is described in buffers that stay where they are: with `describe`, the launches of one step
can be captured and played again for another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backpack_lm.kernels.build import NotBuilt
from backpack_lm.kernels.caches import Caches, DrawParams, MixSpan, TokenSpan
from backpack_lm.kernels.plain import PlainKernels, kept
from backpack_lm.kernels.topics import describe
from backpack_lm.overlay import TopicMultipliers

Topics = tuple[TopicMultipliers, ...]


class CudaKernels(PlainKernels):
    """Raises NotBuilt if Triton is missing, or the caches are where it can't reach them.

    Its interpreter (TRITON_INTERPRET=1) reaches a CPU, slowly: that is for tests.
    """

    def __init__(self, caches: Caches) -> None:
        try:
            import triton

            from backpack_lm.kernels.triton_attention import attend_single
            from backpack_lm.kernels.triton_draw import draw
            from backpack_lm.kernels.triton_mix import FIELDS, Mix
        except ImportError as error:
            raise NotBuilt(f"Triton is missing: {error}; install triton for the fast CUDA kernels") from None
        super().__init__(caches)
        if self._device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise NotBuilt(f"the caches are on {self._device}")
        self.name = f"triton {str(caches.table.dtype).removeprefix('torch.')}"
        slots = len(caches.ids)
        self._attend_single, self._draw, self._mix = attend_single, draw, Mix(caches)
        self._singles = torch.zeros(slots, 3, dtype=torch.int64, device=self._device)
        self._predictions = torch.zeros(slots, FIELDS, dtype=torch.int64, device=self._device)
        self._runs: Sequence[TokenSpan] = ()
        self._predicted: Sequence[MixSpan] = ()
        self._topics: dict[int, tuple[Topics, Tensor]] = {}

    def describe(self, runs: Sequence[TokenSpan], predictions: Sequence[MixSpan]) -> None:
        """Say what the next step works on. `attend` and `mix` know these lists again by their identity."""
        self._describe_runs(runs)
        self._describe_predictions(predictions)

    def attend(self, qkv: Tensor, layer: int, runs: Sequence[TokenSpan], scale: float) -> Tensor:
        if runs is not self._runs:
            self._describe_runs(runs)
        chunks = [run for run in runs if run.size > 1]
        out = super().attend(qkv, layer, chunks, scale) if chunks else qkv.new_empty(len(qkv), self._width)
        if singles := len(runs) - len(chunks):
            caches = self.caches
            self._attend_single(qkv, caches.keys[layer], caches.values[layer], self._singles[:singles], scale, out)
        return out

    def mix(self, queries: Tensor, predictions: Sequence[MixSpan]) -> Tensor:
        if predictions is not self._predicted:
            self._describe_predictions(predictions)
        return self._mix(queries, self._predictions[: len(predictions)])

    def draw(self, logits: Tensor, how: Sequence[DrawParams]) -> Tensor:
        # The bits of a seed of 64, as a number with a sign.
        keys = torch.tensor([(d.seed - (d.seed >> 63 << 64), d.position) for d in how], device=logits.device)
        temperatures = torch.tensor([d.temperature for d in how], device=logits.device)
        return self._draw(logits, kept(logits, how), keys, temperatures)

    @property
    def _width(self) -> int:
        return self.caches.table.shape[1]

    def _describe_runs(self, runs: Sequence[TokenSpan]) -> None:
        self._runs = runs
        self._to_device(self._singles, [(r.token, r.slot, r.position) for r in runs if r.size == 1])

    def _describe_predictions(self, predictions: Sequence[MixSpan]) -> None:
        self._predicted = predictions
        self._topics = {id(p.topics): self._launch_table(p.topics) for p in predictions if p.topics}
        rows = [(p.slot, p.length, p.fresh, len(p.topics), self._device_address(p.topics)) for p in predictions]
        self._to_device(self._predictions, rows)

    def _launch_table(self, topics: Topics) -> tuple[Topics, Tensor]:
        """Topics and their description on the device, which the last step may have left there."""
        if held := self._topics.get(id(topics)):
            return held
        records = bytearray(b"".join(map(describe, topics)))
        return topics, torch.frombuffer(records, dtype=torch.uint8).to(self._device)

    def _device_address(self, topics: Topics) -> int:
        return self._topics[id(topics)][1].data_ptr() if topics else 0

    def _to_device(self, buffer: Tensor, rows: Sequence[tuple[int, ...]]) -> None:
        if rows:
            buffer[: len(rows)].copy_(torch.tensor(rows), non_blocking=True)
