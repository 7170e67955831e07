"""Large tensors in huge pages, where the system has them: reading many places then takes fewer page walks."""

from __future__ import annotations

import ctypes
import math
import mmap
from contextlib import suppress
from threading import Thread

import torch
from torch import Tensor

LINE = 64
"""Bytes of a cache line, at which copies begin."""
HUGE = 2 << 20
"""Bytes of a huge page. What is smaller is left to torch."""


CHUNK = 32 << 20
"""Bytes that a `Room` takes from the system at a time."""


class Room:
    """Copies of tensors one behind the other in huge pages: most matrices of a small trunk are smaller than one.

    A single thread reads weights from memory 1.2 times as fast as from small pages.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor on the CPU."""
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that is to be written."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._free):
            self._free = zeros(max(size, CHUNK), dtype=torch.uint8, at_once=False)
        taken = self._free[:size].view(dtype).view(shape)
        self._free = self._free[-(-size // LINE) * LINE :]
        return taken


def zeros(*shape: int, dtype: torch.dtype, at_once: bool = True) -> Tensor:
    """Zeros on the CPU. `at_once`: memory is taken from now on, whatever is written there, else when it is."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)  # of shared memory Linux makes no huge pages by default
    with suppress(OSError):  # of a kernel that has none
        memory.madvise(mmap.MADV_HUGEPAGE)
    made = torch.frombuffer(memory, dtype=dtype).view(shape)
    if at_once:  # made at its first use, a cache kept a first token waiting for 0.15 s
        Thread(target=_populate, args=(made, size), name="populate", daemon=True).start()
    return made


_POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE, since 5.14: make pages, and change nothing of what is there."""


def _populate(made: Tensor, size: int) -> None:
    """Let the system make the pages, beside those who write there already; a refusal only means that they wait."""
    madvise, start = ctypes.CDLL(None).madvise, made.data_ptr()
    for at in range(0, size, CHUNK):
        madvise(ctypes.c_void_p(start + at), ctypes.c_size_t(min(CHUNK, size - at)), _POPULATE_WRITE)
