"""What a terminal leaves in the environment never keeps a command from saying what it says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from backpack_serving.cli.environment import forget_sizes
from backpack_serving.settings import Settings

NONE = ["0", "-1", "1", "19", "10001", "9" * 5000, "wide", "\u00b2", "\u0664\u0660", "inf", "nan", "80.5", " "]


@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize("name", ["COLUMNS", "TERMINAL_WIDTH"])
def test_a_width_that_is_none_is_forgotten(name: str, value: str) -> None:
    environment = {name: value, "LINES": "1", "OTHER": value}
    forget_sizes(environment)
    assert environment == {"LINES": "1", "OTHER": value}


def test_a_size_that_is_one_stays() -> None:
    environment = {"COLUMNS": "20", "LINES": "10000", "TERMINAL_WIDTH": ""}
    forget_sizes(environment)
    assert environment == {"COLUMNS": "20", "LINES": "10000", "TERMINAL_WIDTH": ""}
    environment = {"LINES": "0"}
    forget_sizes(environment)
    assert environment == {}


@pytest.mark.parametrize(("name", "value"), [("COLUMNS", "0"), ("COLUMNS", "\u00b2"), ("TERMINAL_WIDTH", "wide")])
def test_a_command_says_the_same_at_a_width_that_is_none(name: str, value: str) -> None:
    def said(*words: str, **variables: str) -> str:
        environment = {n: v for n, v in os.environ.items() if n not in ("COLUMNS", "LINES", "TERMINAL_WIDTH")}
        return subprocess.run(
            [sys.executable, "-m", "backpack_serving.cli.main", *words],
            env={**environment, **variables, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    if name == "TERMINAL_WIDTH":
        assert "Migrate the schema" in said("database", "migrate", "--help", **{name: value})
    else:
        assert len(said("settings", **{name: value}).splitlines()) == 1 + len(Settings.model_fields)
