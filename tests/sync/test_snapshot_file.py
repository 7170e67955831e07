"""What is on disk after the process or the power was cut, at any point; and files that somebody damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backpack_serving.sync.snapshot_file import BlobFolder, SnapshotFile


class Cut(Exception):
    """The process ends here."""


@pytest.fixture
def file(tmp_path: Path) -> SnapshotFile:
    return SnapshotFile(tmp_path / "cache" / "book")


def test_the_last_write_is_read_back_and_is_private(file: SnapshotFile) -> None:
    assert file.read() is None
    for payload in (b"one", b"", bytes(100_000)):
        file.write(payload)
        kept = file.read()
        assert kept is not None
        assert kept.payload == payload
    assert file.path.stat().st_mode & 0o077 == 0
    file.touch(1e9)
    kept = file.read()
    assert kept is not None
    assert kept.fresh == 1e9


def test_a_file_that_cannot_be_read_is_as_good_as_damaged(file: SnapshotFile) -> None:
    file.write(b"one")
    file.write(b"two")
    file.path.unlink()
    file.path.mkdir()
    kept = file.read()
    assert kept is not None
    assert kept.payload == b"one"


def _cut_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Let so many system calls through; the one after them is never made."""
    left = iter(range(steps))

    def guarded(call: Any) -> Any:
        def act(*args: Any, **more: Any) -> Any:
            if next(left, None) is None:
                raise Cut
            return call(*args, **more)

        return act

    for module, name in ((os, "open"), (os, "fsync"), (Path, "replace"), (os, "fdopen")):
        patch.setattr(module, name, guarded(getattr(module, name)))


def test_a_write_cut_off_anywhere_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    cuts, outcomes = 0, set()
    for steps in range(20):
        file = SnapshotFile(tmp_path / str(steps) / "book")
        file.write(b"older")
        file.write(b"old")
        with pytest.MonkeyPatch.context() as patch:
            _cut_after(steps, patch)
            try:
                file.write(b"new")
                break
            except Cut:
                cuts += 1
        kept = file.read()
        assert kept is not None, f"nothing is left after {steps} steps"
        assert kept.payload in (b"old", b"new"), f"after {steps} steps: {kept.payload!r}"
        outcomes.add(kept.payload)
        file.write(b"next")
        assert file.read().payload == b"next"  # type: ignore[union-attr]
    assert cuts >= 6
    assert outcomes == {b"old", b"new"}


def _damages(data: bytes) -> Iterator[bytes]:
    yield b""
    for size in (1, len(data) // 2, len(data) - 1):
        yield data[:size]
    for at in range(len(data)):
        yield data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    yield data + b"x"


def test_a_damaged_file_is_never_used_the_one_before_it_is(file: SnapshotFile) -> None:
    file.write(b"before")
    file.write(b"newest")
    whole = file.path.read_bytes()
    count = 0
    for damaged in _damages(whole):
        file.path.write_bytes(damaged)
        kept = file.read()
        assert kept is not None
        assert kept.payload == b"before"
        count += 1
    assert count > 60
    # A write after the damage must not push the good one out.
    file.write(b"next")
    file.path.write_bytes(whole[:-1])
    assert file.read().payload == b"before"  # type: ignore[union-attr]
    for path in file.path.parent.iterdir():
        path.write_bytes(b"nothing of ours")
    assert file.read() is None


def test_blobs_are_found_by_digest_and_forgotten_when_nobody_wants_them(tmp_path: Path) -> None:
    blobs = BlobFolder(tmp_path)
    for digest in ("aa", "bb"):
        blobs.write(digest, digest.encode() * 3)
    assert blobs.read("aa") == b"aaaaaa"
    assert blobs.read("cc") is None
    blobs.forget_all_but(frozenset({"bb"}))
    assert blobs.read("aa") is None
    assert blobs.read("bb") == b"bbbbbb"
