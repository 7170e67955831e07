"""What tenants have left of their limits: numbers in a file that all processes of a gateway map into memory.

A row for each tenant that has limits: how full its buckets are, and how many requests each process runs for it.
Who reads or writes holds the file's lock, which the kernel takes back from a process that is killed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

TENANTS = 2**20
"""Rows that there is room for. The file is sparse: those that aren't used cost nothing."""

BUCKET = 3
"""Numbers of a bucket: its capacity, its level, and when that was so."""

_HEADER, _NAME, _NUMBER = 8, 32, 8


class TenantBuckets:
    """A tenant's numbers, float64: two buckets, and the requests that run in each process. All are 0 at first."""

    def __init__(self, numbers: memoryview[float], process: int) -> None:
        self.requests, self.tokens = numbers[:BUCKET], numbers[BUCKET : 2 * BUCKET]
        self._running, self._process = numbers[2 * BUCKET :], process

    @property
    def running(self) -> int:
        """Requests that run, in all processes."""
        return int(sum(self._running))

    def run(self, more: int) -> None:
        """So many more run in this process."""
        self._running[self._process] += more

    def forget(self) -> None:
        """Nothing runs in this process."""
        self._running[self._process] = 0


class SharedBuckets:
    """Rows by tenant, as process number `process` of `processes` sees them in a file of `shared`.

    Without a file they are those of a gateway that is one process.
    """

    def __init__(self, file: Path | None = None, process: int = 0, processes: int = 1) -> None:
        self._process, self._size = process, _size(processes)
        self._file = os.open(file, os.O_RDWR | os.O_CLOEXEC) if file else None
        mapped = mmap.mmap(-1 if self._file is None else self._file, _HEADER + TENANTS * self._size)
        self._count, self._memory = memoryview(mapped)[:_HEADER].cast("Q"), memoryview(mapped)[_HEADER:]
        self._rows: dict[bytes, TenantBuckets] = {}
        with self._locked():
            self._read_appended()
            for row in self._rows.values():
                row.forget()  # a process of this number that was killed may have left them

    @contextmanager
    def row(self, tenant: str) -> Iterator[TenantBuckets]:
        """A tenant's row, for nobody else while the block runs. Raises MemoryError for tenant number 2**20."""
        name = sha256(tenant.encode()).digest()
        with self._locked():
            if name not in self._rows:
                self._read_appended()
            if name not in self._rows:
                self._append_row(name)
            yield self._rows[name]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self._file is None:
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _read_appended(self) -> None:
        """Take note of rows that were added since, by whichever process."""
        for at in range(len(self._rows), self._count[0]):
            row = self._memory[at * self._size : (at + 1) * self._size]
            self._rows[bytes(row[:_NAME])] = TenantBuckets(row[_NAME:].cast("d"), self._process)

    def _append_row(self, name: bytes) -> None:
        at = self._count[0]
        if at == TENANTS:
            raise MemoryError(f"limits of more than {TENANTS} tenants")
        self._memory[at * self._size : at * self._size + _NAME] = name
        self._count[0] = at + 1
        self._read_appended()


@contextmanager
def shared(processes: int) -> Iterator[Path]:
    """A file for so many processes, while the block runs."""
    with tempfile.NamedTemporaryFile(prefix="backpack-limits-") as file:
        file.truncate(_HEADER + TENANTS * _size(processes))
        yield Path(file.name)


def _size(processes: int) -> int:
    """Bytes of a row."""
    return _NAME + _NUMBER * (2 * BUCKET + processes)
