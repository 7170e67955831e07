"""The compose stack for tests: images, secrets, and the containers by the names of their services."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError, Unavailable
from backpack_serving.settings import Settings

from tests.e2e.conftest import Metadata, System

ROOT = Path(__file__).parents[2]
COMPOSE = str(Path(sys.executable).parent / "docker-compose")
PROMPT = "The story of the king and the"
OURS = ("migrations", "interventions", "inference", "gateway", "http")
GATEWAY, INTERVENTIONS, HTTP = "127.0.0.1:18470", "127.0.0.1:18471", "127.0.0.1:18480"
PROXIES = {v: "http://proxy.invalid:3128" for name in ("http_proxy", "https_proxy") for v in (name, name.upper())}
"""What Docker puts into every container where its configuration names a proxy. No part is to be reached by it."""


def _why_not() -> str:
    if not shutil.which("docker"):
        return "no container engine: `docker` isn't installed"
    asked = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    return "" if asked.returncode == 0 else f"no container engine answers: {asked.stderr.strip()}"


needs_engine = [pytest.mark.slow, pytest.mark.skipif(bool(why := _why_not()), reason=why)]


def run(*command: str, **environment: str) -> str:
    """What a command prints. Fails with what it said, or if it takes more than an hour: images are built so."""
    return output(*command, **environment).decode(errors="replace")


def output(*command: str, stdin: bytes | None = None, **environment: str) -> bytes:
    """The same, as bytes."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, input=stdin, capture_output=True, timeout=3600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]!r}\n{done.stderr[-3000:].decode()}"
    return done.stdout


def _build(file: str, target: str, image: str) -> None:
    """BACKPACK_TEST_BUILD holds more flags for `docker build`, such as --network=host."""
    flags = os.environ.get("BACKPACK_TEST_BUILD", "").split()
    command = ["docker", "build", *flags, "--file", file, "--target", target, "--tag", image, "."]
    print(f"building {image}", flush=True)
    run(*command, DOCKER_BUILDKIT="1")


def _there(image: str) -> bool:
    for ask in (["docker", "image", "inspect", image], ["docker", "pull", "--quiet", image]):
        if subprocess.run(ask, capture_output=True, check=False, timeout=900).returncode == 0:
            return True
    return False


class Stack:
    """The containers of one project, by the names of their services. It has its own `secrets` and `deploy`."""

    def __init__(self, folder: Path, project: str) -> None:
        self._folder, self.project = folder, project
        self._environment = {"GATEWAY_PORT": GATEWAY[-5:], "INTERVENTIONS_PORT": INTERVENTIONS[-5:]}
        self._environment["HTTP_PORT"] = HTTP[-5:]
        self._environment["BACKPACK_MODEL"] = str(ROOT / "models" / "weights" / "micro")
        self.services = [*OURS, "postgres", "prometheus", "grafana"]
        self.secrets, self.deploy = folder / "var" / "secrets", folder / "deploy"
        self._files = [ROOT / "docker-compose.yml", folder / "proxies.json"]
        with_proxies = {service: {"environment": PROXIES} for service in self.services}
        self._files[1].write_text(json.dumps({"services": with_proxies}))
        shutil.copytree(ROOT / "deploy", self.deploy)
        self.secrets.mkdir(parents=True)

    def compose(self, *arguments: str) -> str:
        return self.output(*arguments).decode(errors="replace")

    def output(self, *arguments: str, stdin: bytes | None = None) -> bytes:
        """What Compose prints."""
        where = ["--project-name", self.project, "--project-directory", str(self._folder)]
        command = [COMPOSE, *(f"--file={file}" for file in self._files), *where, *arguments]
        return output(*command, stdin=stdin, **self._environment)

    def build(self) -> None:
        """Our images, and PostgreSQL and Prometheus: theirs, or from Debian where those can't be pulled."""
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

    def up(self, *services: str) -> None:
        """Start what isn't running, and wait until all of it is healthy."""
        self.compose("up", "--detach", "--no-build", "--wait", "--wait-timeout", "900", *(services or self.services))

    def kill(self, part: str) -> None:
        print(f"killing {part}", flush=True)
        self.compose("kill", part)

    def inside(self, part: str, program: str) -> str:
        """What a Python program prints that runs in a part's container."""
        return self.compose("exec", "--no-TTY", part, "python", "-c", program)

    @property
    def settings(self) -> Settings:
        return Settings(_secrets_dir=self.secrets, gateway_address=GATEWAY, interventions_address=INTERVENTIONS)


@contextmanager
def prepared(folder: Path, project: str) -> Iterator[Stack]:
    """A stack with images and secrets, of which nothing runs; all of it is taken down at the end."""
    stack = Stack(folder, project)
    stack.build()
    stack.compose("--profile", "setup", "down", "--volumes")  # what a run that was cut off may have left
    user = f"{os.getuid()}:{os.getgid()}"
    stack.compose("run", "--rm", "--no-deps", "--user", user, "secrets")
    try:
        yield stack
    except BaseException:
        print(stack.compose("ps", "--all"), stack.compose("logs", "--tail", "40"))
        raise
    finally:
        stack.compose("--profile", "setup", "down", "--volumes", "--timeout", "60")


async def text(system: System, key: Metadata, tokens: int = 24) -> str:
    parts = await system.stream(key, PROMPT, max_tokens=tokens, seed=2, temperature=0.7, ignore_end_of_text=True)
    return "".join(part.text for part in parts)


async def broken(system: System, key: Metadata) -> tuple[int, ServiceError]:
    """Streams one after the other, until one ends with an error: how many tokens it had given, and the error.

    A stream alone is over before Docker has stopped anything.
    """
    request = pb.GenerateStreamRequest(
        prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=480, seed=1, ignore_end_of_text=True)
    )
    while True:
        tokens = 0
        try:
            with rpc.errors():
                async for part in system.inference.GenerateStream(request, metadata=key):
                    tokens += len(part.tokens)
        except ServiceError as error:
            return tokens, error


async def while_streaming(
    system: System, key: Metadata, what: Callable[[], Any]
) -> tuple[Any, list[tuple[int, ServiceError]]]:
    """What `what` returns, done beside eight clients' streams, and how these broke."""
    streams = [asyncio.create_task(broken(system, key)) for _ in range(8)]
    try:
        await asyncio.sleep(2)
        done = await asyncio.to_thread(what)
        ended = await asyncio.wait_for(asyncio.gather(*streams), 120)
        print(*(f"a stream ended after {tokens} tokens: {error.reason} {error}" for tokens, error in ended), sep="\n")
        return done, ended
    finally:
        for stream in streams:
            stream.cancel()


async def again(what: Callable[[], Awaitable[Any]], seconds: float = 180) -> Any:
    """What a client does with UNAVAILABLE: try again."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while loop.time() < until:
        try:
            with rpc.errors():
                return await what()
        except Unavailable:
            await asyncio.sleep(0.5)
    raise AssertionError(f"unavailable for {seconds} s")
