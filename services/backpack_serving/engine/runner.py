"""One step of the model over a mixed batch, with caches: the only file that touches device memory.

Linear layers run over all new tokens at once, flattened [N, d]; attention reads of each slot what is valid. The
sense mix is a lookup: every position of a slot keeps the k rows of the sense table that are its senses, and a
release's rows lie behind the table, so a patched sense costs what any sense costs.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from copy import deepcopy
from dataclasses import dataclass

import torch
from backpack_lm.kernels import Caches, Kernels, Linear, Prediction, Run, choose
from backpack_lm.kernels.cuda import CudaKernels
from backpack_lm.model import Backpack, Block
from backpack_lm.overlay import Overlay, TopicMultipliers
from torch import Tensor, nn

from backpack_serving.engine.graphs import Graphs, Inputs, Record
from backpack_serving.engine.scheduler import Batch
from backpack_serving.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class _Occupant:
    """What a slot holds: the overlay it was started with, where its rows begin in the table, its topics on the
    device."""

    overlay: Overlay
    first_row: int
    edited: frozenset[int]
    topics: tuple[TopicMultipliers, ...]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A trunk block, its matrices as the kernels want them. `after` is the LayerNorm that follows the block."""

    qkv: Linear
    proj: Linear
    norm: nn.LayerNorm
    fc: Linear
    out: Linear
    after: nn.LayerNorm
    scale: float


class Runner:
    """The tensors of one replica.

    `table` [V·k + R, d] holds the model's sense vectors and has room for R rows of releases behind them; its
    device and dtype are those of the computation, wherever the model is. On a CUDA device decode steps are
    captured graphs; `record` is for tests without one.
    """

    def __init__(
        self,
        model: Backpack,
        table: Tensor,
        slots: int,
        kernels: Callable[[Caches], Kernels] = choose,
        record: Record | None = None,
    ) -> None:
        config = self.config = model.config
        trunk, device = model.gpt2_model, table.device
        self.table, self.base_rows = table, config.vocab_size * config.num_senses
        recorded = record is not None or device.type == "cuda"
        # One slot more, which no sequence gets, for graphs to fill up with.
        self.caches = Caches.empty(config, slots + recorded, table, model.embedding.detach())
        self.kernels = kernels(self.caches)
        self._tokens, self._positions = (e.weight.detach().to(device) for e in (trunk.wte, trunk.wpe))
        blocks = [block for block in trunk.h if isinstance(block, Block)]
        norms = [self._norm(norm) for norm in (*(block.ln_1 for block in blocks), trunk.ln_f)]
        self._first = norms[0]
        self._layers = [self._layer(block, after) for block, after in zip(blocks, norms[1:], strict=True)]
        weights = model.sense_weight_net.c_attn
        self._sense_weights = self.kernels.linear(weights.weight, weights.bias)
        self._head = self.kernels.head(model.embedding[: config.tokens])  # padding is never sampled
        self._occupants: list[_Occupant | None] = [None] * slots
        self._last: list[dict[int, int]] = [{} for _ in range(slots)]  # where each token of a slot stood last
        self._senses = torch.arange(config.num_senses, dtype=torch.int32)
        self._graphs: Graphs | None = None
        if recorded and isinstance(self.kernels, CudaKernels):
            with torch.inference_mode():
                self._graphs = Graphs(self._decode, self.kernels, slots, record)

    def load(self, overlay: Overlay, first_row: int) -> None:
        """Copy a release's rows behind the table, from `first_row` of the space kept for them."""
        start = self.base_rows + first_row
        self.table[start : start + len(overlay.rows)] = overlay.rows

    def start(self, slot: int, overlay: Overlay, first_row: int) -> None:
        """Give a slot to a sequence steered by an overlay whose rows are loaded at `first_row`."""
        edited = frozenset(overlay.tokens.tolist())
        same = next((o for o in self._occupants if o and o.overlay is overlay), None)
        topics = same.topics if same else tuple(topic.to(self.table.device) for topic in overlay.topics)
        self._occupants[slot] = _Occupant(overlay, self.base_rows + first_row, edited, topics)
        self._last[slot] = {}

    @torch.inference_mode()
    def reuse(self, donor: int, slot: int, tokens: Many[int]) -> None:
        """Begin a slot with tokens whose caches another slot, or this one, holds: a copy, not a computation.

        Caches are the model's alone; rows and annealing are the new occupant's own.
        """
        if donor != slot:
            self.caches.copy_prefix(donor, slot, len(tokens))
        self._place(self._inputs([Run(0, slot, 0, len(tokens))], tokens).to(self.table.device))
        self._satisfy(slot, 0, len(tokens))

    def digest(self, slot: int) -> str:
        """Digest of the release that the slot's sequence is being computed with."""
        return self._occupant(slot).overlay.digest

    def stop(self, slot: int) -> None:
        self._occupants[slot] = None

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Compute a batch; logits [B, tokens] float32 of the next token of each of `batch.sampled`.

        They are valid until the next batch is computed.
        """
        runs = [Run(n, _slot(s), len(s.tokens) - 1, 1) for n, s in enumerate(batch.decodes)]
        ids = [s.tokens[-1] for s in batch.decodes]
        predictions = [self._prediction(run.slot, run.position + 1, fresh=True) for run in runs]
        newest = list(range(len(runs)))
        for chunk in batch.chunks:
            run = Run(len(ids), _slot(chunk.sequence), chunk.start, chunk.end - chunk.start)
            runs.append(run)
            ids += chunk.sequence.tokens[chunk.start : chunk.end]
            if chunk.completes:
                predictions.append(self._prediction(run.slot, chunk.end, fresh=False))
                newest.append(len(ids) - 1)
        inputs = self._inputs(runs, ids)
        if self._graphs and not batch.chunks:
            return self._graphs.run(inputs, runs, predictions)
        queries = self._trunk(inputs.to(self.table.device), runs)
        for chunk in batch.chunks:
            self._satisfy(_slot(chunk.sequence), chunk.start, chunk.end)
        if not predictions:
            return torch.empty(0, self.config.tokens)
        if len(newest) < len(ids):
            queries = queries[newest]
        return self._head(self.kernels.mix(queries, predictions))

    def _decode(self, inputs: Inputs, runs: Many[Run], predictions: Many[Prediction]) -> Tensor:
        """A step of one new token a slot, from beginning to end on the device."""
        return self._head(self.kernels.mix(self._trunk(inputs, runs), predictions))

    def _layer(self, block: Block, after: nn.LayerNorm) -> _Layer:
        make, attn, mlp = self.kernels.linear, block.attn, block.mlp
        return _Layer(
            make(attn.c_attn.weight.t(), attn.c_attn.bias),
            make(attn.c_proj.weight.t(), attn.c_proj.bias),
            self._norm(block.ln_2),
            make(mlp.c_fc.weight.t(), mlp.c_fc.bias, gelu=True),
            make(mlp.c_proj.weight.t(), mlp.c_proj.bias),
            after,
            attn.scale,
        )

    def _norm(self, norm: nn.LayerNorm) -> nn.LayerNorm:
        """The model's, where the computation is."""
        return deepcopy(norm).to(self.table.device)

    def _trunk(self, new: Inputs, runs: Many[Run]) -> Tensor:
        """Run the trunk on new tokens [N], filling the caches; the sense weights' queries [N, k, d/k]."""
        self._place(new)
        kernels, config = self.kernels, self.config
        x = self._tokens[new.tokens] + self._positions[new.positions]
        y = kernels.residual_norm(x, None, self._first)
        for n, layer in enumerate(self._layers):
            mixed = kernels.attend(layer.qkv(y), n, runs, layer.scale)
            y = kernels.residual_norm(x, layer.proj(mixed), layer.norm)
            y = kernels.residual_norm(x, layer.out(layer.fc(y)), layer.after)
        both = self._sense_weights(y).view(len(x), 2, config.num_senses, config.sense_head_width)
        queries, keys = both.unbind(1)
        self.caches.write_sense_keys(keys, new.slots, new.positions)
        return queries

    def _place(self, new: Inputs) -> None:
        """Note new tokens in their slots, with the table rows that are their senses."""
        self.caches.rows[new.slots, new.positions] = new.rows
        self.caches.ids[new.slots, new.positions] = new.tokens.int()

    def _inputs(self, runs: Many[Run], ids: Many[int]) -> Inputs:
        """New tokens as the step reads them, on the CPU; those that a text repeats are linked."""
        tokens = torch.tensor(ids)
        slots = torch.tensor([run.slot for run in runs for _ in range(run.count)])
        positions = torch.tensor([p for run in runs for p in range(run.position, run.position + run.count)])
        rows = (tokens * self.config.num_senses).int()[:, None] + self._senses  # [N, k]
        for run in runs:
            occupant = self._occupant(run.slot)
            if occupant.edited:
                for n in range(run.token, run.token + run.count):
                    if ids[n] in occupant.edited:
                        index = occupant.overlay.row_index(torch.tensor(ids[n])).to(rows)
                        rows[n] = torch.where(index >= 0, occupant.first_row + index, rows[n])
        if self.table.device.type == "cpu":  # where alone a repeated token is mixed in once
            previous = self._repeats(runs, ids)
            self.caches.previous[slots, positions] = previous
            self.caches.following[slots, positions] = 0
            again = previous >= 0
            self.caches.following[slots[again], previous[again]] = positions[again].int()
        return Inputs(tokens, slots, positions, rows)

    def _repeats(self, runs: Many[Run], ids: Many[int]) -> Tensor:
        """Where in its slot each new token stood last before, −1 if nowhere: [N] int32."""
        previous = []
        for run in runs:
            last = self._last[run.slot]
            for n in range(run.count):
                token, position = ids[run.token + n], run.position + n
                previous.append(last.get(token, -1))
                last[token] = position
        return torch.tensor(previous, dtype=torch.int32)

    def _prediction(self, slot: int, length: int, fresh: bool) -> Prediction:
        return Prediction(slot, length, fresh, self._occupant(slot).topics)

    def _satisfy(self, slot: int, start: int, end: int) -> None:
        """Bring a slot's annealing up to date with its tokens [start, end)."""
        prediction = self._prediction(slot, end, fresh=False)
        if prediction.topics:
            self.kernels.satisfy(prediction, start)

    def _occupant(self, slot: int) -> _Occupant:
        occupant = self._occupants[slot]
        assert occupant is not None, f"slot {slot} is free"
        return occupant


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None, "a running sequence has a slot"
    return sequence.slot
