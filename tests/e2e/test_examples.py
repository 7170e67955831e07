"""The programs in examples/, as people run them, against a running system."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from tests import commands
from tests.e2e.conftest import Metadata, System, copy, ipb

pytestmark = pytest.mark.asyncio(loop_scope="module")

EXAMPLES = Path(__file__).parents[2] / "examples"
GUIDE = EXAMPLES.parent / "docs" / "python-client.md"
PROMPT = "The story of the king and the"


async def _run(system: System, key: Metadata | str, name: str, *words: str) -> tuple[int, str, str]:
    """Exit status, output and errors."""
    secret = key if isinstance(key, str) else key[0][1].removeprefix("Bearer ")
    answer = await commands.run_command(
        sys.executable,
        str(EXAMPLES / name),
        *words,
        BACKPACK_GATEWAY_ADDRESS=system.gateway,
        BACKPACK_INTERVENTIONS_ADDRESS=system.interventions,
        BACKPACK_KEY=secret,
    )
    return answer.returncode, answer.stdout, answer.stderr


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
    quoted = r"(?:'.*?'|\".*?\")"
    said = rf"sample ([01]): {quoted} +logit +-?\d+\.\d+, [+-]\d+\.\d+ by sense +\d+ of {quoted}"
    rows = re.findall(said, shown)
    assert sorted(rows) == ["0"] * 6 + ["1"] * 6
    assert shown.count(PROMPT) == 2


async def test_a_word_is_steered_and_taken_back(system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    for release in (2, 3):  # again, as people do: another revision of the same patch
        code, shown, errors = await _run(system, key, "steer_and_roll_back.py", "king", "nurse")
        assert (code, errors) == (0, "")
        lines = re.findall(rf"release (\d) \([0-9a-f]{{12}}\): {PROMPT}'(.+)'", shown)
        assert [number for number, _ in lines] == [str(release), "1"]
        assert lines[0][1] != lines[1][1]
    live = await system.releases.GetChannel(ipb.GetChannelRequest(name="channels/live"), metadata=key)
    assert live.channel.release == 1


async def test_the_steering_of_the_python_page_works(system: System) -> None:
    key = await system.tenant()
    (code,) = re.findall(r"```python\n(from backpack_serving.client import Copy.*?)```", GUIDE.read_text(), re.S)
    here = code.replace("127.0.0.1:8471", system.interventions)
    here = here.replace('open("var/clinic.key").read().strip()', repr(key[0][1].removeprefix("Bearer ")))
    assert here.count("127.0.0.1:8471") == here.count("var/") == 0
    await asyncio.to_thread(exec, here, {})
    live = await system.releases.GetChannel(ipb.GetChannelRequest(name="channels/live"), metadata=key)
    assert (live.channel.release, live.channel.previous_release) == (0, 1)


async def test_every_example_says_what_went_wrong_in_a_line(system: System) -> None:
    for example in sorted(EXAMPLES.glob("*.py")):
        code, _, errors = await _run(system, "bp_wrong", example.name)
        assert (code, errors.count("\n")) == (1, 1), f"{example}: {errors}"
        assert errors.startswith("error: ")
