"""Replicas under Ray Serve: streams for two tenants at once, a replica and the directory killed, all recovered.

It runs in a network namespace where it can: Ray listens on the machine's own address whatever it is told.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

STORY = [sys.executable, "-m", "tests.e2e.ray_story"]
APART = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "story"]


def _can_be_apart() -> bool:
    try:
        return subprocess.run([*APART, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_replicas_under_ray_are_killed_and_recover() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]),
        "PYTHONWARNINGS": "ignore",  # Ray's own
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [*APART, *STORY] if _can_be_apart() else STORY
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "the story ends well" in done.stdout
