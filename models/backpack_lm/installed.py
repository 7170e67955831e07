"""Models by their names: those that come with the project, and where they are on this machine.

`weights/` has a folder for each. One is a model folder as it is. Another is an adapter: its Transformer is published
elsewhere, and the model folder is put together once and kept in the cache folder (`backpack model install`).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from platformdirs import user_cache_path

from backpack_lm.manifest import NAME as MANIFEST
from backpack_lm.manifest import file_digest

ADAPTER = "adapter.json"
"""The file that says that a folder is an adapter, and for which Transformer: adapting/adapter.py."""


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
    """The model folder of a name; of an adapter's, it is there once the model is installed."""
    folder = weights() / name
    if not is_adapter(folder):
        return folder
    # By its content: another version is another folder, and what is served stays as it is.
    return user_cache_path("backpack") / "models" / f"{name}-{file_digest(folder / ADAPTER)[:16]}"


def missing(model: Path) -> str | None:
    """The name of the model that a folder is for, if it comes with the project and isn't installed yet."""
    if (model / MANIFEST).exists():
        return None
    return next((name for name in names() if is_adapter(weights() / name) and folder_of(name) == model), None)


def resolved(model: Path) -> Path:
    """A folder as it is, a name's model folder. A folder of that name that is there comes first."""
    name = str(model)
    return folder_of(name) if not model.exists() and name in names() else model
