"""Large tensors in huge pages (2 MiB), where the system has them: random reads then miss the TLB less often."""

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
"""Bytes of a huge page. Smaller tensors are allocated by torch."""


CHUNK = 32 << 20
"""Bytes that a `Room` allocates at a time, and that `_populate` asks for in one call."""


class Room:
    """An arena of huge pages that holds many tensors one after the other.

    Most matrices of a small trunk are smaller than a huge page, so each by itself would lie in small pages. One thread
    reads weights 1.2 times as fast from huge pages.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor on the CPU."""
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor. It begins at a cache line."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._free):
            self._free = zeros(max(size, CHUNK), dtype=torch.uint8, at_once=False)
        taken = self._free[:size].view(dtype).view(shape)
        self._free = self._free[-(-size // LINE) * LINE :]
        return taken


def zeros(*shape: int, dtype: torch.dtype, at_once: bool = True) -> Tensor:
    """A tensor of zeros on the CPU, in huge pages if it is as large as one.

    With `at_once` a thread allocates the physical memory in the background, from now on; otherwise the system allocates
    each page when it is first written.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)  # of shared memory Linux makes no huge pages by default
    with suppress(OSError):  # the kernel has no huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    made = torch.frombuffer(memory, dtype=dtype).view(shape)
    if at_once:  # allocated at its first use, a cache delayed the first token by 0.15 s
        Thread(target=_populate, args=(made, size), name="populate", daemon=True).start()
    return made


def give_back_freed() -> None:
    """Give the system back what malloc keeps of freed memory, where it is glibc's.

    Among small tensors that stay, holes that large ones have left aren't filled again: a rank's weights in int8 took
    twice their size when they had been converted one after the other.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


_POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE, since 5.14: allocate pages and leave their content as it is."""


def _populate(made: Tensor, size: int) -> None:
    """Allocate the pages of a tensor; others may write to it meanwhile. Where the system refuses, the first write to a
    page allocates it."""
    madvise, start = ctypes.CDLL(None).madvise, made.data_ptr()
    for at in range(0, size, CHUNK):
        madvise(ctypes.c_void_p(start + at), ctypes.c_size_t(min(CHUNK, size - at)), _POPULATE_WRITE)
