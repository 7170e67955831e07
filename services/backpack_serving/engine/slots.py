"""Places of the batch, and ranges of overlay rows: who holds which. Arithmetic only."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass


class Slots:
    """Which places of the batch are free."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """A free slot. Raises IndexError if there is none; ask `free` first."""
        return self._free.pop()

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def check_integrity(self, in_use: set[int]) -> None:
        """Raise AssertionError unless every slot is either free or in use, once."""
        assert sorted([*self._free, *in_use]) == list(range(self.count)), "slots were lost, or are free and in use"


@dataclass(slots=True)
class _RowRange:
    start: int
    size: int
    users: int


class OverlayRows:
    """Ranges of rows behind the sense table, one for each release in use, found by its digest.

    A release that nobody uses keeps its rows until the space is needed; the one unused longest goes first.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranges: OrderedDict[str, _RowRange] = OrderedDict()  # least recently used first

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
        start = self._find(rows, list(self._ranges.values()))
        if start is None:
            start = self._make_room(rows)
        self._ranges[digest] = _RowRange(start, rows, 1)
        return start, True

    def release(self, digest: str) -> None:
        """Give back one use. The rows, if there are any, stay until they are needed for another release."""
        held = self._ranges[digest]
        held.users -= 1
        if not held.users and not held.size:
            del self._ranges[digest]

    def _make_room(self, rows: int) -> int:
        """Forget releases until the rows fit; where that is. Raises MemoryError if they don't beside those in use.

        All streams wait meanwhile: ranges are sorted once, so thousands of small ones take milliseconds.
        """
        taken = sorted((held for held in self._ranges.values() if held.size), key=lambda r: r.start)
        for digest in [digest for digest, held in self._ranges.items() if not held.users]:
            at = bisect_left(taken, self._ranges.pop(digest).start, key=lambda r: r.start)
            del taken[at]
            start = taken[at - 1].start + taken[at - 1].size if at else 0
            if (taken[at].start if at < len(taken) else self.size) - start >= rows:
                return start
        raise MemoryError(f"{rows} overlay rows do not fit beside those in use")

    def _find(self, rows: int, taken: list[_RowRange]) -> int | None:
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
