"""Folders that are written beside and then renamed: whoever is stopped leaves what was there, or nothing."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def whole(folder: Path, last: str, ours: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder for the files of `folder`; they go there when the block ends without an error.

    A folder that isn't there appears at once with all of them. One that is there is exchanged for the new one at once,
    too; all other files in it stay, except `ours`: files that the new one could have and has not.

    Some folders can't be renamed: mount points, this process's working directory, those in a folder that isn't ours to
    write to, and all on systems other than Linux. There each file replaces its namesake, one after the other. The file
    called `last` is removed first and written last: whoever is stopped leaves the folder without it, and nobody takes
    a mixture for a whole.

    Raises OSError, before anything is written, if nothing can be written there or another process does so now.
    """
    folder = folder.resolve()
    there = folder.exists()
    if there and not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} can't be written to")
    work = _make_work_folder(folder, there)
    scratch = work / "new"
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{folder} is being written by another process; wait for it") from None
        try:
            _empty(work)  # of one that was killed
            scratch.mkdir()
            yield scratch
            if not there:
                scratch.rename(folder)
            elif not _exchange(scratch, folder, ours):
                _replace(scratch, folder, last, ours)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)


def _make_work_folder(folder: Path, there: bool) -> Path:
    """Beside the folder if that is possible; else in it."""
    beside = folder.parent / f".{folder.name}.partial"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not there or not folder.is_mount():
        try:
            beside.mkdir(exist_ok=True)
            return beside
        except OSError:
            if not there:
                raise
    inside = folder / ".partial"
    inside.mkdir(exist_ok=True)
    return inside


def _exchange(scratch: Path, folder: Path, ours: Sequence[str]) -> bool:
    """Put the new folder in the place of the old one, with the files of others in it; False if that can't be."""
    if folder in scratch.parents or Path.cwd().is_relative_to(folder):  # a shell would be in a folder that is gone
        return False
    made = {file.name for file in scratch.iterdir()}
    others = [file for file in folder.iterdir() if file.name not in made and file.name not in ours]
    try:
        for file in others:
            link(file, scratch / file.name)
        shutil.copystat(folder, scratch)
        with suppress(PermissionError):
            os.chown(scratch, folder.stat().st_uid, folder.stat().st_gid)
        _rename_exchange(scratch, folder)
    except OSError:
        for file in others:
            _remove(scratch / file.name)
        return False
    return True


def link(file: Path, to: Path) -> None:
    """A file, or a folder with all that is in it, also under another name, without copying what it contains."""
    if file.is_symlink():
        to.symlink_to(file.readlink())
    elif file.is_dir():
        shutil.copytree(file, to, symlinks=True, copy_function=os.link)
    else:
        os.link(file, to)


def _rename_exchange(one: Path, other: Path) -> None:
    """Exchange two folders, at once. Raises OSError where the system or the file system can't."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError("no renameat2")
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


def _replace(scratch: Path, folder: Path, last: str, ours: Sequence[str]) -> None:
    (folder / last).unlink(missing_ok=True)
    for name in ours:
        (folder / name).unlink(missing_ok=True)
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == last):
        file.replace(folder / file.name)


def _empty(folder: Path) -> None:
    for left in folder.iterdir():
        _remove(left)


def _remove(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
