"""How fast this machine multiplies and reads memory, measured; and what rate of tokens follows from that at most."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from backpack_lm.config import BackpackConfig

from tests.bench.sizing import Machine, least_seconds

PRODUCTS = ((2048, 576, 1536), (2048, 768, 3072), (2048, 2048, 2048))
"""Shapes of products: the fastest counts."""
READ = 1 << 14
"""Rows and columns of a matrix of four bytes a number that is read, more than any cache holds."""
TRIES = 5


def this_machine(dtype: torch.dtype) -> Machine:
    """The best of some tries: products of a dtype, and sums and products with a vector of a gigabyte. Takes 2 s.

    On a shared machine that is no constant: measure it in each round.
    """
    products = []
    for rows, inner, outer in PRODUCTS:
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, outer).to(dtype)
        products.append(2 * rows * inner * outer / _fastest(lambda a=a, b=b: a @ b))  # type: ignore[misc]
    much, vector = torch.ones(READ, READ), torch.ones(READ)
    reads = much.sum, lambda: much @ vector, lambda: torch.dot(much.view(-1), much.view(-1))
    return Machine(memory=much.nbytes / min(map(_fastest, reads)), operations=max(products))


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
