"""What a terminal or whoever starts us may have left so that no command could say anything."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

LEAST, MOST = 20, 10_000
"""Columns and lines of a terminal that texts can be laid out for."""

_SIZES = ("COLUMNS", "LINES", "TERMINAL_WIDTH")
"""Read by rich, click and typer, which print nothing at 0 columns, and end at what isn't a number."""


def forget_sizes(environment: MutableMapping[str, str]) -> None:
    """Leave out sizes that are none, as if they weren't set: the terminal is asked then."""
    for name in _SIZES:
        value = environment.get(name, "")
        least = 1 if name == "LINES" else LEAST
        if value and not (value.isascii() and value.isdecimal() and len(value) < 9 and least <= int(value) <= MOST):
            del environment[name]


def open_standard_streams() -> None:
    """Where stdin, stdout or stderr are closed, open them as nothing: the next file or socket that this process
    opens would get their number, and what is said there would go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the least number that is free: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
