"""Finds out why a file can't be written, by writing another one beside it.

SQLite says "disk I/O error" for a full disk, and keeps the system's reason to itself.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

ROOM = 256 * 1024
"""Free bytes that a small database needs: for its pages, its log, and the log's index."""


def diagnose(file: Path) -> str:
    """Why a file or its folder can't be written, with the free bytes; empty if it can."""
    folder = file.parent
    for path in (file, *(file.with_name(file.name + end) for end in ("-wal", "-shm"))):
        if path.exists() and not os.access(path, os.W_OK, effective_ids=True):
            return f"{path} can't be written to by user {os.geteuid()}{_read_only(folder)}"
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as trial:
            if trial.write(bytes(ROOM)) < ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(trial.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full ({error.strerror}): {_free(folder)}; make room, then start the service again"
        return f"{folder} can't be written to: {error.strerror}"
    return ""


def _free(folder: Path) -> str:
    try:
        found = os.statvfs(folder)
    except OSError:
        return str(folder)
    files = "" if found.f_favail or not found.f_files else ", and no file can be made"
    return f"{found.f_bavail * found.f_frsize} bytes are free in {folder}{files}"


def _read_only(folder: Path) -> str:
    try:
        return ": the file system is read-only" if os.statvfs(folder).f_flag & os.ST_RDONLY else ""
    except OSError:
        return ""
