"""`backpack serve http` beside the other parts, each a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from backpack_serving.settings import Settings

from tests.conftest import free_port
from tests.deploy.test_health import _health as health
from tests.e2e.conftest import System
from tests.e2e.test_processes import PASSING, Processes
from tests.http.conftest import PROMPT
from tests.waiting import eventually


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path)
    try:
        yield processes
    finally:
        processes.stop()


async def test_it_needs_no_key_waits_for_nobody_and_ends_politely(processes: Processes, tmp_path: Path) -> None:
    """Started first, with a state folder of its own that stays empty."""
    address, state = f"127.0.0.1:{free_port()}", tmp_path / "http"
    state.mkdir()
    environment = {"BACKPACK_HTTP_ADDRESS": address, "BACKPACK_STATE": str(state)}
    processes.start("http", **environment)
    settings, url = processes.settings, f"http://{address}"
    code, said = await health(url)
    assert (code, said.startswith(f"{url} NOT_SERVING: the gateway doesn't answer")) == (1, True), said
    for part in ("interventions", "directory", "inference", "gateway"):
        processes.start(part)

    async def ready() -> bool:
        return await health(url) == (0, f"{url} SERVING")

    await eventually(ready)
    system = System(settings.gateway_address, settings.interventions_address, settings)
    asked = {"model": "live", "prompt": PROMPT, "max_tokens": 3, "seed": 1}
    try:
        key = await system.tenant()
        async with httpx.AsyncClient(base_url=url, headers=dict(key), timeout=60) as client:

            async def answered() -> str:
                answer = await client.post("/v1/completions", json=asked)
                return str(answer.json()["choices"][0]["text"]) if answer.status_code == 200 else ""

            text = await eventually(answered, passing=PASSING)
            # A gateway that is replaced is found again.
            processes.kill("gateway")
            assert (await client.post("/v1/completions", json=asked)).status_code == 503
            processes.start("gateway")
            assert await eventually(answered) == text
    finally:
        await system.close()
    assert not list(state.iterdir())
    assert processes.kill("http", signal.SIGTERM) == 0
    processes.start("http", **environment)
    assert processes.kill("http", signal.SIGINT) == 0
    assert "Traceback" not in processes.log


@pytest.mark.parametrize("part", ["http", "run"])
def test_a_port_that_is_taken_is_one_line(tmp_path: Path, part: str) -> None:
    words = ("serve", "http") if part == "http" else ("run",)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = started(tmp_path, *words, HTTP_ADDRESS=address)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: can't listen on {address}: is another server there")


def test_without_an_address_there_is_nothing_to_serve(tmp_path: Path) -> None:
    done = started(tmp_path, "serve", "http", HTTP_ADDRESS="")
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        ["error: BACKPACK_HTTP_ADDRESS is empty; write host:port, as in 127.0.0.1:8480"],
    )


@pytest.mark.parametrize("address", ["unix:/tmp/x", "8480", "::1:8480"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ValueError, match="write host:port"):
        Settings(http_address=address)


def started(state: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """A process that ends by itself, because its settings are no good here."""
    where = {f"{part}_ADDRESS": "127.0.0.1:0" for part in ("GATEWAY", "INTERVENTIONS", "DIRECTORY", "INFERENCE")}
    variables = {f"BACKPACK_{name}": value for name, value in {"STATE": str(state), **where, **settings}.items()}
    return subprocess.run(
        [sys.executable, "-m", "backpack_serving.cli.main", *words],
        env={**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
