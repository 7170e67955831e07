"""How fast this machine multiplies and reads memory, measured; and what rate of tokens follows from that."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from backpack_lm.config import BackpackConfig

from tests.bench.sizing import Machine, least_seconds

ROWS = 512
"""Of the texts' vectors that a product multiplies, as many as a step reads beside peers."""
SIDE = 1 << 14
"""Rows and columns of a matrix of four bytes a number that is read, more than any cache holds."""
SECONDS = 1.5
"""For how long each is done: a short try may be half as fast again as what a machine keeps up."""


def this_machine(config: BackpackConfig, dtype: torch.dtype) -> Machine:
    """What torch keeps up: the products of a layer of this trunk, and products of a gigabyte with a vector. Takes 3 s.

    On a shared machine that is no constant: measure it in each round.
    """
    layer, d = config.trunk.layer, config.n_embd
    shapes = (
        (d, (layer.heads + 2 * layer.kv_heads) * layer.head_width),
        (layer.heads * layer.head_width, d),
        (d, (2 if layer.gated else 1) * layer.inner),
        (layer.inner, d),
    )
    factors = [(torch.randn(ROWS, inner).to(dtype), torch.randn(outer, inner).to(dtype)) for inner, outer in shapes]
    operations = sum(2 * ROWS * inner * outer for inner, outer in shapes)
    matrix, vector = torch.ones(SIDE, SIDE), torch.ones(SIDE)
    return Machine(
        memory=matrix.nbytes * _rate(lambda: matrix @ vector),
        operations=operations * _rate(lambda: [F.linear(x, weight) for x, weight in factors]),
    )


def rate_at_bound(config: BackpackConfig, dtype: torch.dtype, batch: int, length: int, new: int) -> float:
    """Tokens a second, prompts' time included, of an engine that multiplies and reads as torch does, and that alone."""
    machine = this_machine(config, dtype)
    return batch * new / least_seconds(config, machine, dtype.itemsize, batch, length, new)


def _rate(work: Callable[[], object]) -> float:
    """How often a second."""
    work()
    began, times = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < SECONDS:
        work()
        times += 1
    return times / took
