"""What the student learns from: text, and what its teacher, the original Transformer, made of it, kept on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backpack_lm.adapting.loss import expected_embedding
from backpack_lm.model import Trunk
from backpack_lm.training.data import Ids

READ_ROWS = 8
"""Rows that the teacher reads at a time."""


class NumberedRows(Protocol):
    """Rows of ids by their numbers, the same each time: `training.data.Rows`, or those of `InOrder`."""

    def at(self, step: int, count: int, length: int) -> npt.NDArray[np.int64]:
        """Rows [count, length + 1]."""
        ...


class InOrder:
    """The rows of a stream, one after the other: held-out text."""

    def __init__(self, ids: Ids) -> None:
        self._ids = ids

    def at(self, step: int, count: int, length: int) -> npt.NDArray[np.int64]:
        starts = np.arange(step, step + count) * length
        rows: npt.NDArray[np.int64] = self._ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)
        return rows


@dataclass(frozen=True, slots=True)
class TeacherBatch:
    """Some rows: inputs and targets [B, T], the teacher's kept states [B, T, S, d], what it expects [B, T, d] and the
    entropy of its predictions [B, T]; see `loss.expected_embedding`."""

    ids: Tensor
    targets: Tensor
    states: Tensor
    expected: Tensor
    entropy: Tensor


class TeacherCache:
    """`count` rows of `length` tokens. The teacher reads each when it is first taken; what it made of it stays in
    `folder`, which belongs to this teacher, text, length and layers alone.

    Rows with even numbers begin with the `end_of_text` token, whatever stands there. Of the teacher's states those of
    some `layers` are kept, in bfloat16: (S + 1)·d·2 + 4 bytes a token.
    """

    def __init__(
        self, teacher: Trunk, embedding: Tensor, layers: Sequence[int], rows: NumberedRows, end_of_text: int,
        count: int, length: int, folder: Path,
    ) -> None:  # fmt: skip
        """Products are computed in the type of `embedding` [V, d], on its device. Raises OSError on a full disk."""
        self.count, self.length, self.layers = count, length, sorted(layers)
        self._teacher, self._embedding, self.source, self._end_of_text = teacher, embedding, rows, end_of_text
        folder.mkdir(parents=True, exist_ok=True)
        width = (len(self.layers) + 1) * teacher.spec.width
        self._kept = _mapped(folder / "states.bin", np.int16, (count, length, width))  # bits of bfloat16
        self._states = torch.from_numpy(self._kept).view(torch.bfloat16).unflatten(2, (len(self.layers) + 1, -1))
        self._entropy = _mapped(folder / "entropy.bin", np.float32, (count, length))
        self._is_kept = _mapped(folder / "rows.bin", np.uint8, (count,))

    @staticmethod
    def row_bytes(length: int, layers: int, width: int) -> int:
        """What a row takes on disk."""
        return length * ((layers + 1) * width * 2 + 4)

    def take(self, numbers: Sequence[int]) -> TeacherBatch:
        """Rows by their numbers, below `count`, on the embedding's device."""
        rows = np.concatenate([self.source.at(number, 1, self.length) for number in numbers])
        for row, number in zip(rows, numbers, strict=True):
            if number % 2 == 0:
                row[0] = self._end_of_text
        ids = torch.from_numpy(rows)
        missing = [at for at, number in enumerate(numbers) if not self._is_kept[number]]
        for start in range(0, len(missing), READ_ROWS):
            some = missing[start : start + READ_ROWS]
            self._let_teacher_read(ids[some, :-1], [numbers[at] for at in some])
        where, device = torch.tensor(numbers), self._embedding.device
        states, entropy = self._states[where].to(device), torch.from_numpy(self._entropy[list(numbers)]).to(device)
        ids = ids.to(device)
        return TeacherBatch(ids[:, :-1], ids[:, 1:], states[:, :, :-1], states[:, :, -1], entropy)

    @torch.no_grad()
    def _let_teacher_read(self, ids: Tensor, numbers: Sequence[int]) -> None:
        """Let the teacher read inputs [B, T], and keep what it made of them."""
        dtype, device = self._embedding.dtype, self._embedding.device
        kept = []
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for layer, state in enumerate(self._teacher.states(ids.to(device))):
                if layer in self.layers:
                    kept.append(state)
        expected, entropy = expected_embedding(state.flatten(0, 1), self._embedding)
        self._states[torch.tensor(numbers)] = torch.stack([*kept, expected.view_as(state)], dim=2).bfloat16().cpu()
        self._entropy[list(numbers)] = entropy.view(ids.shape).cpu().numpy()
        for file in (self._kept, self._entropy):  # a row is never called kept before it is
            file.flush()
        self._is_kept[list(numbers)] = 1


def _mapped(file: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """An array in a file, zeros where nothing was written yet. Its room on disk is taken now: a disk that is full is an
    error here, and would end the process later."""
    with file.open("ab") as there:
        os.posix_fallocate(there.fileno(), 0, math.prod(shape) * np.dtype(dtype).itemsize)
    return np.memmap(file, dtype, "r+", shape=shape)
