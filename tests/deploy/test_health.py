"""`backpack health`, as containers call it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests import commands
from tests.e2e.conftest import running


async def _health(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "backpack_serving.cli.main", "health", *arguments]
    answer = await commands.run_command(*command, NO_COLOR="1")
    return answer.returncode, " ".join((answer.stdout + answer.stderr).split())


async def test_a_probe_says_whether_a_server_serves(tmp_path: Path) -> None:
    async with running(tmp_path) as system:
        gateway, directory = system.gateway, system.settings.directory_address
        answers = await asyncio.gather(
            _health(gateway),
            _health(gateway, "--service", "backpack.v1.InferenceService"),
            _health(gateway, "--service", "backpack.v1.Nothing"),
            _health(directory, "--replicas", "1"),
            _health(directory, "--replicas", "2"),
            _health("127.0.0.1:1", "--timeout", "1"),
            _health("127.0.0.1:1", "--replicas", "1", "--timeout", "1"),
        )
    assert answers[:2] == [(0, f"{gateway} SERVING")] * 2
    assert answers[2] == (1, f"{gateway} NOT_FOUND it has no backpack.v1.Nothing")
    assert answers[3:5] == [
        (0, f"{directory} replicas that take requests: 1"),
        (1, f"{directory} replicas that take requests: 1"),
    ]
    for code, said in answers[5:]:
        assert code == 1
        assert "UNAVAILABLE" in said
        assert "Traceback" not in said


async def test_a_probe_loads_nothing_that_only_other_commands_need() -> None:
    """Containers ask every few seconds: with all that the command line may load, it took half as long again."""
    heavy = ["backpack_serving.client", "backpack_serving.cli.run", "jwt", "rich.markdown", "rich.progress"]
    program = (
        "import sys; sys.argv = ['backpack', 'health', '127.0.0.1:1', '--timeout', '1']\n"
        "from backpack_serving.cli.main import app\n"
        "try: app()\n"
        f"finally: print([name for name in {heavy} if name in sys.modules])"
    )
    answer, loaded = (await commands.run_command(sys.executable, "-c", program)).stdout.splitlines()
    assert answer.startswith("127.0.0.1:1 UNAVAILABLE")
    assert loaded == "[]"
