"""Ranges of overlay rows: which releases give way for a new one, and with how much work."""

from __future__ import annotations

from random import Random

from backpack_serving.engine.slots import OverlayRows
from hypothesis import given
from hypothesis import strategies as st

from tests.work import bytecodes


def _used(rows: OverlayRows, digest: str, size: int) -> bool:
    """Use a release and give it back; whether its rows had to be filled."""
    _, fill = rows.acquire(digest, size)
    rows.release(digest)
    return fill


@given(st.integers(0, 2**32))
def test_those_unused_longest_give_way_and_no_more_than_must(seed: int) -> None:
    """Beside some in use, against the definition: one after the other goes until the new one fits."""
    draw, rows = Random(seed), OverlayRows(40)
    users: dict[str, int] = {}
    for n in range(60):
        digest, size = f"r{n}", draw.randint(0, 12)
        before = {d: (r.start, r.size) for d, r in rows._ranges.items()}
        if not rows.can_hold(digest, size):
            del users[gone := draw.choice(sorted(users))]
            rows.release(gone)
            continue
        assert rows.acquire(digest, size)[1]
        kept = set(rows._ranges) - {digest}
        gone = [d for d in before if d not in kept]
        assert gone == [d for d in before if d not in users][: len(gone)]
        if gone:
            *_, last = gone
            with_last = sorted(before[d] for d in (*kept, last))
            ends = [0, *(at + size for at, size in with_last)]
            gaps = [at - end for (at, _), end in zip([*with_last, (40, 0)], ends, strict=True)]
            assert max(gaps) < size, "one too many went"
        if draw.random() < 0.2:
            users[digest] = 1
        else:
            rows.release(digest)
        rows.check_integrity(users)


def _work_to_make_room(releases: int) -> int:
    """Instructions that it takes to find room for one as large as half of all the others, who lie in no order."""
    rows, draw = OverlayRows(4 * releases), Random(1)
    order = list(range(releases))
    for n in order:
        _used(rows, f"r{n}", 4)
    draw.shuffle(order)
    for n in order:
        assert not _used(rows, f"r{n}", 4)
    work = bytecodes(lambda: rows.acquire("large", releases // 2))
    assert 1 < len(rows._ranges) < releases, "some gave way"
    return work


def test_the_work_to_make_room_grows_as_the_number_of_releases() -> None:
    """Streams wait meanwhile: thousands of small ones take milliseconds. Sorting them for each would be four times."""
    assert _work_to_make_room(1024) < 3 * _work_to_make_room(512)


def test_releases_without_rows_leave_nothing_behind() -> None:
    rows = OverlayRows(10)
    for n in range(100):
        assert _used(rows, f"topic {n}", 0)
    assert not rows._ranges
