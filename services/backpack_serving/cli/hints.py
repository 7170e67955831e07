"""What a command says may be run next: written so that it runs as it stands, here."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from backpack_serving.cli.contexts import named_context


def backpack(words: str) -> str:
    """`backpack WORDS`, by the name under which this shell finds the program that runs."""
    return f"{_program()} {words}"


def again(words: str, tenant: str, channel: str = "live") -> str:
    """The same for a tenant or a context that was named, and a channel: run as it stands, it acts on no other."""
    where = f" --channel {shlex.quote(channel)}" if channel != "live" else ""
    who = f" --as {shlex.quote(tenant)}" if tenant else ""
    if context := named_context.get():
        who = f" --context {shlex.quote(context)}"
    return backpack(f"{words}{where}{who}")


def _program() -> str:
    ran = Path(sys.argv[0])
    if ran.name == "main.py":  # python -m
        return f"{shlex.quote(sys.executable)} -m backpack_serving.cli.main"
    found = shutil.which("backpack")
    if ran.name != "backpack" or not ran.exists() or (found and ran.samefile(found)):
        return "backpack"
    ran, here = ran.absolute(), Path.cwd()
    if ran.is_relative_to(here):
        near = ran.relative_to(here)
        return shlex.quote(str(near) if len(near.parts) > 1 else f"./{near}")
    return shlex.quote(str(ran))
