"""Checks what a replica needs to start. Imports no torch, so that errors appear before that loads."""

from __future__ import annotations

import importlib.util
from functools import partial

from backpack_serving import rpc, starting
from backpack_serving.settings import Settings


async def required(settings: Settings) -> str:
    """Wait for the model's files and the replica key; returns the key.

    Raises ManifestError or ModelNotThere for the model, OSError for the address or the key, ValueError for invalid
    thread counts in the environment, ModuleNotFoundError if torch or llguidance isn't installed.
    """
    for name in ("torch", "llguidance"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
    settings.check_threads()
    await starting.blocking(partial(rpc.check_address, settings.inference_address))
    await starting.model(settings, weights=True)
    return await starting.key(settings, "replica")
