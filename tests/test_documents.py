"""The documents: what they name is there, and they stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from backpack_serving.cli.main import app

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "services/backpack_serving", ROOT)
TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
DOCUMENTS = [ROOT / name for name in TRACKED.stdout.split()] or list(ROOT.rglob("*.md"))

USERS = [path for path in DOCUMENTS if path.parent in (ROOT, ROOT / "docs")]


def _definitions(body: list[ast.stmt], prefix: str = "") -> set[str]:
    found = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= _definitions(node.body, f"{prefix}{node.name}.")
    return found


def test_the_walks_of_architecture_name_functions_that_exist() -> None:
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / "ARCHITECTURE.md").read_text())
    assert len(named) > 25, "three walks name more than that"
    for file, name in named:
        found = [package / file for package in PACKAGES if (package / file).exists()]
        assert found, f"ARCHITECTURE.md names {file}, which isn't there"
        assert name in _definitions(ast.parse(found[0].read_text()).body), f"{file} has no {name}"


@pytest.mark.parametrize(("name", "most"), [("README.md", 120), ("ARCHITECTURE.md", 150)])
def test_documents_are_short(name: str, most: int) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= most


def test_one_version_stands_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = dict(re.findall(r"^(version|appVersion): (.*)$", (ROOT / "deploy/helm/Chart.yaml").read_text(), re.M))
    assert chart == {"version": version, "appVersion": version}
    newest = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest
    assert newest[1] == version, "say what operators must do"


def _code(document: Path) -> list[str]:
    """Lines of blocks, and what stands between backticks."""
    text = document.read_text().replace("\\\n", " ")
    fence = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
    lines = [line for block in fence.findall(text) for line in block.splitlines()]
    rest = fence.sub("", text)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    return lines + re.findall(r"^ {4}(.*)$", rest, re.M) + spans


@pytest.mark.parametrize("document", USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_documents_name_exist(document: Path) -> None:
    program = typer.main.get_command(app)
    for line in _code(document):
        called = re.search(r"(?:^|\$ |-- |=\S* |&& |\(|: |bin/|interventions )backpack (.*)", line)
        command: Any = program
        for word in called[1].split() if called else ():
            if word in ("|", "#", ">", "`") or word.startswith("#"):
                break
            if word.startswith("--"):
                name = word.strip(",;`)").partition("=")[0]
                options = [name for option in command.params for name in (*option.opts, *option.secondary_opts)]
                assert name in (*options, "--help"), f"{document.name}: {line}"
            elif hasattr(command, "commands") and word[:1].islower():
                assert word.strip(",;") in command.commands, f"{document.name}: {line}"
                command = command.commands[word.strip(",;")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = (document.parent / file).resolve() if file else document
        assert there.exists(), f"{document.relative_to(ROOT)} links to {target}"
        if anchor and there.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{document.relative_to(ROOT)} links to {target}"
