"""The operations on a CUDA device: Triton for mix, single tokens' attention and drawing, torch for the rest.

What a launch works on is described in buffers that stay where they are: with `describe`, the launches of one step
can be captured and played again for another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backpack_lm.kernels.build import NotBuilt
from backpack_lm.kernels.caches import Caches, DrawParams, MixSpan, StepInput, TokenSpan
from backpack_lm.kernels.interface import Linear
from backpack_lm.kernels.plain import PlainKernels, kept
from backpack_lm.kernels.products import name
from backpack_lm.kernels.topics import describe
from backpack_lm.kernels.trunk import CachedTrunk
from backpack_lm.model import Backpack
from backpack_lm.overlay import TopicMultipliers

Topics = tuple[TopicMultipliers, ...]


class CudaKernels:
    """Torch's operations, except where Triton has a kernel. Raises NotBuilt if Triton is missing, or can't reach the
    caches: compiled, it reaches CUDA devices only; its interpreter (TRITON_INTERPRET=1) a CPU, slowly, for tests.
    """

    def __init__(self, caches: Caches) -> None:
        try:
            import triton

            from backpack_lm.kernels.triton_attention import attend_single
            from backpack_lm.kernels.triton_draw import draw
            from backpack_lm.kernels.triton_mix import FIELDS, Mix
        except ImportError as error:
            raise NotBuilt(f"Triton is missing: {error}; install triton for the fast CUDA kernels") from None
        if caches.table.dtype is torch.int8:
            raise NotBuilt("int8 is computed on a CPU")
        self.caches, self._plain, device = caches, PlainKernels(caches), caches.table.device
        if device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise NotBuilt(f"the caches are on {device}")
        self.name = f"triton {name(caches.table.dtype)}"
        slots = len(caches.ids)
        self._attend_single, self._draw, self._mix = attend_single, draw, Mix(caches)
        self._singles = torch.zeros(slots, 3, dtype=torch.int64, device=device)
        self._predictions = torch.zeros(slots, FIELDS, dtype=torch.int64, device=device)
        self._spans: Sequence[TokenSpan] = ()
        self._predicted: Sequence[MixSpan] = ()
        self._topics: dict[int, tuple[Topics, Tensor]] = {}

    def describe(self, spans: Sequence[TokenSpan], predictions: Sequence[MixSpan]) -> None:
        """Describe the next step on the device. `attend` and `mix` recognize these lists by their identity."""
        self._describe_spans(spans)
        self._describe_predictions(predictions)

    def trunk(self, model: Backpack) -> CachedTrunk:
        return CachedTrunk(self, model)

    def linear(self, weight: Tensor, bias: Tensor, gelu: bool = False, int16_inputs: bool = False) -> Linear:
        return self._plain.linear(weight, bias, gelu)

    def head(self, embedding: Tensor) -> Linear:
        return self._plain.head(embedding)

    def append_tokens(self, new: StepInput, spans: Sequence[TokenSpan]) -> None:
        self._plain.append_tokens(new, spans)

    def residual_norm(self, x: Tensor, delta: Tensor | None, norm: nn.Module) -> Tensor:
        return self._plain.residual_norm(x, delta, norm)

    def rotate(self, qkv: Tensor, positions: Tensor, turns: Tensor, heads: int) -> None:
        self._plain.rotate(qkv, positions, turns, heads)

    def gate(self, wide: Tensor) -> Tensor:
        return self._plain.gate(wide)

    def attend(self, qkv: Tensor, layer: int, spans: Sequence[TokenSpan], scale: float) -> Tensor:
        if spans is not self._spans:
            self._describe_spans(spans)
        chunks = [span for span in spans if span.size > 1]
        caches = self.caches
        _, groups, _, width = caches.values[layer].shape
        empty = qkv.new_empty(len(qkv), qkv.shape[1] - 2 * groups * width)
        out = self._plain.attend(qkv, layer, chunks, scale) if chunks else empty
        if singles := len(spans) - len(chunks):
            single = self._singles[:singles]
            self._attend_single(qkv, caches.keys[layer], caches.values[layer], caches.page_table, single, scale, out)
        return out

    def mix(self, queries: Tensor, predictions: Sequence[MixSpan]) -> Tensor:
        if predictions is not self._predicted:
            self._describe_predictions(predictions)
        return self._mix(queries, self._predictions[: len(predictions)])

    def draw(self, logits: Tensor, params: Sequence[DrawParams]) -> Tensor:
        # The bits of a seed of 64, as a number with a sign.
        keys = torch.tensor([(d.seed - (d.seed >> 63 << 64), d.position) for d in params], device=logits.device)
        temperatures = torch.tensor([d.temperature for d in params], device=logits.device)
        return self._draw(logits, kept(logits, params), keys, temperatures)

    def log_probabilities(self, logits: Tensor, chosen: Sequence[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._plain.log_probabilities(logits, chosen, count)

    def update_annealing(self, prediction: MixSpan, start: int) -> None:
        self._plain.update_annealing(prediction, start)

    def _describe_spans(self, spans: Sequence[TokenSpan]) -> None:
        self._spans = spans
        self._to_device(self._singles, [(r.token, r.slot, r.position) for r in spans if r.size == 1])

    def _describe_predictions(self, predictions: Sequence[MixSpan]) -> None:
        self._predicted = predictions
        self._topics = {id(p.topics): self._launch_table(p.topics) for p in predictions if p.topics}
        rows = [(p.slot, p.length, p.fresh, len(p.topics), self._device_address(p.topics)) for p in predictions]
        self._to_device(self._predictions, rows)

    def _launch_table(self, topics: Topics) -> tuple[Topics, Tensor]:
        """Topics and their description on the device, reused if the last step had the same topics."""
        if held := self._topics.get(id(topics)):
            return held
        records = bytearray(b"".join(map(describe, topics)))
        return topics, torch.frombuffer(records, dtype=torch.uint8).to(self.caches.table.device)

    def _device_address(self, topics: Topics) -> int:
        return self._topics[id(topics)][1].data_ptr() if topics else 0

    def _to_device(self, buffer: Tensor, rows: Sequence[tuple[int, ...]]) -> None:
        if rows:
            buffer[: len(rows)].copy_(torch.tensor(rows), non_blocking=True)
