"""What commands show on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from backpack_serving.cli.client import Screen
from rich.live import Live
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_what_others_wrote_and_does_not_obey_it(terminal: bool) -> None:
    shown = io.StringIO()
    console = Screen(file=shown, force_terminal=terminal, color_system=None, width=80)
    table = Table("description", box=None)
    evil = "a\x1b]52;c;cm0=\x1b\\b\x9b2J\x7fc\td\ne\u202ef"
    table.add_row(Text(evil))
    console.print(table)
    console.print(Text(evil))
    console.print(Markdown(evil))
    with Live(Text(evil), console=console, auto_refresh=False):
        pass
    commands = re.sub(r"\x1b\[[?\d]*[hlAK]", "", shown.getvalue())  # Live's own
    assert ("\x1b" in commands or "\x9b" in commands or "\x7f" in commands) is not terminal
    assert ("\u202e" in commands) is not terminal
    assert ("a\\u001b]52;c;cm0=" in commands) is terminal


def test_what_is_shown_is_laid_out_as_wide_as_it_is() -> None:
    """An escape is wider than the character, which has no width; and colours stay where they were."""
    shown = io.StringIO()
    console = Screen(file=shown, force_terminal=True, color_system="standard", width=200)
    table = Table("description", "next", box=None)
    table.add_row(Text("\u202e" * 5), Text.assemble(("\u2066x", "red"), "y"))
    console.print(table)
    head, row = shown.getvalue().splitlines()
    plain = re.sub(r"\x1b\[[\d;]*m", "", row)
    assert plain.split() == ["\\u202e" * 5, "\\u2066xy"]
    assert plain.index("\\u2066") == re.sub(r"\x1b\[[\d;]*m", "", head).index("next")
    assert "\x1b[31m\\u2066x\x1b[0my" in row
