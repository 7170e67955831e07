"""Each part as a process of its own, started by the command line, and killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.auth.keys import ApiKeySecret
from backpack_serving.client import Client, Sampling
from backpack_serving.errors import ServiceError, Unavailable
from backpack_serving.settings import Settings

from tests.conftest import PROXY_VARIABLES, free_port
from tests.e2e.conftest import Metadata, System, copy
from tests.e2e.starts import read_until_served
from tests.waiting import eventually

PASSING = ("UNAVAILABLE", "UNAUTHENTICATED")
"""Codes of what is refused while parts start, and while the gateway hasn't heard of a key."""

PROMPT = "The story of the king and the"


class Processes:
    """The four parts, by name."""

    def __init__(self, state: Path, slots: int = 4) -> None:
        self._log = (state / "log").open("w+")
        self.settings = Settings(
            state=state,
            threads=1,
            slots=slots,
            **{f"{part}_address": f"127.0.0.1:{free_port()}" for part in ("gateway", "interventions", "directory")},
        )
        names = ("state", "threads", "slots", "gateway_address", "interventions_address", "directory_address")
        self._environment = {f"BACKPACK_{n.upper()}": str(getattr(self.settings, n)) for n in names}
        self._running: dict[str, subprocess.Popen[str]] = {}

    def start(self, part: str, name: str = "", **environment: str) -> None:
        """Start a part and wait until it says that it serves."""
        process = subprocess.Popen(
            [sys.executable, "-m", "backpack_serving.cli.main", "serve", part],
            env={
                **os.environ,
                **PROXY_VARIABLES,
                **self._environment,
                **environment,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "NO_COLOR": "1",
            },
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._running[name or part] = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "serves on" in line, line + self.log

    def pid(self, part: str) -> int:
        return self._running[part].pid

    def pids(self) -> set[int]:
        return {process.pid for process in self._running.values()}

    @property
    def log(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()

    def kill(self, part: str, how: signal.Signals = signal.SIGKILL) -> int:
        process = self._running.pop(part)
        process.send_signal(how)
        code = process.wait(40)
        assert process.stdout is not None
        process.stdout.close()
        return code

    def stop(self) -> None:
        for part in list(self._running):
            self.kill(part)
        self._log.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path)
    try:
        for part in ("interventions", "directory", "inference", "gateway"):
            processes.start(part)
        yield processes
    finally:
        processes.stop()


async def _release(system: System, key: Metadata) -> int:
    return int((await system.stream(key, PROMPT, max_tokens=1))[0].served.release)


async def test_parts_are_killed_and_come_back(processes: Processes) -> None:
    settings = processes.settings
    system = System(settings.gateway_address, settings.interventions_address, settings)
    try:
        await _the_story(processes, system)
    finally:
        await system.close()


async def _the_story(processes: Processes, system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    text = [p.text for p in await system.stream(key, PROMPT, max_tokens=20, seed=1)]

    # Interventions is gone: what is known goes on being served, and a write is refused, not lost.
    processes.kill("interventions")
    assert "".join(text) == "".join(p.text for p in await system.stream(key, PROMPT, max_tokens=20, seed=1))
    with pytest.raises(Unavailable), rpc.errors():
        await asyncio.wait_for(system.release(key, copy("king", "nurse")), 60)
    processes.start("interventions")

    # It is back with all that it acknowledged, and the gateway follows it again.
    async def released() -> bool:
        await system.activate(key, await system.release(key, copy("king", "nurse")))
        return True

    await eventually(released, passing=PASSING)

    async def steered() -> bool:
        return await _release(system, key) >= 2

    await eventually(steered, passing=PASSING)

    # A replica is lost in the middle of a stream: the client is told, and the next one serves.
    call = aiter(
        system.inference.GenerateStream(
            pb.GenerateStreamRequest(
                prompt=pb.Prompt(text=PROMPT),
                sampling=pb.Sampling(max_tokens=480, seed=1, ignore_end_of_text=True),
            ),
            metadata=key,
        )
    )
    await anext(call)
    processes.kill("inference")
    with pytest.raises(ServiceError) as lost, rpc.errors():
        async for _ in call:
            pass
    assert (lost.value.code, lost.value.reason) == ("UNAVAILABLE", "REPLICA_LOST")
    with pytest.raises(ServiceError) as none, rpc.errors():
        await system.stream(key, PROMPT, max_tokens=1)
    assert (none.value.code, none.value.reason, none.value.retry_after) == ("UNAVAILABLE", "NO_REPLICA", 1.0)
    processes.start("inference")
    await eventually(steered, passing=PASSING)

    # The directory forgets everything with its process, and is told again.
    processes.kill("directory")
    assert await _release(system, key) >= 2
    processes.start("directory")
    await eventually(steered, passing=PASSING)

    # A new gateway learns all of it; a polite end is a clean one.
    assert processes.kill("gateway", signal.SIGTERM) == 0
    processes.start("gateway")
    await eventually(steered, passing=PASSING)
    assert processes.kill("inference", signal.SIGTERM) == 0
    assert "Traceback" not in processes.log


BREAKS = """
from backpack_serving.cli.main import app
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.loop import EngineStopped
from backpack_serving.inference import replica

class Broken(Exception): ...

def broken(engine):
    raise Broken

first = replica._first_token

async def then_break(engine, table):
    await first(engine, table)
    Engine.step = broken
    try:
        await first(engine, table)
    except EngineStopped:
        print("broken", flush=True)

replica._first_token = then_break
app()
"""


@pytest.mark.parametrize("words", [("serve", "inference"), ("run", "--no-examples")], ids=" ".join)
def test_whose_engine_failed_ends_so_that_it_is_started_again(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Where there is no Ray, it lived on without taking a request."""
    parts = ("INFERENCE", "INTERVENTIONS", "DIRECTORY", "GATEWAY")
    where = {f"BACKPACK_{part}_ADDRESS": "127.0.0.1:0" for part in parts}
    where |= {"BACKPACK_STATE": str(tmp_path), "BACKPACK_SERVICE_KEY": str(ApiKeySecret.mint()), "BACKPACK_DRAIN": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BREAKS, *words],
        env={**os.environ, **where, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.startswith(("broken\ninference serves on", "broken\ngateway ")), done.stdout
    assert done.returncode == 1


SLOW = """
import time
from backpack_serving.cli.main import app
from backpack_serving.engine.engine import Engine

step = Engine.step
Engine.step = lambda engine: time.sleep(0.05) or step(engine)
app()
"""


def test_a_second_ctrl_c_ends_what_still_runs(tmp_path: Path) -> None:
    """The first waits for a text of half a minute."""
    address = f"127.0.0.1:{free_port()}"
    where = {f"BACKPACK_{part}_ADDRESS": "127.0.0.1:0" for part in ("INTERVENTIONS", "DIRECTORY")}
    where |= {"BACKPACK_STATE": str(tmp_path), "BACKPACK_GATEWAY_ADDRESS": address}
    running = subprocess.Popen(
        [sys.executable, "-c", SLOW, "run"],
        env={**os.environ, **where, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    with running:
        read_until_served(running)
        with Client(address, (tmp_path / "clinic.key").read_text().strip()) as client:
            parts = client.stream(PROMPT, Sampling(max_tokens=500, ignore_end_of_text=True))
            assert next(parts).text
            running.send_signal(signal.SIGINT)
            assert running.stdout.readline().startswith("Finishing what runs")
            running.send_signal(signal.SIGINT)
            assert running.wait(60) == 130
            with pytest.raises(Unavailable):
                list(parts)


def test_examples_whose_key_is_of_another_store_keep_nobody_from_being_served(tmp_path: Path) -> None:
    """It ended there, at every start, and named neither the file nor what to do."""
    where = {f"BACKPACK_{part}_ADDRESS": "127.0.0.1:0" for part in ("GATEWAY", "INTERVENTIONS", "DIRECTORY")}
    (tmp_path / "harbour.key").write_text(str(ApiKeySecret.mint()))
    words = [sys.executable, "-m", "backpack_serving.cli.main", "run"]
    environment = {**os.environ, **where, "BACKPACK_STATE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    told = "harbour.key: this API key is unknown or revoked; if its store is another one, remove it for a new key"
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        shown = read_until_served(running)
        running.send_signal(signal.SIGINT)
        assert running.stdout.read().startswith("Finishing what runs")
    assert told in shown
    assert running.returncode == 0
    once = subprocess.run([*words, "--once"], env=environment, capture_output=True, text=True, check=False)
    assert told in once.stderr
    assert once.returncode == 1
    (tmp_path / "harbour.key").unlink()
    subprocess.run([*words, "--once"], env=environment, capture_output=True, check=True)
