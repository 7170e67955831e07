"""The kinds of edit, and how a refusal is worded.

An edit acts on selected cells of the sense table, a cell being one (token, sense) pair with its vector
v = C(token)_sense of width d, or on the logits of selected tokens. What each kind does is its docstring;
`overlay.py` does it, `canonical.py` writes it down, `patch.py` says when it is allowed.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

TOPIC_QUANTILES = (0.95, 0.80, 0.60)
TOPIC_MULTIPLIERS: dict[int, tuple[float, float, float, float]] = {
    1: (1.5, 1.5, 1.3, 1.0),
    2: (2.2, 2.2, 1.5, 1.0),
    3: (3.3, 3.3, 3.0, 1.0),
}
"""Multiplier of a cell whose topic score lies above the .95, .80, .60 quantile, and below them all."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a patch: where, why (a stable word), and what to do about it."""

    field: str
    reason: str
    description: str


class PatchError(ValueError):
    """A patch that can't be accepted. `violations` lists everything that was found wrong with it."""

    def __init__(self, *violations: Violation) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One entry of the sense table: sense number `sense` of the word with id `token`."""

    token: int
    sense: int


class Vector(bytes):
    """A vector of float32, packed little-endian: immutable, hashable, and canonical as it stands."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Vector:
        # + 0.0 turns -0.0 into 0.0, so that equal vectors have equal bytes.
        return cls(struct.pack(f"<{len(values)}f", *(v + 0.0 for v in values)))

    def values(self) -> array[float]:
        """The numbers, as an array of 32-bit floats. Raises PatchError if the bytes do not divide."""
        if len(self) % 4:
            raise PatchError(Violation("vector", "WRONG_WIDTH", f"{len(self)} bytes are not a list of float32"))
        return array("f", struct.unpack(f"<{len(self) // 4}f", self))

    def norm(self) -> float:
        return math.sqrt(math.fsum(v * v for v in self.values()))


@dataclass(frozen=True, slots=True)
class ScaleEdit:
    """v ← factor · v. Factor 0 removes the sense."""

    cells: tuple[Cell, ...]
    factor: float
    KIND: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class AddEdit:
    """v ← v + delta: what sense finetuning learns (arXiv 2402.06155)."""

    cells: tuple[Cell, ...]
    delta: Vector
    KIND: ClassVar[int] = 2


@dataclass(frozen=True, slots=True)
class SetEdit:
    """v ← vector."""

    cells: tuple[Cell, ...]
    vector: Vector
    KIND: ClassVar[int] = 3


@dataclass(frozen=True, slots=True)
class CopyEdit:
    """v ← the same sense of `source`, or its `source_sense`, as the edits before this one left it."""

    cells: tuple[Cell, ...]
    source: int
    source_sense: int | None = None
    KIND: ClassVar[int] = 4

    def source_of(self, cell: Cell) -> Cell:
        return Cell(self.source, cell.sense if self.source_sense is None else self.source_sense)


@dataclass(frozen=True, slots=True)
class ProjectOutEdit:
    """v ← v − c·r with r = E[direction], the output embedding, and c = (v·r)/(r·r)."""

    cells: tuple[Cell, ...]
    direction: int
    KIND: ClassVar[int] = 5


@dataclass(frozen=True, slots=True)
class SwapEdit:
    """v ← v − c·r + c·a·(r·r)/(a·a) with r = E[old], a = E[new] of the output embedding, and c = (v·r)/(r·r)."""

    cells: tuple[Cell, ...]
    old: int
    new: int
    KIND: ClassVar[int] = 6


@dataclass(frozen=True, slots=True)
class TopicEdit:
    """Multiply every cell by the multiplier of its topic score, annealed while generating.

    `tokens` are the first tokens of the topic's words; `strength` is 1, 2 or 3. The score of a cell is
    (E C)·b / max_y (E C)_y with E the output embedding and b the many-hot vector of `tokens`; its quantile
    over all cells picks the multiplier (`TOPIC_MULTIPLIERS`). With `annealed`, a multiplier fades as the text
    comes to satisfy its cell (paper, section 6 and appendix).
    """

    tokens: tuple[int, ...]
    strength: int
    annealed: bool = True
    KIND: ClassVar[int] = 7

    @property
    def cells(self) -> tuple[Cell, ...]:
        return ()

    @property
    def multipliers(self) -> tuple[float, float, float, float]:
        return TOPIC_MULTIPLIERS[self.strength]

    @property
    def annealing_scale(self) -> float:
        """f of the annealing's sigmoid(−f·a + 6)."""
        return max(self.multipliers) / 7.5


@dataclass(frozen=True, slots=True)
class BiasEdit:
    """logit_y ← logit_y + amount for each y of `tokens`, at every position; −∞ forbids them.

    It is part of the model's distribution: log-probabilities and explanations have it, too. Biases of one token
    add up, whichever edits they are of.
    """

    tokens: tuple[int, ...]
    amount: float
    KIND: ClassVar[int] = 8

    @property
    def cells(self) -> tuple[Cell, ...]:
        return ()


Edit = ScaleEdit | AddEdit | SetEdit | CopyEdit | ProjectOutEdit | SwapEdit | TopicEdit | BiasEdit
