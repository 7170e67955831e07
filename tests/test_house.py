"""The rules of the house: generated code is what the .proto files generate, arrows, types and style hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def test_generated_code_is_what_the_protos_generate(tmp_path: Path) -> None:
    (tmp_path / "backpack_proto" / "v1").mkdir(parents=True)
    subprocess.run(
        [sys.executable, "-m", "backpack_proto.generate", str(tmp_path)], check=True, capture_output=True, cwd=ROOT
    )
    made = {p.name: p.read_text() for p in (tmp_path / "backpack_proto" / "v1").iterdir()}
    kept = {p.name: p.read_text() for p in (ROOT / "protos/backpack_proto/v1").glob("*_pb2*")}
    assert made == kept, "run `make protos` and commit what it writes"


@pytest.mark.parametrize(
    "command",
    ["ruff check .", "ruff format --check .", "mypy", "lint-imports --no-cache"],
    ids=lambda c: c.split()[0],
)
def test_style_types_and_arrows(command: str) -> None:
    program, *arguments = command.split()
    done = subprocess.run([BIN / program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


SUBCLASSES = {
    "AsyncClient",  # the public clients share a connection
    "AsyncOperator",
    "AsyncSteering",
    "Authoring",
    "Explained",
    "_Server6",  # socketserver asks for its address family by a class attribute
}


def test_code_is_shared_by_composition() -> None:
    """Our classes inherit from our protocols, exceptions and generic bases; from other classes of ours where listed."""
    classes: dict[str, list[str]] = {}
    for room in ("models", "services"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef):
                    classes[node.name] = [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]
    abstract = {"Protocol", "Generic", "Exception", "ABC"}
    found = {
        name
        for name, bases in classes.items()
        for base in bases
        if base in classes and not abstract & set(classes[base])
    }
    assert found == SUBCLASSES


@pytest.mark.parametrize(("room", "most"), [("models", 500), ("services", 500), ("tests", 550)])
def test_files_hold_one_noun(room: str, most: int) -> None:
    files = {str(p): len(p.read_text().splitlines()) for p in (ROOT / room).rglob("*.py")}
    assert {name: lines for name, lines in files.items() if lines > most} == {}


OVERRIDES = {"_reading", "_writing", "_reason"}
"""Private methods that several files define because they implement one interface: `interventions.sql.SQLStore`."""


@pytest.mark.parametrize(
    ("pattern", "interface"), [(r"^class (\w+)", set()), (r"^ *(?:async )?def (_[a-z]\w+)", OVERRIDES)]
)
def test_a_name_means_one_thing(pattern: str, interface: set[str]) -> None:
    """A class, or a private helper, is defined once; a second meaning needs a second name."""
    files: dict[str, list[str]] = {}
    for room in ("models", "services"):
        for path in (ROOT / room).rglob("*.py"):
            for name in re.findall(pattern, path.read_text(), re.MULTILINE):
                files.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert interface <= files.keys(), "these are nobody's any more"
    assert {name: found for name, found in files.items() if len(found) > 1 and name not in interface} == {}
