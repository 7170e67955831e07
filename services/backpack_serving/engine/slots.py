"""Places of the batch, and ranges of overlay rows: who holds which. Arithmetic only."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass


class Slots:
    """Slots 0 … count − 1. The lowest free one is given, so that those in use lie together."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))

    @property
    def free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """A free slot. Raises IndexError if there is none; ask `free` first."""
        return heapq.heappop(self._free)

    def release(self, slot: int) -> None:
        heapq.heappush(self._free, slot)

    def check_integrity(self, in_use: set[int]) -> None:
        """Raise AssertionError unless every slot is either free or in use, once."""
        free = set(self._free)
        assert len(free) == len(self._free), f"slots freed twice: {sorted(self._free)}"
        assert free.isdisjoint(in_use), f"slots free and in use: {free & in_use}"
        assert free | in_use == set(range(self.count)), "slots were lost"


@dataclass(slots=True)
class _Range:
    start: int
    size: int
    users: int


class OverlayRows:
    """Ranges of rows behind the sense table, one for each release in use, found by its digest.

    A release that nobody uses keeps its rows until the space is needed; the one unused longest goes first.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranges: OrderedDict[str, _Range] = OrderedDict()  # least recently used first

    def can_hold(self, digest: str, rows: int) -> bool:
        """Whether `acquire` would succeed now."""
        if digest in self._ranges:
            return True
        return self._find(rows, [r for r in self._ranges.values() if r.users]) is not None

    def acquire(self, digest: str, rows: int) -> tuple[int, bool]:
        """(first row, whether it has to be filled). Raises MemoryError if `can_hold` is false."""
        if held := self._ranges.get(digest):
            held.users += 1
            self._ranges.move_to_end(digest)
            return held.start, False
        while (start := self._find(rows, list(self._ranges.values()))) is None:
            unused = next((d for d, r in self._ranges.items() if not r.users), None)
            if unused is None:
                raise MemoryError(f"{rows} overlay rows do not fit beside those in use")
            del self._ranges[unused]
        self._ranges[digest] = _Range(start, rows, 1)
        return start, True

    def release(self, digest: str) -> None:
        """Give back one use. The rows stay until they are needed for another release."""
        self._ranges[digest].users -= 1

    @property
    def resident(self) -> int:
        return len(self._ranges)

    def _find(self, rows: int, taken: list[_Range]) -> int | None:
        """First fit: the start of the lowest gap of that size."""
        start = 0
        for held in sorted(taken, key=lambda r: r.start):
            if held.start - start >= rows:
                return start
            start = max(start, held.start + held.size)
        return start if self.size - start >= rows else None

    def check_integrity(self, users: dict[str, int]) -> None:
        """Raise AssertionError unless ranges don't overlap and their users are these."""
        end = 0
        for held in sorted(self._ranges.values(), key=lambda r: (r.start, r.size)):
            assert held.start >= end, "overlay rows overlap"
            end = held.start + held.size
        assert end <= self.size, "overlay rows beyond the table"
        counted = {digest: held.users for digest, held in self._ranges.items() if held.users}
        assert counted == users, f"overlay users {counted}, but running are {users}"
