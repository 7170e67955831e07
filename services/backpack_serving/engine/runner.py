"""One step of the model over a mixed batch, with caches: the only file that touches device memory.

Linear layers run over all new tokens at once, flattened [N, d]; attention runs once over the grid of slots
that decode, and once for each chunk of a prompt. The sense mix is a lookup: every position of a slot
keeps the k rows of the sense table that are its senses, and an overlay's rows lie behind the table, so a
patched sense costs what any sense costs.

Caches, T the context, S the slots:
    keys, values   [L, S, H, T, d/H]   of the trunk
    sense_keys     [S, k, T, d/k]      of the sense weights
    rows           [S, k, T]           row of the table for each sense of each position
None of them depends on a patch except `rows`, which is written from token ids alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from backpack_lm.model import Backpack, Block
from backpack_lm.overlay import Overlay, SenseTable
from torch import Tensor

from backpack_serving.engine.scheduler import Batch, Chunk
from backpack_serving.engine.sequence import Sequence

SATISFIED = 32.0
"""f·a beyond which sigmoid(6 − f·a) no longer changes a multiplier in float32: e⁻²⁶ · 6 is below its epsilon."""


@dataclass(slots=True)
class _Occupant:
    """What a slot holds: the overlay it was started with, where that lies, and its annealing."""

    overlay: Overlay
    first_row: int
    edited: frozenset[int]
    # Per topic edit δ [k, T]; a = Σ_i relu(E[x_i]·C(x_j)_l), [k, T]; their effective product, [k, T]. The first
    # topic's δ and the others are views of the runner's own tensors, where slots are annealed together.
    targets: list[Tensor]
    satisfied: Tensor
    multipliers: Tensor

    @property
    def simple(self) -> bool:
        """Whether this is the common case, one annealed topic."""
        return len(self.targets) == 1 and self.overlay.topics[0].annealed


class Runner:
    """The tensors of one replica. `overlay_rows` rows are kept free behind the table for releases."""

    def __init__(self, model: Backpack, table: SenseTable, slots: int, overlay_rows: int) -> None:
        config = self.config = model.config
        self.model = model.eval()
        width, heads, senses = config.n_embd, config.n_head, config.num_senses
        context, self.base_rows = config.n_positions, config.vocab_size * senses
        self.table = torch.empty(self.base_rows + overlay_rows, width)
        self.table[: self.base_rows] = table.rows.flatten(0, 1)
        self.head = model.embedding.detach()[: config.tokens].t()  # padding is never sampled
        trunk = (config.n_layer, slots, heads, context, width // heads)
        self.keys, self.values = torch.zeros(trunk), torch.zeros(trunk)
        self.sense_keys = torch.zeros(slots, senses, context, config.sense_head_width)
        self.rows = torch.zeros(slots, senses, context, dtype=torch.long)
        self.ids = torch.zeros(slots, context, dtype=torch.long)
        topics = (slots, senses, context)
        self.targets, self.multipliers = torch.ones(topics), torch.ones(topics)
        self.satisfied = torch.zeros(topics)
        self._occupants: list[_Occupant | None] = [None] * slots
        self._senses = torch.arange(senses)
        self._places = torch.arange(context)

    def load(self, overlay: Overlay, first_row: int) -> None:
        """Copy a release's rows behind the table, from `first_row` of the space kept for them."""
        start = self.base_rows + first_row
        self.table[start : start + len(overlay.rows)] = overlay.rows

    def start(self, slot: int, overlay: Overlay, first_row: int) -> None:
        """Give a slot to a sequence steered by an overlay whose rows are loaded at `first_row`."""
        targets = [self.targets[slot], *(torch.ones_like(self.targets[slot]) for _ in overlay.topics[1:])]
        self._occupants[slot] = _Occupant(
            overlay,
            self.base_rows + first_row,
            frozenset(overlay.tokens.tolist()),
            targets if overlay.topics else [],
            self.satisfied[slot],
            self.multipliers[slot],
        )

    @torch.inference_mode()
    def reuse(self, donor: int, slot: int, tokens: Many[int]) -> None:
        """Begin a slot with tokens whose caches another slot, or this one, holds: a copy, not a computation.

        Caches are the model's alone; rows and annealing are the new occupant's own.
        """
        count = len(tokens)
        if donor != slot:
            for cache in (self.keys, self.values):
                cache[:, slot, :, :count] = cache[:, donor, :, :count]
            self.sense_keys[slot, :, :count] = self.sense_keys[donor, :, :count]
        self._place(torch.tensor(tokens), torch.full((count,), slot), self._places[:count])
        self._anneal(slot, 0, count)

    def digest(self, slot: int) -> str:
        """Digest of the release that the slot's sequence is being computed with."""
        return self._occupant(slot).overlay.digest

    def stop(self, slot: int) -> None:
        self._occupants[slot] = None

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Compute a batch; logits [B, tokens] of the next token of each of `batch.sampled`."""
        decodes = [(_slot(s), len(s.tokens) - 1) for s in batch.decodes]
        slots = torch.tensor(
            [slot for slot, _ in decodes]
            + [_slot(c.sequence) for c in batch.chunks for _ in range(c.start, c.end)]
        )
        positions = torch.tensor(
            [place for _, place in decodes] + [p for c in batch.chunks for p in range(c.start, c.end)]
        )
        ids = torch.tensor(
            [s.tokens[-1] for s in batch.decodes]
            + [t for c in batch.chunks for t in c.sequence.tokens[c.start : c.end]]
        )
        self._place(ids, slots, positions)
        queries = self._trunk(ids, slots, positions, len(decodes), batch.chunks)
        simple = [(slot, place) for slot, place in decodes if self._occupant(slot).simple]
        if simple:
            self._anneal_together(*map(torch.tensor, zip(*simple, strict=True)))
        for slot, place in decodes:
            if not self._occupant(slot).simple:
                self._anneal(slot, place, place + 1)
        for chunk in batch.chunks:
            self._anneal(_slot(chunk.sequence), chunk.start, chunk.end)
        ends = [*range(len(decodes))]
        at = len(decodes)
        for chunk in batch.chunks:
            at += chunk.end - chunk.start
            if chunk.completes:
                ends.append(at - 1)
        if not ends:
            return torch.empty(0, self.config.tokens)
        return self._mix(queries[ends], slots[ends], positions[ends]) @ self.head

    def _place(self, ids: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Note new tokens [N] in their slots, with the table rows that are their senses."""
        rows = ids[:, None] * self.config.num_senses + self._senses  # [N, k]
        for n, (token, slot) in enumerate(zip(ids.tolist(), slots.tolist(), strict=True)):
            occupant = self._occupant(slot)
            if token in occupant.edited:
                index = occupant.overlay.row_index(ids[n])
                rows[n] = torch.where(index >= 0, occupant.first_row + index, rows[n])
        self.rows[slots, :, positions] = rows
        self.ids[slots, positions] = ids

    def _trunk(self, ids: Tensor, slots: Tensor, positions: Tensor, decodes: int, chunks: Many[Chunk]) -> Tensor:
        """Run the trunk on new tokens [N], filling the caches; the sense weights' queries [N, k, d/k]."""
        trunk, config = self.model.gpt2_model, self.config
        x = trunk.wte.weight[ids] + trunk.wpe.weight[positions]
        grid = _Grid(slots[:decodes], positions[:decodes]) if decodes else None
        for layer, block in enumerate(trunk.h):
            assert isinstance(block, Block)
            qkv = block.attn.c_attn(block.ln_1(x)).view(len(ids), 3, config.n_head, -1)
            q, k, v = qkv.unbind(1)  # [N, H, d/H]
            keys, values = self.keys[layer], self.values[layer]
            keys[slots, :, positions] = k
            values[slots, :, positions] = v
            mixed = torch.empty_like(q)
            if grid is not None:
                mixed[:decodes] = grid.attend(q[:decodes], keys, values, block.attn.scale)
            at = decodes
            for chunk in chunks:
                slot, size = _slot(chunk.sequence), chunk.end - chunk.start
                seen = self._places[: chunk.end] <= self._places[chunk.start : chunk.end, None]
                mixed[at : at + size] = F.scaled_dot_product_attention(
                    q[at : at + size].transpose(0, 1)[None],
                    keys[slot, :, : chunk.end][None],
                    values[slot, :, : chunk.end][None],
                    attn_mask=seen,
                    scale=block.attn.scale,
                )[0].transpose(0, 1)
                at += size
            x = x + block.attn.c_proj(mixed.flatten(1))
            x = x + block.mlp(block.ln_2(x))
        queries, sense_keys = self.model.sense_weight_net.query_key(trunk.ln_f(x))
        self.sense_keys[slots, :, positions] = sense_keys
        return queries

    def _anneal(self, slot: int, start: int, end: int) -> None:
        """Bring a slot's multipliers up to date with its tokens [start, end).

        Each new token adds relu(E[x]·C(x_j)_l) to every cell before it, and new cells sum over all tokens. Cells
        whose multiplier is 1 for good, by their score or because the topic is SATISFIED, are left alone.
        """
        occupant = self._occupant(slot)
        if not occupant.targets:
            return
        ids, rows, satisfied = self.ids[slot], self.rows[slot], occupant.satisfied
        embedding = self.model.embedding
        for target, topic in zip(occupant.targets, occupant.overlay.topics, strict=True):
            target[:, start:end] = topic.targets(ids[start:end]).t()
        annealed = [n for n, topic in enumerate(occupant.overlay.topics) if topic.annealed]
        if annealed:
            slowest = min(occupant.overlay.topics[n].scale for n in annealed)
            leaning = torch.stack([occupant.targets[n][:, :start] != 1 for n in annealed]).any(0)
            open_ = (leaning & (slowest * satisfied[:, :start] < SATISFIED)).nonzero(as_tuple=True)
            dots = self.table[rows[:, :start][open_]] @ embedding[ids[start:end]].t()
            satisfied[:, :start][open_] += dots.relu().sum(-1)
            new = self.table[rows[:, start:end]]  # [k, ·, d]
            satisfied[:, start:end] = (new @ embedding[ids[:end]].t()).relu().sum(-1)
        occupant.multipliers[:, :end] = 1.0
        for target, topic in zip(occupant.targets, occupant.overlay.topics, strict=True):
            occupant.multipliers[:, :end] *= topic.anneal(target[:, :end], satisfied[:, :end], self._places[:end])

    def _anneal_together(self, slots: Tensor, positions: Tensor) -> None:
        """`_anneal` for one new token in each of some slots [G] at positions [G], all of one annealed topic."""
        length, new = int(positions.max()) + 1, self.ids[slots, positions]
        topics = [self._occupant(slot).overlay.topics[0] for slot in slots.tolist()]
        at = torch.arange(len(slots))
        target = self.targets[slots, :, :length]  # [G, k, T], copies
        target[at, :, positions] = torch.stack([t.targets(x) for t, x in zip(topics, new, strict=True)])
        satisfied, rows = self.satisfied[slots, :, :length], self.rows[slots, :, :length]
        scale = torch.tensor([t.scale for t in topics])[:, None, None]
        before = (self._places[:length] < positions[:, None])[:, None]  # [G, 1, T]
        embedding = self.model.embedding
        # Cells before the new tokens, where they can still change: one dot product each.
        which, sense, place = (before & (target != 1) & (scale * satisfied < SATISFIED)).nonzero(as_tuple=True)
        vectors = self.table[rows[which, sense, place]]  # [M, d]
        # Against every new token: a few times the arithmetic, but no second gather.
        satisfied[which, sense, place] += (vectors @ embedding[new].t()).gather(1, which[:, None])[:, 0].relu()
        # The new cells, against all tokens up to and including their own.
        dots = self.table[rows[at, :, positions]] @ embedding[self.ids[slots, :length]].transpose(
            1, 2
        )  # [G, k, T]
        seen = self._places[:length] <= positions[:, None]
        satisfied[at, :, positions] = (dots.relu() * seen[:, None]).sum(-1)
        keep = torch.sigmoid(6 - scale * satisfied) * (1 + self._places[:length] / 100)
        self.targets[slots, :, :length], self.satisfied[slots, :, :length] = target, satisfied
        self.multipliers[slots, :, :length] = keep * target + (1 - keep)

    def _mix(self, queries: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """o [B, d] for queries [B, k, d/k] at the newest positions of slots: Σ_l Σ_j α[l,j] C(x_j)_l."""
        grid = _Grid(slots, positions)
        spread = queries.new_zeros(grid.rows, *queries.shape[1:])
        spread[grid.place] = queries
        keys = self.sense_keys[:, :, : grid.length][grid.which]  # [R, k, T, d/k]
        scores = (spread[:, :, None] @ keys.transpose(2, 3))[grid.place].squeeze(2)  # [B, k, T]
        future = grid.future[grid.place][:, None]  # [B, 1, T]
        alpha = (scores / math.sqrt(self.config.sense_head_width)).masked_fill_(future, float("-inf")).softmax(-1)
        leaning = torch.tensor([bool(self._occupant(slot).targets) for slot in slots.tolist()])
        if leaning.any():
            alpha[leaning] *= self.multipliers[slots[leaning], :, : grid.length]
        # Masked places have weight zero; row 0 stands in for whatever the slot held there before.
        rows = self.rows[slots, :, : grid.length].masked_fill_(future, 0)
        bags = F.embedding_bag(rows.flatten(0, 1), self.table, per_sample_weights=alpha.flatten(0, 1), mode="sum")
        return bags.view(len(slots), -1, self.config.n_embd).sum(1)

    def _occupant(self, slot: int) -> _Occupant:
        occupant = self._occupants[slot]
        assert occupant is not None, f"slot {slot} is free"
        return occupant


class _Grid:
    """The slots that decode in a step: a view of the caches if they lie close together, else a copy of theirs."""

    def __init__(self, slots: Tensor, positions: Tensor) -> None:
        low, high, self.length = int(slots.min()), int(slots.max()) + 1, int(positions.max()) + 1
        dense = high - low <= 2 * len(slots)
        self.which: slice | Tensor = slice(low, high) if dense else slots
        self.place = slots - low if dense else torch.arange(len(slots))
        self.rows = high - low if dense else len(slots)
        # A slot in between that doesn't decode reads its position 0, and its result is dropped.
        last = torch.zeros(self.rows, dtype=torch.long)
        last[self.place] = positions
        self.future = torch.arange(self.length) > last[:, None]
        self.mask = torch.zeros(self.rows, 1, 1, self.length).masked_fill_(
            self.future[:, None, None], float("-inf")
        )

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """q [B, H, d/H] against each its own slot of keys and values [S, H, T, d/H] → [B, H, d/H]."""
        queries = q.new_zeros(self.rows, *q.shape[1:])
        queries[self.place] = q
        keys, values = keys[:, :, : self.length][self.which], values[:, :, : self.length][self.which]
        scores = queries[:, :, None] @ keys.transpose(2, 3) * scale + self.mask
        return (scores.softmax(-1) @ values)[self.place, :, 0]


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None, "a running sequence has a slot"
    return sequence.slot
