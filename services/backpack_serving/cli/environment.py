"""Repairs an environment in which no command could print: bad terminal sizes, closed standard streams."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

LEAST, MOST = 20, 10_000
"""Accepted terminal widths (and most lines)."""

_SIZES = ("COLUMNS", "LINES", "TERMINAL_WIDTH")
"""Variables that rich, click and typer read. They print nothing at 0 columns and raise if one isn't a number."""


def forget_sizes(environment: MutableMapping[str, str]) -> None:
    """Remove invalid sizes from the environment, so that the terminal's own are used."""
    for name in _SIZES:
        value = environment.get(name, "")
        least = 1 if name == "LINES" else LEAST
        if value and not (value.isascii() and value.isdecimal() and len(value) < 9 and least <= int(value) <= MOST):
            del environment[name]


def open_standard_streams() -> None:
    """Open /dev/null for each of stdin, stdout and stderr that is closed.

    Otherwise the next file or socket would get the free descriptor, and our output would go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
