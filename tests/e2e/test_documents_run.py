"""README.md and pages of docs/: their commands and programs are run as written, in order, in a fresh folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from backpack_serving.settings import DEFAULT_MODEL

from tests.conftest import free_port
from tests.e2e.starts import read_until_served

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "docs/quickstart.md"]
FURTHER = [pytest.param(f"docs/{page}.md", marks=pytest.mark.slow) for page in ("steering", "python-client", "http")]
MARK = "@@ step"
STEADY = re.compile(
    r"tenants/[\w/]+|var/\w+\.key|releases? \d+|held by [\w ,]+|"
    r"(?<!cmpl-)(?<!\"created\": )(?<!\.)\b(?=\w*\d)[0-9a-f]{8,64}\b"
)
"""What is the same on any processor: names, numbers of releases, digests. Texts and probabilities aren't."""


@dataclass(frozen=True)
class Step:
    """One command or program of a page, for bash, and the output that the page shows below a command.

    `language` is that of its block: console or python.
    """

    language: str
    command: str
    shown: str = ""


def _blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language, content."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.M | re.S)


def session(page: str, addresses: dict[str, str]) -> list[Step]:
    """What a reader of the page does in the other terminal, at the test's addresses."""
    steps = []
    for language, content in _blocks(page):
        for theirs, ours in addresses.items():
            content = content.replace(theirs, ours)
        if language == "python":
            steps.append(Step(language, f".venv/bin/python - <<'END'\n{content}END"))
        elif language == "console":
            first, *found = re.split(r"^\$ ", content, flags=re.M)
            assert not first, f"{page} shows output of no command: {first}"
            for part in found:
                command, shown = re.fullmatch(r"((?:[^\n]*\\\n)*[^\n]*)\n(.*)", part, re.S).groups()  # type: ignore[union-attr]
                steps.append(Step(language, command, shown))
        else:
            assert language in ("sh", "text", "mermaid"), f"{page}: nobody runs {language}"
    return steps


@contextmanager
def serving(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """`backpack run`, which `make run` ends in; gives what it prints before it serves."""
    command = [folder / ".venv/bin/backpack", "run"]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield read_until_served(process)
        finally:
            process.terminate()
            process.communicate()


@pytest.fixture(scope="module")
def default_model() -> None:
    """Installed, as the first `backpack run` on a machine does."""
    command = [sys.executable, "-m", "backpack_serving.cli.main", "model", "install", DEFAULT_MODEL]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("default_model")
@pytest.mark.parametrize("page", [*PAGES, *FURTHER])
def test_a_page_s_commands_do_what_it_shows(page: str, tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)
    gateway, interventions, http = (f"127.0.0.1:{free_port()}" for _ in range(3))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BACKPACK_")}
    environment = inherited | {
        "BACKPACK_GATEWAY_ADDRESS": gateway,
        "BACKPACK_INTERVENTIONS_ADDRESS": interventions,
        "BACKPACK_HTTP_ADDRESS": http,
        "BACKPACK_DIRECTORY_ADDRESS": "127.0.0.1:0",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }
    steps = session(page, {"127.0.0.1:8470": gateway, "127.0.0.1:8471": interventions, "127.0.0.1:8480": http})
    assert len(steps) > 2
    script = "".join(f"echo '{MARK}'\n{step.command}\n" for step in steps)
    with serving(tmp_path, environment) as printed:
        for language, content in _blocks(page):
            if language == "text":
                assert set(STEADY.findall(content)) <= set(STEADY.findall(printed)), printed
        done = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stdout
    outputs = done.stdout.split(f"{MARK}\n")[1:]
    for step, output in zip(steps, outputs, strict=True):
        if step.shown:
            assert STEADY.findall(output) == STEADY.findall(step.shown), f"{step.command}\n{output}"


@pytest.mark.parametrize("page", PAGES)
def test_make_does_what_a_page_says(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    lines = [line for language, content in _blocks(page) if language == "sh" for line in content.splitlines()]
    assert lines
    assert all(line.startswith("make ") for line in lines), "others belong into a console block, which is run"
    for target in {line.split()[1] for line in lines} | set(re.findall(r"`make (\w+)`", text)):
        # These tests may run under make themselves, whose variables have another make speak of folders.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        command = ["make", "--no-print-directory", "--dry-run", target]
        dry = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert dry.returncode == 0, dry.stderr
        if target == "run":
            assert dry.stdout.splitlines()[-1] == ".venv/bin/backpack run", "what the other test runs"
