"""What a step of the engine reads and writes beside the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from backpack_lm import processor
from backpack_lm.config import BackpackConfig
from backpack_lm.kernels import huge_pages
from backpack_lm.overlay import TopicMultipliers

LANES = 16
"""The size of a page is a multiple of this: kernels read whole vectors."""

PAGE = 128
"""Positions of a page, unless somebody asks for other ones."""


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
    """Tensors of S slots with T positions each, and of pages of P positions that any slots share. A slot's position t
    is in page `page_table[slot, t // P]`, at t % P.

    keys        [L, pages, G, P/16, w, 16]  of the trunk's G key/value heads, in tiles of 16 positions: kernels score
                                            a tile at a time
    values      [L, pages, G, P, w]
    sense_keys  [pages, k, P/16, w, 16]     of the sense weights, whose heads have a width of their own
    page_table  [S, T/P] int32              on the same device: what is behind a slot's last position is never read
    ids         [S, T] int32       tokens
    rows        [S, T, k] int32    row of `table` for each sense of each position
    previous    [S, T] int32       where the same token stood last before, −1 if nowhere
    following   [S, T] int32       where it stands next, 0 if nowhere: a repeated token is mixed in once
    annealed_sum   [S, T, k] float32  a = Σ_i relu(E[x_i]·C(x_j)_l), where a topic is annealed
    table       [V·k + R, d]       sense vectors, as int8.py stores them; R rows of releases behind the model's own
    embedding   [V, d]             E

    Keys and values follow from tokens alone: whatever their releases, sequences that begin alike share pages. What
    is kept for each slot takes 140 bytes a position at 16 senses, 1.1 MiB of a slot of 8,192: a fiftieth to a
    three-hundredth of its keys and values. Of all these, only `rows` and `annealed_sum` depend on a patch, and they
    follow from `ids`.
    """

    keys: Tensor
    values: Tensor
    sense_keys: Tensor
    page_table: Tensor
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
        *,
        context: int | None = None,
        pages: int | None = None,
        page_size: int = PAGE,
    ) -> Caches:
        """Caches on the table's device and in its dtype, of slots with `context` positions, rounded up to whole pages
        (default: the model's). There are as many pages as all slots can fill, unless `pages` says how many. Beside a
        table of int8 they are bfloat16 where the processor multiplies it, else float32, unless `dtype` says."""
        assert page_size % LANES == 0, "kernels read whole tiles"
        if dtype is None:
            fast = torch.bfloat16 if processor.multiplies_bfloat16() else torch.float32
            dtype = fast if table.dtype is torch.int8 else table.dtype
        L, k, dk, P = config.trunk.depth, config.num_senses, config.sense_head_width, page_size
        G, w = config.trunk.layer.kv_heads, config.trunk.layer.head_width
        each = -(-(context or config.n_positions) // P)
        S, T, N = slots, each * P, slots * each if pages is None else pages

        def zeros(*shape: int, dtype: torch.dtype = dtype, at_once: bool = True) -> Tensor:
            if table.device.type == "cpu":
                return huge_pages.zeros(*shape, dtype=dtype, at_once=at_once)
            return torch.zeros(shape, dtype=dtype, device=table.device)

        return cls(
            zeros(L, N, G, P // LANES, w, LANES),
            zeros(L, N, G, P, w),
            zeros(N, k, P // LANES, dk, LANES),
            zeros(S, each, dtype=torch.int32),
            zeros(S, T, dtype=torch.int32, at_once=False),
            zeros(S, T, k, dtype=torch.int32, at_once=False),
            zeros(S, T, dtype=torch.int32, at_once=False),
            zeros(S, T, dtype=torch.int32, at_once=False),
            zeros(S, T, k, dtype=torch.float32, at_once=False),
            table,
            embedding.to(table.device, dtype),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of keys, values and embedding, and of what goes from one operation to the next."""
        return self.keys.dtype

    @property
    def page_size(self) -> int:
        """P."""
        return self.values.shape[3]

    @property
    def pages(self) -> int:
        """Pages in all."""
        return self.values.shape[1]

    def copy_page(self, donor: int, page: int, count: int) -> None:
        """Copy the first `count` positions of a page into another: keys, values and sense keys."""
        tiles = -(-count // LANES)  # what lies beyond in the last one is overwritten before it is read
        self.keys[:, page, :, :tiles] = self.keys[:, donor, :, :tiles]
        self.values[:, page, :, :count] = self.values[:, donor, :, :count]
        self.sense_keys[page, :, :tiles] = self.sense_keys[donor, :, :tiles]

    def write(self, layer: int, slot: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write a layer's keys and values [n, G, w] of a slot's positions from `start` on."""
        positions = torch.arange(start, start + len(keys), device=keys.device)
        pages, at = self.page_table[slot, positions // self.page_size].long(), positions % self.page_size
        self.keys[layer][pages, :, at // LANES, :, at % LANES] = keys
        self.values[layer][pages, :, at] = values

    def write_sense_keys(self, keys: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Write the sense weights' keys [N, k, d/k] of new tokens."""
        pages, at = self.page_table[slots, positions // self.page_size].long(), positions % self.page_size
        self.sense_keys[pages, :, at // LANES, :, at % LANES] = keys

    def read(self, layer: int, slots: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """A layer's keys [B, G, w, length] and values [B, G, length, w] of slots [B] (copies)."""
        pages = self._pages_of(slots, length)
        values = self.values[layer][pages].transpose(1, 2).flatten(2, 3)
        return _untiled(self.keys[layer][pages])[..., :length], values[:, :, :length]

    def read_sense_keys(self, slots: Tensor, length: int) -> Tensor:
        """Of slots [B]: [B, k, d/k, length] (a copy)."""
        return _untiled(self.sense_keys[self._pages_of(slots, length)])[..., :length]

    def _pages_of(self, slots: Tensor, length: int) -> Tensor:
        return self.page_table[slots, : -(-length // self.page_size)].long()


def _untiled(keys: Tensor) -> Tensor:
    """Keys [B, pages, G, P/16, w, 16] as matrices [B, G, w, T]."""
    return keys.permute(0, 2, 4, 1, 3, 5).flatten(3)
