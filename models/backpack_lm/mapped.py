"""A model's sense table as a file that all replicas of a host map: one copy in memory, computed once.

The mapping is private and longer than the table: what a replica writes behind it, releases' rows, is its own.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from backpack_lm.cache import folder
from backpack_lm.model import Backpack

CHUNK = 1024
"""Tokens whose senses are computed at a time."""

Progress = Callable[[int, int], None]
"""Called with how many tokens of how many are done."""


def file_of(fingerprint: str, dtype: torch.dtype) -> Path:
    """Where the table of a model is kept: named by what it was computed from, so it is never stale."""
    return folder("tables") / f"{fingerprint[:32]}.{str(dtype).removeprefix('torch.')}"


@torch.inference_mode()
def prepare(
    model: Backpack, fingerprint: str, dtype: torch.dtype, progress: Progress = lambda done, of: None
) -> Path:
    """Write the table, whole or not at all, unless it is there; its file. Raises OSError if it can't be."""
    path = file_of(fingerprint, dtype)
    if path.exists():
        return path
    embedding = model.embedding.detach()
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
        try:
            for start in range(0, len(embedding), CHUNK):
                senses = model.sense_network(embedding[start : start + CHUNK]).to(dtype)
                scratch.write(senses.contiguous().view(torch.uint8).numpy().data)
                progress(min(start + CHUNK, len(embedding)), len(embedding))
            scratch.flush()
            os.fsync(scratch.fileno())
            Path(scratch.name).replace(path)
        except BaseException:
            Path(scratch.name).unlink(missing_ok=True)
            raise
    return path


def mapped(path: Path, model: Backpack, dtype: torch.dtype, room: int) -> Tensor:
    """The table in a file of `prepare`, [V·k + room, d], with `room` rows of zeros behind the model's own.

    Raises ValueError if the file is shorter than the model's table: it was damaged, and may be deleted.
    """
    config = model.config
    rows = config.vocab_size * config.num_senses
    shape, wanted = (rows + room, config.n_embd), rows * config.n_embd * dtype.itemsize
    if path.stat().st_size < wanted:
        raise ValueError(f"{path} has {path.stat().st_size} bytes of {wanted}; delete it, it is made anew")
    if path.stat().st_size < (whole := math.prod(shape) * dtype.itemsize):
        with path.open("r+b") as file:
            # A hole takes no space on disk. Not truncated to this length: a replica with more room may have mapped
            # it since, and would be killed where it writes.
            file.seek(whole - 1)
            file.write(b"\0")
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)
