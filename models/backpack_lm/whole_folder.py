"""Folders that are written beside and then renamed: whoever is stopped leaves what was there, or nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(folder: Path, last: str) -> Iterator[Path]:
    """An empty folder for the files of `folder`; they go there when the block ends without an error.

    A folder that isn't there appears at once with all of them. In one that is, each file replaces its namesake.
    The file called `last` is removed first and written last, so that nobody takes a mixture for a whole.

    Raises OSError, before anything is written, if nothing can be written there or another process does so now.
    """
    folder = folder.absolute()
    there = folder.exists()
    scratch = folder / ".partial" if there else folder.parent / f".{folder.name}.partial"
    scratch.parent.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    lock = os.open(scratch, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{folder} is being written by another process; wait for it") from None
        try:
            _empty(scratch)  # of one that was killed
            yield scratch
            if there:
                _replace(scratch, folder, last)
            else:
                scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(lock)


def _replace(scratch: Path, folder: Path, last: str) -> None:
    (folder / last).unlink(missing_ok=True)
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == last):
        file.replace(folder / file.name)


def _empty(scratch: Path) -> None:
    for left in scratch.iterdir():
        left.unlink()
