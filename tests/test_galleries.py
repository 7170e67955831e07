"""Faults of the bug galleries replace public names: what only the product itself may touch can be renamed any day."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

GALLERIES = ("sync/test_gallery.py", "interventions/faults.py", "interventions/test_gallery.py")


@pytest.mark.parametrize("file", GALLERIES)
def test_a_fault_replaces_no_private_name(file: str) -> None:
    tree = ast.parse((Path(__file__).parent / file).read_text())
    replaced = [
        argument.value.rpartition(".")[2]
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "setattr"
        for argument in call.args[:2]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    ]
    assert replaced
    assert not [name for name in replaced if name.startswith("_") and not name.endswith("__")]
