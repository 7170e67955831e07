"""What the student learns from: text, and what the original Transformer made of it, read once and kept on disk."""

from __future__ import annotations

import math
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

_AT_ONCE = 8
"""Rows that the Transformer reads at a time."""


class NumberedRows(Protocol):
    """Rows of ids that can be had by their numbers, alike each time: `training.data.Rows`, or those of `InOrder`."""

    def at(self, step: int, count: int, length: int) -> npt.NDArray[np.int64]:
        """Rows [count, length + 1]."""
        ...


class InOrder:
    """Rows of a stream, one behind the other: of held-out text."""

    def __init__(self, ids: Ids) -> None:
        self._ids = ids

    def at(self, step: int, count: int, length: int) -> npt.NDArray[np.int64]:
        starts = np.arange(step, step + count) * length
        rows: npt.NDArray[np.int64] = self._ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)
        return rows


@dataclass(frozen=True, slots=True)
class Lesson:
    """Some rows: inputs and targets [B, T], the kept states of their trunk [B, T, S, d], what the original expects
    [B, T, d] and the entropy of its predictions [B, T]; see `loss.expected_embedding`."""

    ids: Tensor
    targets: Tensor
    states: Tensor
    expected: Tensor
    entropy: Tensor


class Lessons:
    """`count` rows of `length` tokens, each read by the Transformer when it is first taken, and kept in `folder`.

    Every second row begins with the token `before`, as texts do; the others begin amidst a text. Of the Transformer's
    states those of some `layers` are kept, in bfloat16: (S + 1)·d·2 bytes a token.
    """

    def __init__(
        self, trunk: Trunk, embedding: Tensor, layers: Sequence[int], rows: NumberedRows, before: int, count: int,
        length: int, folder: Path,
    ) -> None:  # fmt: skip
        """Products are computed in the type of `embedding` [V, d], on its device."""
        self.count, self.length, self.layers = count, length, sorted(layers)
        self._trunk, self._embedding, self._rows, self._before = trunk, embedding, rows, before
        folder.mkdir(parents=True, exist_ok=True)
        kept = count, length, len(self.layers) + 1, trunk.spec.width
        self._states = _mapped(folder / "states.bin", torch.bfloat16, kept)
        self._entropy = _mapped(folder / "entropy.bin", torch.float32, (count, length))
        self._is_made = _mapped(folder / "made.bin", torch.uint8, (count,))

    @staticmethod
    def size(count: int, length: int, layers: int, width: int) -> int:
        """Bytes that so many rows take on disk."""
        return count * length * ((layers + 1) * width * 2 + 4)

    def take(self, numbers: Sequence[int]) -> Lesson:
        """The lesson of some rows, by their numbers, on the embedding's device."""
        rows = np.concatenate([self._rows.at(number, 1, self.length) for number in numbers])
        for row, number in zip(rows, numbers, strict=True):
            if number % 2 == 0:
                row[0] = self._before
        ids = torch.from_numpy(rows)
        missing = [at for at, number in enumerate(numbers) if not self._is_made[number]]
        for start in range(0, len(missing), _AT_ONCE):
            self._read_rows(ids, numbers, missing[start : start + _AT_ONCE])
        where, device = torch.tensor(numbers), self._embedding.device
        kept, entropy = self._states[where].to(device), self._entropy[where].to(device)
        ids = ids.to(device)
        return Lesson(ids[:, :-1], ids[:, 1:], kept[:, :, :-1], kept[:, :, -1], entropy)

    @torch.no_grad()
    def _read_rows(self, ids: Tensor, numbers: Sequence[int], which: Sequence[int]) -> None:
        dtype, device = self._embedding.dtype, self._embedding.device
        some, kept = ids[torch.tensor(which), :-1].to(device), []
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for layer, state in enumerate(self._trunk.states(some)):
                if layer in self.layers:
                    kept.append(state)
        expected, entropy = expected_embedding(state.flatten(0, 1), self._embedding)
        whole = torch.stack([*kept, expected.view_as(state)], dim=2).to(torch.bfloat16).cpu()
        for at, states, nats in zip(which, whole, entropy.view(some.shape).cpu(), strict=True):
            number = numbers[at]
            self._states[number], self._entropy[number] = states, nats
            self._is_made[number] = 1


def _mapped(file: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor in a file, zeros where nothing was written yet; it takes room on disk as it is filled."""
    count = math.prod(shape)
    with file.open("ab") as there:
        there.truncate(max(count * dtype.itemsize, there.tell()))
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)
