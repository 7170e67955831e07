"""One step of the model over a mixed batch, with caches: the only file that touches device memory.

Linear layers run over all new tokens at once, flattened [N, d]; attention reads of each slot what is valid. The
sense mix is a lookup: every position of a slot keeps the k rows of the sense table that are its senses, and a
release's rows lie behind the table, so a patched sense costs what any sense costs.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from backpack_lm.kernels import Caches, Kernels, Linear, Prediction, Run, choose
from backpack_lm.model import Backpack, Block
from backpack_lm.overlay import Overlay
from torch import Tensor, nn

from backpack_serving.engine.scheduler import Batch
from backpack_serving.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class _Occupant:
    """What a slot holds: the overlay it was started with, and where its rows begin in the table."""

    overlay: Overlay
    first_row: int
    edited: frozenset[int]


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
    device and dtype are those of the computation.
    """

    def __init__(
        self, model: Backpack, table: Tensor, slots: int, kernels: Callable[[Caches], Kernels] = choose
    ) -> None:
        config = self.config = model.config
        trunk = model.gpt2_model
        self.table, self.base_rows = table, config.vocab_size * config.num_senses
        self.caches = Caches.empty(config, slots, table, model.embedding.detach())
        self.kernels = kernels(self.caches)
        self._tokens, self._positions = trunk.wte.weight.detach(), trunk.wpe.weight.detach()
        blocks = [block for block in trunk.h if isinstance(block, Block)]
        norms = [*(block.ln_1 for block in blocks), trunk.ln_f]
        self._first = norms[0]
        self._layers = [self._layer(block, after) for block, after in zip(blocks, norms[1:], strict=True)]
        weights = model.sense_weight_net.c_attn
        self._sense_weights = self.kernels.linear(weights.weight, weights.bias)
        self._head = self.kernels.head(model.embedding[: config.tokens])  # padding is never sampled
        self._occupants: list[_Occupant | None] = [None] * slots
        self._last: list[dict[int, int]] = [{} for _ in range(slots)]  # where each token of a slot stood last
        self._senses = torch.arange(config.num_senses, dtype=torch.int32, device=table.device)

    def load(self, overlay: Overlay, first_row: int) -> None:
        """Copy a release's rows behind the table, from `first_row` of the space kept for them."""
        start = self.base_rows + first_row
        self.table[start : start + len(overlay.rows)] = overlay.rows

    def start(self, slot: int, overlay: Overlay, first_row: int) -> None:
        """Give a slot to a sequence steered by an overlay whose rows are loaded at `first_row`."""
        edited = frozenset(overlay.tokens.tolist())
        self._occupants[slot] = _Occupant(overlay, self.base_rows + first_row, edited)
        self._last[slot] = {}

    @torch.inference_mode()
    def reuse(self, donor: int, slot: int, tokens: Many[int]) -> None:
        """Begin a slot with tokens whose caches another slot, or this one, holds: a copy, not a computation.

        Caches are the model's alone; rows and annealing are the new occupant's own.
        """
        if donor != slot:
            self.caches.copy_prefix(donor, slot, len(tokens))
        self._place([Run(0, slot, 0, len(tokens))], tokens)
        self._satisfy(slot, 0, len(tokens))

    def digest(self, slot: int) -> str:
        """Digest of the release that the slot's sequence is being computed with."""
        return self._occupant(slot).overlay.digest

    def stop(self, slot: int) -> None:
        self._occupants[slot] = None

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Compute a batch; logits [B, tokens] float32 of the next token of each of `batch.sampled`."""
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
        queries = self._trunk(runs, ids)
        for chunk in batch.chunks:
            self._satisfy(_slot(chunk.sequence), chunk.start, chunk.end)
        if not predictions:
            return torch.empty(0, self.config.tokens)
        if len(newest) < len(ids):
            queries = queries[newest]
        return self._head(self.kernels.mix(queries, predictions))

    def _layer(self, block: Block, after: nn.LayerNorm) -> _Layer:
        make, attn, mlp = self.kernels.linear, block.attn, block.mlp
        return _Layer(
            make(attn.c_attn.weight.t(), attn.c_attn.bias),
            make(attn.c_proj.weight.t(), attn.c_proj.bias),
            block.ln_2,
            make(mlp.c_fc.weight.t(), mlp.c_fc.bias, gelu=True),
            make(mlp.c_proj.weight.t(), mlp.c_proj.bias),
            after,
            attn.scale,
        )

    def _trunk(self, runs: Many[Run], ids: Many[int]) -> Tensor:
        """Run the trunk on new tokens [N], filling the caches; the sense weights' queries [N, k, d/k]."""
        tokens, slots, positions = self._place(runs, ids)
        kernels, config = self.kernels, self.config
        x = self._tokens[tokens] + self._positions[positions]
        y = kernels.residual_norm(x, None, self._first)
        for n, layer in enumerate(self._layers):
            mixed = kernels.attend(layer.qkv(y), n, runs, layer.scale)
            y = kernels.residual_norm(x, layer.proj(mixed), layer.norm)
            y = kernels.residual_norm(x, layer.out(layer.fc(y)), layer.after)
        both = self._sense_weights(y).view(len(ids), 2, config.num_senses, config.sense_head_width)
        queries, keys = both.unbind(1)
        self.caches.write_sense_keys(keys, slots, positions)
        return queries

    def _place(self, runs: Many[Run], ids: Many[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Note new tokens in their slots, with the table rows that are their senses; ids, slots, positions [N]."""
        tokens = torch.tensor(ids)
        slots = torch.tensor([run.slot for run in runs for _ in range(run.count)])
        positions = torch.tensor([p for run in runs for p in range(run.position, run.position + run.count)])
        tokens, slots, positions = (t.to(self.table.device) for t in (tokens, slots, positions))
        rows = (tokens * self.config.num_senses).int()[:, None] + self._senses  # [N, k]
        for run in runs:
            occupant = self._occupant(run.slot)
            if occupant.edited:
                for n in range(run.token, run.token + run.count):
                    if ids[n] in occupant.edited:
                        index = occupant.overlay.row_index(torch.tensor(ids[n])).to(rows)
                        rows[n] = torch.where(index >= 0, occupant.first_row + index, rows[n])
        self.caches.rows[slots, positions] = rows
        self.caches.ids[slots, positions] = tokens.int()
        self.caches.previous[slots, positions] = previous = self._repeats(runs, ids).to(slots.device)
        self.caches.following[slots, positions] = 0
        again = previous >= 0
        self.caches.following[slots[again], previous[again]] = positions[again].int()
        return tokens, slots, positions

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
        return Prediction(slot, length, fresh, self._occupant(slot).overlay.topics)

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
