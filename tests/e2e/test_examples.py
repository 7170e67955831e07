"""The programs in examples/, as people run them, against a running system."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Metadata, System, copy

pytestmark = pytest.mark.asyncio(loop_scope="module")

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = "The story of the king and the"


async def _run(system: System, key: Metadata | str, name: str, *words: str) -> tuple[int, str, str]:
    """Exit status, output and errors."""
    secret = key if isinstance(key, str) else key[0][1].removeprefix("Bearer ")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / name),
        *words,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "BACKPACK_GATEWAY_ADDRESS": system.gateway,
            "BACKPACK_KEY": secret,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(120):
        output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def test_releases_are_compared(system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    code, shown, errors = await _run(system, key, "compare_releases.py", PROMPT, "unpatched", "live")
    assert (code, errors) == (0, "")
    found = re.findall(r"release (\d) \([0-9a-f]{12}\): perplexity of the text (\d+\.\d+)", shown)
    assert [number for number, _ in found] == ["0", "1"]
    assert found[0][1] != found[1][1]
    assert len(re.findall(r"^ +\d+\.\d+%  '", shown, re.M)) == 6


async def test_samples_are_streamed_with_attribution(system: System) -> None:
    key = await system.tenant()
    code, shown, errors = await _run(system, key, "stream_with_attribution.py", PROMPT)
    assert (code, errors) == (0, "")
    rows = re.findall(r"sample ([01]): '.*?' +logit +-?\d+\.\d+, [+-]\d+\.\d+ by sense +\d+ of '", shown)
    assert sorted(rows) == ["0"] * 6 + ["1"] * 6
    assert shown.count(PROMPT) == 2


async def test_every_example_says_what_went_wrong_in_a_line(system: System) -> None:
    for example in sorted(EXAMPLES.glob("*.py")):
        code, _, errors = await _run(system, "bp_wrong", example.name)
        assert (code, errors.count("\n")) == (1, 1), f"{example}: {errors}"
        assert errors.startswith("error: ")
