"""A release compiled against a model: the rows it replaces, the multipliers it adds, and what it adds to logits.

Sparse edits end up as replaced rows: one [d] vector for each touched cell. A topic multiplies every cell of the
table, so it is kept as one byte a cell, the index of its multiplier. Biases end up as one number for each token that
they name. All are computed once per release and shared by every request of that release.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock

import torch
from torch import Tensor

from backpack_lm.denominators import Progress, compute
from backpack_lm.int8 import restore, store
from backpack_lm.patch import (
    TOPIC_QUANTILES,
    AddEdit,
    BiasEdit,
    Cell,
    CopyEdit,
    Edit,
    PatchError,
    ProjectOutEdit,
    ReleaseContent,
    ScaleEdit,
    SetEdit,
    SwapEdit,
    TopicEdit,
    Vector,
    Violation,
)


class SenseTable:
    """Every sense vector of a model: rows [V, k, d], beside the embedding E [V, d] that scores them.

    `rows` are as the table stores them, of int8 with each row's scale (int8.py); `vectors` reads them of any dtype.
    `unscored` [V] marks ids that no topic may touch: end of text and the padding of the vocabulary.
    """

    def __init__(self, rows: Tensor, embedding: Tensor, unscored: Tensor | None = None) -> None:
        self.rows, self.embedding = rows, embedding
        self.unscored = torch.zeros(len(rows), dtype=torch.bool) if unscored is None else unscored
        self.kept_as: str | None = None
        """What its denominators are called in the host's cache, if they may be kept there."""
        self._measuring = Lock()

    def vectors(self, *index: Tensor | slice) -> Tensor:
        """The sense vectors of tokens, or of tokens and senses, [..., d] float32."""
        return restore(self.rows[index])

    def as_stored(self, vectors: Tensor) -> Tensor:
        """What is read of vectors [..., d] float32 that are written into a table of this dtype."""
        return restore(store(vectors, self.rows.dtype))

    @cached_property
    def peaks(self) -> Tensor:
        """max_y (E C)_y for every cell, [V, k]: the denominator of topic scores, whatever the topic.

        Computed when it is first wanted, which takes minutes for a large vocabulary.
        """
        return self.measure()

    @property
    def measured(self) -> bool:
        """Whether `peaks` are there."""
        return "peaks" in self.__dict__

    def measure(self, progress: Progress | None = None) -> Tensor:
        """`peaks`, computed by the first who wants them. What `progress` raises stops that, for now."""
        with self._measuring:
            if not self.measured:
                self.__dict__["peaks"] = compute(
                    self.vectors, self.rows.shape[:2], self.embedding, self.kept_as, progress
                )
            found: Tensor = self.__dict__["peaks"]
            return found

    def topic_scores(self, tokens: tuple[int, ...]) -> Tensor:
        """(E C)·b / max_y (E C)_y of every cell, [V, k], with b the many-hot vector of `tokens`."""
        many_hot = self.embedding[torch.tensor(tokens).unique()].sum(0)
        parts = (slice(at, at + 4096) for at in range(0, len(self.rows), 4096))
        scores = torch.cat([self.vectors(part) @ many_hot for part in parts]) / self.peaks
        return scores.nan_to_num(0.0).masked_fill(self.unscored[:, None], 0.0)

    def with_room(self, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """A copy as the engine gathers from it, [V·k + rows, d]: releases' rows go behind the model's own. In another
        dtype if one is given and this table isn't int8."""
        dtype, flat = dtype or self.rows.dtype, self.rows.flatten(0, 1)
        stored = flat if dtype is flat.dtype else store(flat, dtype)
        return torch.cat([stored, stored.new_zeros(rows, stored.shape[1])])


@dataclass(frozen=True, eq=False)
class TopicMultipliers:
    """One topic edit, compiled; equal to itself only. `levels` [V, k] uint8 index into `multipliers` [4]."""

    levels: Tensor
    multipliers: Tensor
    scale: float
    annealed: bool

    @classmethod
    def of(cls, topic: TopicEdit, table: SenseTable) -> TopicMultipliers:
        scores = table.topic_scores(topic.tokens)
        thresholds = torch.quantile(scores.flatten(), torch.tensor(TOPIC_QUANTILES))
        # Level 0 is above the highest quantile; a score equal to a quantile is not above it.
        levels = (scores[..., None] <= thresholds).sum(-1).to(torch.uint8)
        return cls(levels, torch.tensor(topic.multipliers), topic.annealing_scale, topic.annealed)

    def targets(self, ids: Tensor) -> Tensor:
        """δ, the multiplier before annealing: ids [...] → [..., k]."""
        return self.multipliers[self.levels[ids].long()]

    def to(self, device: torch.device) -> TopicMultipliers:
        """The same on a device; itself if it is there."""
        if self.levels.device == device:
            return self
        return replace(self, levels=self.levels.to(device), multipliers=self.multipliers.to(device))

    def of_senses(self, senses: range) -> TopicMultipliers:
        """What it does to some of the model's senses, which are then all there are."""
        return replace(self, levels=self.levels[:, senses.start : senses.stop].contiguous())

    def anneal(self, targets: Tensor, annealed_sum: Tensor, positions: Tensor) -> Tensor:
        """b·δ + (1 − b) with b = sigmoid(−f·a + 6)·(1 + j/100).

        `annealed_sum` is a = Σ_i relu(E[x_i]·C(x_j)_l), `positions` j; both broadcast against δ.
        """
        if not self.annealed:
            return targets
        keep = torch.sigmoid(6 - self.scale * annealed_sum) * (1 + positions / 100)
        return keep * targets + (1 - keep)


@dataclass(frozen=True, eq=False)
class LogitBias:
    """What a release adds to logits, −∞ to forbid; equal to itself only. `tokens` [n], each once; `amounts` [n]
    float32."""

    tokens: Tensor
    amounts: Tensor

    @classmethod
    def of(cls, edits: Iterable[BiasEdit]) -> LogitBias | None:
        """Their sum; a token that one names twice counts once in it. None without an edit."""
        sums: dict[int, float] = {}
        for edit in edits:
            for token in dict.fromkeys(edit.tokens):
                sums[token] = sums.get(token, 0.0) + edit.amount
        tokens = sorted(sums)
        return cls(torch.tensor(tokens), torch.tensor([sums[token] for token in tokens])) if sums else None

    @cached_property
    def by_token(self) -> dict[int, float]:
        return dict(zip(self.tokens.tolist(), self.amounts.tolist(), strict=True))


class Overlay:
    """What a release does to one model's sense table, and to the logits that come of it.

    `tokens` [n] are the edited ids in ascending order, `index` [n, k] the row of `rows` [R, d] that
    replaces each of their senses, −1 where the model's own vector stays.
    """

    def __init__(
        self,
        digest: str,
        cells: Collection[Cell],
        rows: Tensor,
        topics: tuple[TopicMultipliers, ...],
        num_senses: int,
        bias: LogitBias | None = None,
    ) -> None:
        self.digest, self.rows, self.topics, self.bias = digest, rows, topics, bias
        tokens, senses = _cell_indices(cells)
        self.tokens, place = tokens.unique(return_inverse=True)
        self.index = torch.full((len(self.tokens), num_senses), -1, dtype=torch.long)
        self.index[place, senses] = torch.arange(len(rows))

    @classmethod
    def compile(
        cls, release: ReleaseContent, table: SenseTable, name: Callable[[int], str] = "token {}".format
    ) -> Overlay:
        """Apply a release's edits in order, each to what the one before it left.

        The rows that come out are as the table stores them, so what is explained and scored is what is served. Raises
        PatchError if one can't be stored in the table's dtype; `name` is what a token is called there.
        """
        edits = [edit for edit in release.edits if not isinstance(edit, TopicEdit | BiasEdit)]
        vectors = _Vectors((cell for edit in edits for cell in edit.cells), table)
        for edit in edits:
            vectors.apply(edit)
        rows = table.as_stored(vectors.rows)
        wrong = ~rows.isfinite().all(1)
        if bool(wrong.any()):
            cell = list(vectors.places)[int(wrong.int().argmax())]
            raise PatchError(
                Violation(
                    "edits",
                    "OVERFLOW",
                    f"sense {cell.sense} of {name(cell.token)} is too large a vector to be stored after all edits; "
                    "leave some of its edits out, or make their factors smaller",
                )
            )
        topics = tuple(TopicMultipliers.of(e, table) for e in release.edits if isinstance(e, TopicEdit))
        bias = LogitBias.of(edit for edit in release.edits if isinstance(edit, BiasEdit))
        return cls(release.digest, vectors.places, rows, topics, table.rows.shape[1], bias)

    def of_senses(self, senses: range) -> Overlay:
        """What it does to some of the model's senses, which are then all there are; its biases come with each such
        part."""
        own = self.index[:, senses.start : senses.stop]
        kept, replaced = (own >= 0).any(1), own[own >= 0]
        topics = tuple(topic.of_senses(senses) for topic in self.topics)
        part = Overlay(self.digest, (), self.rows[:0], topics, len(senses), self.bias)
        part.rows, part.tokens = self.rows[replaced], self.tokens[kept]
        part.index = own[kept].masked_scatter(own[kept] >= 0, torch.arange(len(replaced)))
        return part

    @property
    def empty(self) -> bool:
        return not len(self.rows) and not self.topics and self.bias is None

    @cached_property
    def nbytes(self) -> int:
        biases = self.bias.tokens.nbytes + self.bias.amounts.nbytes if self.bias else 0
        return self.rows.nbytes + self.index.nbytes + sum(t.levels.nbytes for t in self.topics) + biases

    def row_index(self, ids: Tensor) -> Tensor:
        """For ids [...], the row of `rows` that replaces each sense, or −1: [..., k]."""
        if not len(self.tokens):
            return torch.full((*ids.shape, self.index.shape[1]), -1)
        place = torch.searchsorted(self.tokens, ids).clamp_max(len(self.tokens) - 1)
        return self.index[place].masked_fill((self.tokens[place] != ids)[..., None], -1)

    def replace(self, ids: Tensor, senses: Tensor) -> Tensor:
        """Senses [B, T, k, d] of ids [B, T] with the replaced rows in their place."""
        if not len(self.rows):
            return senses
        row = self.row_index(ids)[..., None]
        return torch.where(row >= 0, self.rows[row.squeeze(-1).clamp_min(0)].to(senses.dtype), senses)

    def biased(self, logits: Tensor) -> Tensor:
        """Logits [..., V] with the release's biases; the same tensor if there are none."""
        if self.bias is None:
            return logits
        return logits.index_add(-1, self.bias.tokens, self.bias.amounts.to(logits.dtype).expand(*logits.shape[:-1], -1))

    def bias_of(self, token: int) -> float:
        """What the release adds to a token's logit."""
        return self.bias.by_token.get(token, 0.0) if self.bias else 0.0

    def multipliers(self, ids: Tensor, senses: Tensor, embedding: Tensor) -> Tensor:
        """Effective multiplier of each cell j for each prediction i: [B, T, T, k], or ones [1, 1, 1, 1].

        Recomputes the annealing in full for every i, as the reference code does: Σ over the tokens up
        to and including i, of the senses [B, T, k, d] as they stand after `replace`.
        """
        if not self.topics:
            return torch.ones(1, 1, 1, 1)
        dots = torch.einsum("bid,bjld->bijl", embedding[ids], senses)
        return self.annealed(ids, dots.relu().cumsum(1))

    def annealed(self, ids: Tensor, annealed_sum: Tensor) -> Tensor:
        """The topics' multipliers together, [..., I, T, k], of the cells of ids [..., T].

        `annealed_sum` [..., I, T, k] is a = Σ relu(E[x]·C(x_j)_l) over the tokens x up to each of I predictions.
        """
        positions = torch.arange(ids.shape[-1])[:, None]
        out = torch.ones(())
        for topic in self.topics:
            out = out * topic.anneal(topic.targets(ids)[..., None, :, :], annealed_sum, positions)
        return out


class _Vectors:
    """The cells that sparse edits change, by their row in `rows` [n, d] float32, which begin as the model's."""

    def __init__(self, cells: Iterable[Cell], table: SenseTable) -> None:
        self._table = table
        self.places = {cell: row for row, cell in enumerate(dict.fromkeys(cells))}
        self.rows = table.vectors(*_cell_indices(self.places))

    def apply(self, edit: Edit) -> None:
        """All of an edit's cells at once: they are read before any is written, and one that it names twice is
        changed once."""
        at = torch.tensor([self.places[cell] for cell in edit.cells])
        v = self.rows[at]
        match edit:
            case ScaleEdit():
                v = v * edit.factor
            case AddEdit():
                v = v + _unpacked(edit.delta)
            case SetEdit():
                v = _unpacked(edit.vector).expand_as(v)
            case CopyEdit():
                v = self._now([edit.source_of(cell) for cell in edit.cells])
            case ProjectOutEdit():
                r = self._direction(edit.direction)
                v = v - _along(v, r) * r
            case SwapEdit():
                r, a = self._direction(edit.old), self._direction(edit.new)
                v = v + _along(v, r) * (a * (r @ r) / (a @ a) - r)
            case TopicEdit() | BiasEdit():
                raise AssertionError("compiled by TopicMultipliers and LogitBias")
        self.rows[at] = v

    def _now(self, cells: Sequence[Cell]) -> Tensor:
        """Cells as the edits so far have left them, changed or not [m, d]."""
        out = self._table.vectors(*_cell_indices(cells))
        changed = {n: row for n, cell in enumerate(cells) if (row := self.places.get(cell)) is not None}
        out[list(changed)] = self.rows[list(changed.values())]
        return out

    def _direction(self, token: int) -> Tensor:
        return self._table.embedding[token].float()


def _along(v: Tensor, r: Tensor) -> Tensor:
    """(v·r)/(r·r) of each of [n, d], as [n, 1]. Row by row: a matrix product may round by how many there are."""
    return (v * r).sum(-1, keepdim=True) / (r @ r)


def _cell_indices(cells: Collection[Cell]) -> tuple[Tensor, Tensor]:
    """Their tokens and their senses, each [n]."""
    pairs = torch.tensor([(cell.token, cell.sense) for cell in cells], dtype=torch.long).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _unpacked(packed: Vector) -> Tensor:
    return torch.frombuffer(bytearray(packed), dtype=torch.float32)
