"""How what is missing is installed into this environment: by the interpreter that runs, from where we came."""

from __future__ import annotations

import json
import os
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "backpack-serving"


def install_command(extra: str) -> str:
    """The command that brings an extra of ours into the environment of this interpreter.

    From a checkout it installs the checkout, from a wheel or a repository that, and from an index the name.
    """
    origin, python = _origin(), _shorten_path(sys.executable)
    if not origin:
        return f"{python} -m pip install {shlex.quote(f'{NAME}[{extra}]')}"
    url = str(origin["url"])
    if "dir_info" in origin:
        folder = unquote(urlsplit(url).path)
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"{python} -m pip install {editable}{shlex.quote(f'{_shorten_path(folder)}[{extra}]')}"
    if vcs := origin.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return f"{python} -m pip install {shlex.quote(f'{NAME}[{extra}] @ {url}')}"


def _origin() -> dict[str, Any]:
    """What pip notes of where a distribution came from (PEP 610); nothing if it was an index."""
    try:
        found: dict[str, Any] = json.loads(metadata.distribution(NAME).read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return {}
    return found


def _shorten_path(path: str) -> str:
    """A path as somebody in this folder writes it."""
    # Not resolved: an environment's python is a link, and what it links to is another environment's.
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else os.fspath(path)
