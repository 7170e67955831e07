"""A process that hangs ends, so that whoever supervises it starts it again."""

from __future__ import annotations

import subprocess
import sys
import time

HANGS = """
import asyncio, sys, time
from types import SimpleNamespace
from backpack_serving.cli import serve

serve.HANG_TIMEOUT, serve.WATCH = 1.0, 0.1

async def start(settings, metrics):
    async def stop():
        pass
    async def hang():
        await asyncio.sleep(float(sys.argv[1]))
        time.sleep(float(sys.argv[2]))
        print("went on", flush=True)
        if sys.argv[2] == "0":
            failed.set()
    failed = asyncio.Event()
    running = SimpleNamespace(address="here", stop=stop, failed=failed, task=asyncio.create_task(hang()))
    return running

serve._serve("directory", start, lambda running: running.failed)
"""


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HANGS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_who_hangs_says_where_and_ends() -> None:
    started = time.monotonic()
    done = _run("0.3", "100")
    assert time.monotonic() - started < 90
    assert done.returncode == 1
    assert "went on" not in done.stdout
    assert "Timeout" in done.stderr
    assert "in hang" in done.stderr


def test_who_waits_does_not_hang() -> None:
    done = _run("3", "0")
    assert "went on" in done.stdout
    assert "Timeout" not in done.stderr
