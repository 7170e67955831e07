"""How fast this machine multiplies and reads memory, measured; and what rate of tokens follows from that at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from backpack_lm.config import BackpackConfig

from tests.bench.sizing import Machine, least_seconds

PRODUCTS = ((2048, 576, 1536), (2048, 768, 3072), (2048, 2048, 2048), (4096, 4096, 4096))
"""Shapes of products: the fastest counts."""
READ = 1 << 28
"""Numbers of four bytes that are read, more than any cache holds."""
TRIES = 5


@cache
def this_machine(dtype: torch.dtype) -> Machine:
    """The best of some tries with torch: products of a dtype, and a sum over a gigabyte. Takes some seconds."""
    products = []
    for rows, inner, outer in PRODUCTS:
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, outer).to(dtype)
        products.append(2 * rows * inner * outer / _fastest(lambda a=a, b=b: a @ b))  # type: ignore[misc]
    much = torch.ones(READ)
    return Machine(memory=4 * READ / _fastest(much.sum), operations=max(products))


def most(config: BackpackConfig, dtype: torch.dtype, batch: int, length: int, new: int) -> float:
    """Tokens a second, prompts' time included, that this machine can't surpass in this dtype."""
    return batch * new / least_seconds(config, this_machine(dtype), dtype.itemsize, batch, length, new)


def _fastest(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
