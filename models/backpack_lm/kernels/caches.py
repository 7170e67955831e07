"""What a step of the engine reads and writes beside the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from backpack_lm import processor
from backpack_lm.config import BackpackConfig
from backpack_lm.kernels import pages
from backpack_lm.overlay import TopicMultipliers

LANES = 16
"""The context of a cache is a multiple of this: kernels read whole vectors."""


class StepInput(NamedTuple):
    """A step's new tokens: ids, slots and positions [N], and the table rows that are their senses [N, k] int32."""

    tokens: Tensor
    slots: Tensor
    positions: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> StepInput:
        return self if device.type == "cpu" else StepInput._make(part.to(device, non_blocking=True) for part in self)


class TokenSpan(NamedTuple):
    """Consecutive new tokens of one sequence: `size` of them, from `token` in the step's tokens [N], at the
    positions from `position` on of a slot."""

    token: int
    slot: int
    position: int
    size: int


class MixSpan(NamedTuple):
    """The next token of a slot that holds `length` tokens, steered by topics.

    `fresh`: the newest token has still to be counted in the slot's annealing.
    """

    slot: int
    length: int
    fresh: bool
    topics: tuple[TopicMultipliers, ...] = ()


class DrawParams(NamedTuple):
    """How a token is chosen: the greatest logit at `temperature` 0, otherwise drawn with the noise of `seed` and
    `position`: of the `top_k` likeliest (0: of all) the smallest set that has at least `top_p` of their
    probability. Of equal ones the first in the vocabulary is the likelier.
    """

    temperature: float
    seed: int
    position: int
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Caches:
    """Tensors of S slots with T positions (the context, rounded up to a multiple of 16):

    keys        [L, S, H, T/16, d/H, 16]  of the trunk, in tiles of 16 positions: kernels score a tile at a time
    values      [L, S, H, T, d/H]
    sense_keys  [S, k, T/16, d/k, 16]     of the sense weights
    ids         [S, T] int32       tokens
    rows        [S, T, k] int32    row of `table` for each sense of each position
    previous    [S, T] int32       where the same token stood last before, −1 if nowhere
    following   [S, T] int32       where it stands next, 0 if nowhere: a repeated token is mixed in once
    annealed_sum   [S, T, k] float32  a = Σ_i relu(E[x_i]·C(x_j)_l), where a topic is annealed
    table       [V·k + R, d]       sense vectors, as int8.py stores them; R rows of releases behind the model's own
    embedding   [V, d]             E

    Of all these, only `rows` and `annealed_sum` depend on a patch, and they follow from `ids`.
    """

    keys: Tensor
    values: Tensor
    sense_keys: Tensor
    ids: Tensor
    rows: Tensor
    previous: Tensor
    following: Tensor
    annealed_sum: Tensor
    table: Tensor
    embedding: Tensor

    @classmethod
    def empty(
        cls,
        config: BackpackConfig,
        slots: int,
        table: Tensor,
        embedding: Tensor,
        dtype: torch.dtype | None = None,
    ) -> Caches:
        """Caches on the table's device and in its dtype; beside a table of int8, unless `dtype` says otherwise, in
        bfloat16 where the processor multiplies it, else in float32."""
        if dtype is None:
            fast = torch.bfloat16 if processor.multiplies_bfloat16() else torch.float32
            dtype = fast if table.dtype is torch.int8 else table.dtype
        L, S, H, k = config.n_layer, slots, config.n_head, config.num_senses
        w, dk = config.n_embd // H, config.sense_head_width
        T = -(-config.n_positions // LANES) * LANES

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            if table.device.type == "cpu":
                return pages.zeros(*shape, dtype=dtype)
            return torch.zeros(shape, dtype=dtype, device=table.device)

        return cls(
            zeros(L, S, H, T // LANES, w, LANES),
            zeros(L, S, H, T, w),
            zeros(S, k, T // LANES, dk, LANES),
            zeros(S, T, dtype=torch.int32),
            zeros(S, T, k, dtype=torch.int32),
            zeros(S, T, dtype=torch.int32) - 1,
            zeros(S, T, dtype=torch.int32),
            zeros(S, T, k, dtype=torch.float32),
            table,
            embedding.to(table.device, dtype),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of keys, values and embedding, and of what goes from one operation to the next."""
        return self.keys.dtype

    def copy_prefix(self, donor: int, slot: int, count: int) -> None:
        """Copy the first `count` positions from a donor slot: keys, values and sense keys, which no patch changes."""
        tiles = -(-count // LANES)  # what lies beyond in the last one is overwritten before it is read
        self.keys[:, slot, :, :tiles] = self.keys[:, donor, :, :tiles]
        self.values[:, slot, :, :count] = self.values[:, donor, :, :count]
        self.sense_keys[slot, :, :tiles] = self.sense_keys[donor, :, :tiles]

    def write_sense_keys(self, keys: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Write the sense weights' keys [N, k, d/k] of new tokens."""
        self.sense_keys[slots, :, positions // LANES, :, positions % LANES] = keys


def untiled(keys: Tensor) -> Tensor:
    """Keys [..., T/16, w, 16] as a matrix [..., w, T] (a copy)."""
    return keys.transpose(-3, -2).flatten(-2)
