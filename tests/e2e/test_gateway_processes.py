"""Several processes of a gateway behind one port: they share connections, drain together, and are replaced."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator

import psutil
import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError, Unavailable

from tests.conftest import free_port
from tests.e2e.conftest import Metadata, System
from tests.e2e.test_metrics import _scrape
from tests.e2e.test_processes import PROMPT, Processes
from tests.waiting import eventually

NAMES = itertools.count()
TWO = {"BACKPACK_GATEWAY_PROCESSES": "2"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Everything but a gateway."""
    processes = Processes(tmp_path_factory.mktemp("state"))
    try:
        for part in ("interventions", "directory", "inference"):
            processes.start(part)
        yield processes
    finally:
        processes.stop()


def _listeners(processes: Processes) -> set[int]:
    """The processes that listen on the gateway's port."""
    port = int(processes.settings.gateway_address.rpartition(":")[2])
    found = (c for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == "LISTEN")
    return {c.pid for c in found if c.pid}


@contextlib.asynccontextmanager
async def _connected(processes: Processes) -> AsyncIterator[System]:
    """A client with connections of its own."""
    settings = processes.settings
    system = System(settings.gateway_address, settings.interventions_address, settings, _names=NAMES)
    try:
        yield system
    finally:
        await system.close()


async def _ask(processes: Processes, key: Metadata) -> None:
    async with _connected(processes) as system:
        assert (await system.stream(key, PROMPT, max_tokens=1))[0].served.release == 0


async def test_two_processes_behind_one_port(parts: Processes) -> None:
    metrics = f"127.0.0.1:{free_port()}"
    limits = parts.settings.state / "limits.toml"
    limits.write_text("")
    environment = {"BACKPACK_METRICS_ADDRESS": metrics, "BACKPACK_LIMITS_FILE": str(limits), **TWO}
    await asyncio.to_thread(parts.start, "gateway", **environment)
    first = _listeners(parts)
    assert len(first) == 2
    assert parts.pid("gateway") not in first, "who starts them serves nobody"
    async with _connected(parts) as system:
        key = await system.tenant()
        tenant = (await system.stream(key, PROMPT, max_tokens=1))[0].served.tenant

    async def answered() -> dict[str, float]:
        """Streams, by who carried them."""
        samples = await _scrape(metrics)
        calls = {"part": "gateway", "method": "GenerateStream", "code": "OK"}
        return {w: samples.get(("backpack_calls_total", frozenset({*calls.items(), ("worker", w)})), 0) for w in "01"}

    # A connection is one process's, and both get some: that 16 went to one happens once in 32,768 times.
    for _ in range(16):
        await _ask(parts, key)
    shared = await answered()
    assert sum(shared.values()) == 17
    assert all(shared.values()), shared

    # One dies. The other serves on, alone, until there is another one, which serves nobody before it can.
    victim = min(first)
    os.kill(victim, signal.SIGKILL)
    await eventually(lambda: victim not in _listeners(parts), "its socket is gone")
    asked = 0
    while len(_listeners(parts)) < 2 or asked < 16:
        await _ask(parts, key)
        asked += 1
        assert asked < 2000, "it was never replaced"
    for _ in range(16):
        await _ask(parts, key)
    again = await answered()
    assert all(again.values()), again
    assert sum(again.values()) >= 16 + asked, "the one that lived has forgotten nothing"

    # What a tenant may ask for, it may ask of both together.
    limits.write_text(f"[{tenant}]\nrequests_per_minute = 20\n")
    await asyncio.sleep(1.1)
    started, asked = time.monotonic(), 0
    with pytest.raises(ServiceError) as refused, rpc.errors():
        while True:
            await _ask(parts, key)
            asked += 1
    assert refused.value.reason == "REQUESTS_LIMIT"
    came_back = (time.monotonic() - started) / 3
    assert 20 <= asked <= 21 + came_back, f"{came_back:.1f} came back while these were asked"
    limits.write_text("")
    await asyncio.sleep(1.1)

    # Told to stop, both finish what they carry; also if it is said twice.
    async with contextlib.AsyncExitStack() as stack:
        streams: list[asyncio.Task[int]] = []
        for _ in range(8):
            system = await stack.enter_async_context(_connected(parts))
            streams.append(await _stream(system, key))
        last = _listeners(parts)
        os.kill(parts.pid("gateway"), signal.SIGTERM)
        await asyncio.sleep(0.1)
        assert await asyncio.to_thread(parts.kill, "gateway", signal.SIGTERM) == 0
        assert await asyncio.gather(*streams) == [200] * 8
    assert not _listeners(parts)
    assert not any(psutil.pid_exists(pid) for pid in last)
    assert "Traceback" not in parts.log
    assert parts.log.count("a process died; another takes its place") == 1


async def _stream(system: System, key: Metadata) -> asyncio.Task[int]:
    """A stream that has begun; it will tell how many tokens came."""
    sampling = pb.Sampling(max_tokens=200, seed=1, ignore_end_of_text=True)
    request = pb.GenerateStreamRequest(prompt=pb.Prompt(text=PROMPT), sampling=sampling)
    call = system.inference.GenerateStream(request, metadata=key)
    await call.initial_metadata()

    async def count() -> int:
        return sum([len(part.tokens) async for part in call])

    return asyncio.create_task(count())


async def test_without_who_started_them_they_end_and_tell_their_clients(parts: Processes) -> None:
    await asyncio.to_thread(parts.start, "gateway", BACKPACK_DRAIN="0.2", **TWO)
    async with _connected(parts) as system:
        key = await system.tenant()
        sampling = pb.Sampling(max_tokens=480, seed=1, ignore_end_of_text=True)
        request = pb.GenerateStreamRequest(prompt=pb.Prompt(text=PROMPT), sampling=sampling)
        request.coalesce.FromMilliseconds(0)
        call = aiter(system.inference.GenerateStream(request, metadata=key))
        await anext(call)
        parts.kill("gateway")
        with pytest.raises(ServiceError) as ended, rpc.errors():
            async for _ in call:
                pass
        assert isinstance(ended.value, Unavailable)
    await eventually(lambda: not _listeners(parts), "both are gone")


def _serve(processes: Processes, **environment: str) -> subprocess.CompletedProcess[str]:
    """`serve gateway` that must fail."""
    return subprocess.run(
        [sys.executable, "-m", "backpack_serving.cli.main", "serve", "gateway"],
        env={
            **os.environ,
            "BACKPACK_STATE": str(processes.settings.state),
            "BACKPACK_GATEWAY_ADDRESS": processes.settings.gateway_address,
            "PYTHONPATH": os.pathsep.join(sys.path),
            **TWO,
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_what_keeps_them_from_starting_is_told(parts: Processes) -> None:
    failed = _serve(parts, BACKPACK_MODEL="/nowhere")
    assert failed.returncode == 1
    assert failed.stderr.count("/nowhere") == 1, "once, by who starts them"
    failed = _serve(parts, BACKPACK_LIMITS_FILE="/nowhere")
    assert failed.returncode == 1
    assert "/nowhere" in failed.stderr
    assert "one of the processes didn't come up" in failed.stderr
    assert "Traceback" not in failed.stderr
    parts.start("gateway", **TWO)
    failed = _serve(parts)  # it would share the port, too
    assert failed.returncode == 1
    assert f"can't listen on {parts.settings.gateway_address}" in failed.stderr
    assert len(_listeners(parts)) == 2
