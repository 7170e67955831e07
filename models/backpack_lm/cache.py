"""The folder for what is made once on a machine and shared by its processes: compiled kernels, sense tables."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path


def folder(name: str) -> Path:
    """A folder of that name in $XDG_CACHE_HOME/backpack, or ~/.cache/backpack; made if need be."""
    path = user_cache_path("backpack") / name
    path.mkdir(parents=True, exist_ok=True)
    return path
