"""The whole compose stack in containers: built, brought up, used, killed part by part, restored, taken down.

`make test-containers` runs it; it needs a container engine that `docker` reaches. PostgreSQL and Prometheus come
from their images, or from Debian (standins.Dockerfile) where those can't be pulled; Grafana is left out there.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError, Unavailable
from backpack_serving.settings import Settings

from tests.e2e.conftest import Metadata, System, copy

ROOT = Path(__file__).parents[2]
COMPOSE = str(Path(sys.executable).parent / "docker-compose")
PROJECT = "backpack-test"
PROMPT = "The story of the king and the"
OURS = ("migrations", "interventions", "inference", "gateway")
GATEWAY, INTERVENTIONS = "127.0.0.1:18470", "127.0.0.1:18471"


def _why_not() -> str:
    if not shutil.which("docker"):
        return "no container engine: `docker` isn't installed"
    asked = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    return "" if asked.returncode == 0 else f"no container engine answers: {asked.stderr.strip()}"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why := _why_not()), reason=why)]


def _run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def _build(file: str, target: str, image: str) -> None:
    """BACKPACK_TEST_BUILD holds more flags for `docker build`, such as --network=host."""
    flags = os.environ.get("BACKPACK_TEST_BUILD", "").split()
    command = ["docker", "build", *flags, "--file", file, "--target", target, "--tag", image, "."]
    print(f"building {image}", flush=True)
    _run(*command, DOCKER_BUILDKIT="1")


def _there(image: str) -> bool:
    for ask in (["docker", "image", "inspect", image], ["docker", "pull", "--quiet", image]):
        if subprocess.run(ask, capture_output=True, check=False).returncode == 0:
            return True
    return False


class Stack:
    """The containers, by the names of their services."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = {"GATEWAY_PORT": GATEWAY[-5:], "INTERVENTIONS_PORT": INTERVENTIONS[-5:]}
        self.services = [*OURS, "postgres", "prometheus", "grafana"]
        (folder / "deploy").symlink_to(ROOT / "deploy")
        (folder / "var" / "secrets").mkdir(parents=True)

    def compose(self, *arguments: str) -> str:
        where = ["--project-name", PROJECT, "--project-directory", str(self._folder)]
        return _run(COMPOSE, "--file", str(ROOT / "docker-compose.yml"), *where, *arguments, **self._environment)

    def build(self) -> None:
        for part in OURS:
            _build("deploy/Dockerfile", part, f"backpack-{part}")
        images = json.loads(self.compose("config", "--format", "json"))["services"]
        for part in ("postgres", "prometheus", "grafana"):
            if _there(images[part]["image"]):
                continue
            if part == "grafana":
                self.services.remove(part)
            else:
                _build("tests/deploy/standins.Dockerfile", part, f"backpack-standin-{part}")
                self._environment[f"{part.upper()}_IMAGE"] = f"backpack-standin-{part}"

    def up(self) -> None:
        """Start what isn't running, and wait until all of it is healthy."""
        self.compose("up", "--detach", "--no-build", "--wait", "--wait-timeout", "900", *self.services)

    def kill(self, part: str) -> None:
        print(f"killing {part}", flush=True)
        self.compose("kill", part)

    def inside(self, part: str, program: str) -> str:
        """What a Python program prints that runs in a part's container."""
        return self.compose("exec", "--no-TTY", part, "python", "-c", program)

    @property
    def settings(self) -> Settings:
        return Settings(
            _secrets_dir=self._folder / "var" / "secrets",
            gateway_address=GATEWAY,
            interventions_address=INTERVENTIONS,
        )


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"))
    stack.build()
    stack.compose("--profile", "setup", "down", "--volumes")  # what a run that was cut off may have left
    user = f"{os.getuid()}:{os.getgid()}"
    stack.compose("run", "--rm", "--no-deps", "--user", user, "secrets")
    try:
        stack.up()
        yield stack
    except BaseException:
        print(stack.compose("ps", "--all"), stack.compose("logs", "--tail", "40"))
        raise
    finally:
        stack.compose("--profile", "setup", "down", "--volumes", "--timeout", "60")


async def _text(system: System, key: Metadata, tokens: int = 24) -> str:
    parts = await system.stream(key, PROMPT, max_tokens=tokens, seed=2, temperature=0.7, ignore_end_of_text=True)
    return "".join(part.text for part in parts)


async def _again(what: Callable[[], Awaitable[Any]], seconds: float = 60) -> Any:
    """What a client does with UNAVAILABLE: try again."""
    for _ in range(int(seconds / 0.5)):
        try:
            with rpc.errors():
                return await what()
        except Unavailable:
            await asyncio.sleep(0.5)
    raise AssertionError(f"unavailable for {seconds} s")


async def test_the_stack_serves_steered_text_and_survives_its_parts(stack: Stack) -> None:
    system = System(GATEWAY, INTERVENTIONS, stack.settings)
    try:
        await _the_story(stack, system)
    finally:
        await system.close()


async def _the_story(stack: Stack, system: System) -> None:
    ship, plain = await system.tenant(copy("king", "ship")), await system.tenant()
    steered, unsteered = await _text(system, ship), await _text(system, plain)
    print(f"steered {steered!r}, unsteered {unsteered!r}", flush=True)
    assert steered != unsteered

    # The intervention service and its database are killed: what is known goes on being served.
    stack.kill("interventions")
    stack.kill("postgres")
    assert await _text(system, ship) == steered
    with pytest.raises(Unavailable), rpc.errors():
        await asyncio.wait_for(system.release(ship, copy("king", "nurse")), 30)
    stack.up()
    number = await _again(lambda: system.release(ship, copy("king", "nurse")))
    assert number >= 2, "what was acknowledged is still there"

    assert await _again(lambda: _text(system, ship)) == steered

    # Inference is killed in the middle of a stream: the client is told that it may retry, and a retry is the same.
    request = pb.GenerateStreamRequest(
        prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=480, seed=1, ignore_end_of_text=True)
    )
    call = aiter(system.inference.GenerateStream(request, metadata=ship))
    await anext(call)
    stack.kill("inference")
    with pytest.raises(ServiceError) as lost, rpc.errors():
        async for _ in call:
            pass
    assert (lost.value.code, lost.value.reason) == ("UNAVAILABLE", "REPLICA_LOST")
    stack.up()
    assert await _again(lambda: _text(system, ship)) == steered

    # A new gateway learns all that it needs.
    stack.kill("gateway")
    stack.up()
    assert await _again(lambda: _text(system, ship)) == steered
    assert await _again(lambda: _text(system, plain)) == unsteered


def test_processes_run_as_nobody_special_and_write_nothing(stack: Stack) -> None:
    for part in ("gateway", "interventions", "inference"):
        assert stack.inside(part, "import os; print(os.getuid())").strip() == "10001"
    with pytest.raises(AssertionError, match="Read-only file system"):
        stack.inside("gateway", "open('/opt/backpack/x', 'w')")


def test_ray_is_not_reached_from_outside(stack: Stack) -> None:
    reach = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
    address = stack.inside("inference", "import socket; print(socket.gethostbyname('inference'))").strip()
    _run(
        "docker",
        "run",
        "--rm",
        "--network",
        f"{PROJECT}_inside",
        "backpack-gateway",
        "python",
        "-c",
        reach,
        address,
        "9000",
    )
    for port in ("9000", "8000", "6379"):
        with pytest.raises(AssertionError, match="Error"):
            _run(
                "docker",
                "run",
                "--rm",
                "--network",
                f"{PROJECT}_outside",
                "backpack-gateway",
                "python",
                "-c",
                reach,
                address,
                port,
            )


def test_prometheus_reads_every_process(stack: Stack) -> None:
    ask = (
        "import json, time, urllib.request as u, urllib.parse as p\n"
        "url = 'http://prometheus:9090/api/v1/query?' + p.urlencode({'query': 'up == 1'})\n"
        "for _ in range(60):\n"
        "    found = {r['metric']['process'] for r in json.load(u.urlopen(url))['data']['result']}\n"
        "    if len(found) == 3: break\n"
        "    time.sleep(1)\n"
        "print(*sorted(found))"
    )
    assert stack.inside("gateway", ask).split() == ["gateway", "inference", "interventions"]


def test_it_stops_in_good_order(stack: Stack) -> None:
    """Last: everything is stopped as an operator would, and nothing had to be killed."""
    stack.compose("stop", "gateway", "inference", "interventions")
    for part in ("gateway", "inference", "interventions"):
        (name,) = stack.compose("ps", "--all", "--quiet", part).split()
        code = _run("docker", "inspect", "--format", "{{.State.ExitCode}}", name).strip()
        assert code == "0", (part, code)
