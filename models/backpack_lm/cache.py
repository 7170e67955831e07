"""The folder for what is made once on a machine and shared by its processes: compiled kernels, sense tables."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import torch
from platformdirs import user_cache_path


def folder(name: str) -> Path:
    """A folder of that name in $XDG_CACHE_HOME/backpack, or ~/.cache/backpack; made if need be.

    Raises OSError if it can't be, or others may put files there: they would run as us.
    """
    path = user_cache_path("backpack") / name
    path.mkdir(parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & stat.S_IWOTH:
        raise PermissionError(
            f"{path} belongs to user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}: others may put files "
            "there; remove it, or let XDG_CACHE_HOME name another folder"
        )
    return path


def cached_name(fingerprint: str, dtype: torch.dtype) -> str:
    """What is computed from a model's sense table in a dtype is stored under this name, or one that starts so."""
    return f"{fingerprint[:32]}.{str(dtype).removeprefix('torch.')}"
