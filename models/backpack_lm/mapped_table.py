"""A model's sense table as a file that all replicas of a host map: one copy in memory, computed once.

The mapping is private and longer than the table: what a replica writes behind it, releases' rows, is its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from backpack_lm.cache import cached_name, folder
from backpack_lm.config import BackpackConfig
from backpack_lm.denominators import Progress
from backpack_lm.int8 import store, stored_width
from backpack_lm.model import Backpack

CHUNK = 1024
"""Tokens whose senses are computed at a time."""

PARTIAL = ".partial"
"""How the name of a file ends that isn't whole yet."""


@torch.inference_mode()
def prepare(model: Backpack, fingerprint: str, dtype: torch.dtype, progress: Progress = lambda done, of: None) -> Path:
    """The file of a model's table, named by what it was computed from and by its checksum.

    If there is none, or it is damaged, it is written, whole or not at all. Raises OSError if it can't be.
    """
    ids, there = torch.arange(model.config.vocab_size), folder("tables")
    start = cached_name(fingerprint, dtype)
    size = _table_rows(model.config) * stored_width(model.config.n_embd, dtype) * dtype.itemsize
    for path in there.glob(f"{start}*"):
        with suppress(FileNotFoundError):  # another replica removes it, too
            if path.suffix[1:] == _file_digest(path, size):
                return path
            path.unlink()  # who has mapped it keeps what it has
    _tidy(there)
    with tempfile.NamedTemporaryFile(dir=there, suffix=PARTIAL, delete=False) as scratch:
        try:
            fcntl.flock(scratch, fcntl.LOCK_EX)
            for at in range(0, len(ids), CHUNK):
                senses = store(model.compute_senses(ids[at : at + CHUNK]), dtype)
                scratch.write(senses.contiguous().view(torch.uint8).numpy().data)
                progress(min(at + CHUNK, len(ids)), len(ids))
            scratch.flush()
            os.fsync(scratch.fileno())
            made = Path(scratch.name)
            return made.replace(there / f"{start}.{_file_digest(made, size)}")
        except BaseException:
            Path(scratch.name).unlink(missing_ok=True)
            raise


def _tidy(there: Path) -> None:
    """Remove what processes left that were killed while they wrote. Who still writes has a lock on it."""
    for left in there.glob(f"*{PARTIAL}"):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _file_digest(path: Path, size: int) -> str:
    """Of so many bytes of a file, those of the table: what is behind them, if anything, is a hole."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (part := file.read(min(size, 2**20))):
            digest.update(part)
            size -= len(part)
    return digest.hexdigest()[:16]


def _table_rows(config: BackpackConfig) -> int:
    return config.vocab_size * config.num_senses


def mapped(path: Path, config: BackpackConfig, dtype: torch.dtype, room: int) -> Tensor:
    """The table in a file of `prepare`, [V·k + room, d] (of int8 with each row's scale, int8.py), with `room` rows of
    zeros behind the model's own."""
    shape = (_table_rows(config) + room, stored_width(config.n_embd, dtype))
    if path.stat().st_size < (whole := math.prod(shape) * dtype.itemsize):
        with path.open("r+b") as file:
            # A hole takes no space on disk. Not truncated to this length: a replica with more room may have mapped
            # it since, and would be killed where it writes.
            file.seek(whole - 1)
            file.write(b"\0")
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)
