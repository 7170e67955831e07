"""Models by their names: those that come with the project, and where they are on this machine.

`weights/` has a folder for each. One is a model folder as it is. Another is an adapter: its Transformer is published
elsewhere, and the model folder is put together once and kept in the cache folder (`backpack model install`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from platformdirs import user_cache_path

from backpack_lm.manifest import NAME as MANIFEST
from backpack_lm.manifest import TOKENIZER, TOPICS, file_digest

ADAPTER = "adapter.json"
"""The file that says that a folder is an adapter, and for which Transformer: adapting/adapter.py."""

COPIED = (TOKENIZER, TOPICS, "*_config.json", "*.jinja", "*.txt.xz", "token_counts.*")
"""Patterns of the small files that a model folder gets from its adapter as they are."""


def weights() -> Path:
    """The models that come with the project: in the wheel beside the code, in a checkout under models/."""
    package = Path(str(files("backpack_lm")))
    packaged = package / "weights"
    return packaged if packaged.exists() else package.parent / "weights"


def names() -> list[str]:
    """The names of models that come with the project."""
    return sorted(folder.name for folder in weights().iterdir() if (folder / MANIFEST).exists() or is_adapter(folder))


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER).exists()


def folder_of(name: str) -> Path:
    """The model folder of a name; of an adapter's, it is there once the model is installed.

    An adapter's folder is named by the content of the adapter and of the files that are copied: another version is
    another folder, and what is served stays as it is.
    """
    adapter = weights() / name
    if not is_adapter(adapter):
        return adapter
    copied = "".join(f"{file.name} {file_digest(file)}\n" for file in copied_files(adapter))
    return _models_folder() / f"{_stem(name)}-{hashlib.sha256(copied.encode()).hexdigest()[:8]}"


def copied_files(folder: Path) -> Sequence[Path]:
    """The small files of a folder that an installed model has as they are, in the adapter and in the model folder."""
    return sorted({file for pattern in COPIED for file in folder.glob(pattern)})


def earlier_install(name: str) -> Path | None:
    """The folder of an earlier install of the same adapter, with other copied files: its weights and its sense table
    are those of `folder_of`."""
    now, others = folder_of(name), _models_folder().glob(f"{_stem(name)}*")
    return next((folder for folder in others if folder != now and (folder / MANIFEST).exists()), None)


def _models_folder() -> Path:
    return user_cache_path("backpack") / "models"


def _stem(name: str) -> str:
    """How the folders of all installs of an adapter begin: its own files are in adapter.json by their digests."""
    return f"{name}-{file_digest(weights() / name / ADAPTER)[:16]}"


def missing(model: Path) -> str | None:
    """The name of the model that a folder is for, if it comes with the project and isn't installed yet."""
    if (model / MANIFEST).exists():
        return None
    return next((name for name in names() if is_adapter(weights() / name) and folder_of(name) == model), None)


def resolved(model: Path) -> Path:
    """The folder of a model that is given by its folder or its name; if there is a folder of that name, it wins."""
    name = str(model)
    return folder_of(name) if not model.exists() and name in names() else model
