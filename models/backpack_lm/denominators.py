"""max_y (E C)_y of every cell of a model, the denominator of topic scores: V²·k·d operations.

They don't depend on the topic, and a model may ship them (`checkpoint.py`). Otherwise they are computed when a
topic is first used, in blocks of tokens. The host's cache stores every block: a restarted process resumes from the
last one, and other processes read them.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import BinaryIO

import torch
from torch import Tensor

from backpack_lm import processor
from backpack_lm.cache import folder

log = logging.getLogger(__name__)

CELLS, WORDS = 1024, 8192
"""Cells and words of the vocabulary in one product: 32 MB of scores in float32."""

WORTH_ROUNDING = 1e11
"""Multiplications (about a second's) above which bfloat16 finds the maximum, on processors where it is faster."""

WORTH_LOGGING = 10.0
"""Log progress only if more than this many seconds are left."""

LOG_EVERY = 20.0
"""Seconds between two log lines."""

WAIT = 0.2
"""Seconds between two attempts to lock the file while another process computes."""

_CHECKSUM = hashlib.sha256().digest_size

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all). An exception stops the work."""


class ProgressLog:
    """A Progress that logs the share done and the estimated time left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun: tuple[float, int] | None = None
        self._logged_at = -math.inf
        self.seconds_left: float | None = None
        """None until it can be estimated."""

    def __call__(self, done: int, of: int) -> None:
        now = self._clock()
        if self._begun is None:
            self._begun = now, done
        since, before = self._begun
        if done > before:
            self.seconds_left = (now - since) / (done - before) * (of - done)
        left = self.seconds_left
        if left is not None and left > WORTH_LOGGING and now - self._logged_at >= LOG_EVERY:
            self._logged_at = now
            log.warning(
                "computing the denominators of topic scores, once for this model: %d %%, about %s left",
                100 * done // of,
                f"{left / 60:.0f} minutes" if left > 90 else f"{left:.0f} seconds",
            )


def compute(
    rows: Callable[[slice], Tensor],
    shape: Sequence[int],
    embedding: Tensor,
    name: str | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """max_y (E C)_y for C [V, k, d] and E = embedding [V, d]: [V, k] float32, of that `shape`.

    `rows` returns the sense vectors of a slice of tokens, [n, k, d]. With a `name`, blocks are stored under it in
    the cache folder, if that is writable.
    """
    progress = progress or ProgressLog()
    vocabulary, senses = shape
    tokens = max(1, CELLS // senses)
    with _open_locked(name, progress, vocabulary) as kept:
        done = list(_whole_blocks(kept, vocabulary, senses, tokens))
        file = _truncate_file(kept, sum(4 * block.numel() + _CHECKSUM for block in done))
        multiply = _Multiplied(embedding, vocabulary * senses * embedding.numel())
        at = sum(map(len, done))
        progress(at, vocabulary)
        while at < vocabulary:
            cells = rows(slice(at, at + tokens)).flatten(0, 1)
            done.append(multiply.greatest(cells).view(-1, senses))
            file = _append(file, done[-1], at)
            at += len(done[-1])
            progress(at, vocabulary)
    return torch.cat(done)


class _Multiplied:
    """Finds the largest product of a cell with any row of E."""

    def __init__(self, embedding: Tensor, operations: float) -> None:
        self._parts = embedding.float().split(WORDS)
        rounds = operations >= WORTH_ROUNDING and processor.multiplies_bfloat16()
        self._rounded = [part.bfloat16() for part in self._parts] if rounds else None

    @torch.inference_mode()
    def greatest(self, cells: Tensor) -> Tensor:
        """For cells [n, d], max_y E[y]·C [n]."""
        exact = cells.float()
        if self._rounded is None:
            return torch.stack([(exact @ part.t()).amax(1) for part in self._parts]).amax(0)
        found, rounded = [], cells.bfloat16()
        for part, narrow in zip(self._parts, self._rounded, strict=True):
            # The rounded products select the word; its product is computed again in float32.
            likeliest = (rounded @ narrow.t()).argmax(1)
            found.append((exact * part[likeliest]).sum(1))
        return torch.stack(found).amax(0)


def _open_locked(name: str | None, progress: Progress, vocabulary: int) -> BinaryIO:
    """Open the file of a name with an exclusive lock; without a name or a writable folder, a buffer in memory.

    Waits while another process holds the lock; the caller then resumes from the blocks in the file.
    """
    if name is None:
        return io.BytesIO()
    try:
        file = (folder("topics") / name).open("a+b")
    except OSError as error:
        return _in_memory(error)
    try:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            time.sleep(WAIT)
            progress(0, vocabulary)  # the other's progress is unknown, but `progress` may stop the wait
    except BaseException:
        file.close()
        raise


def _whole_blocks(file: BinaryIO, vocabulary: int, senses: int, tokens: int) -> Iterator[Tensor]:
    """Yield the blocks from the start of a file up to the first incomplete or damaged one."""
    file.seek(0)
    for at in range(0, vocabulary, tokens):
        count = min(tokens, vocabulary - at)
        data, checksum = file.read(4 * count * senses), file.read(_CHECKSUM)
        if checksum != _digest_of_tables(data, at):
            return
        yield torch.frombuffer(bytearray(data), dtype=torch.float32).view(count, senses)


def _truncate_file(file: BinaryIO, size: int) -> BinaryIO:
    """Cut a file after its whole blocks; returns a buffer in memory if that fails."""
    try:
        file.seek(size)
        file.truncate()
    except OSError as error:
        return _in_memory(error)
    return file


def _in_memory(error: OSError) -> BinaryIO:
    log.warning("the denominators of topic scores can't be kept, and must be computed again: %s", error)
    return io.BytesIO()


def _append(file: BinaryIO, block: Tensor, at: int) -> BinaryIO:
    """Append a block; returns where to write the next one: memory, once the disk is full."""
    data = block.contiguous().numpy().tobytes()
    try:
        file.write(data + _digest_of_tables(data, at))
        file.flush()
    except OSError as error:
        with suppress(OSError):
            file.close()
        return _in_memory(error)
    return file


def _digest_of_tables(data: bytes, at: int) -> bytes:
    return hashlib.sha256(at.to_bytes(8, "little") + data).digest()
