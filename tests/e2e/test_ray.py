"""Replicas under Ray Serve: streams for two tenants at once, parts killed and recovered, a redeploy under load.

The stories run in a network namespace where they can: Ray listens on the machine's own address whatever it is
told.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import PROXY_VARIABLES

pytest.importorskip("ray")

APART = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "story"]


def _can_be_apart() -> bool:
    try:
        return subprocess.run([*APART, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _tell(story: str, seconds: float) -> None:
    environment = {
        **os.environ,
        **PROXY_VARIABLES,
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]),
        "PYTHONWARNINGS": "ignore",  # Ray's own
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # it kills workers for what others on the machine take
    }
    command = [sys.executable, "-m", f"tests.e2e.{story}"]
    if _can_be_apart():
        command = [*APART, *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "the story ends well" in done.stdout


def test_a_story_finds_the_actors_of_its_own_ray_only() -> None:
    from tests.e2e.ray_story import actors

    name = "ray::ServeReplica:replicas:Replica"
    sleep = shutil.which("sleep")
    ours = subprocess.Popen([name, "60"], executable=sleep)
    made = ["bash", "-c", f"(exec -a {name} sleep 60) >&- 2>&- & echo $!"]
    another = psutil.Process(int(subprocess.run(made, capture_output=True, text=True, check=True).stdout))
    try:
        while another.cmdline()[:1] != [name]:
            pass
        assert actors("replicas").keys() == {ours.pid}
    finally:
        for process in (ours, another):
            process.send_signal(signal.SIGKILL)
        ours.wait()


def test_replicas_under_ray_are_killed_and_recover() -> None:
    _tell("ray_story", 300)


@pytest.mark.slow
def test_a_cluster_loses_a_replica_and_a_node_is_redeployed_and_scaled_under_load() -> None:
    _tell("ray_cluster_story", 600)


@pytest.mark.slow
def test_a_replica_of_two_ranks_on_two_nodes_is_lost_and_comes_back_as_one() -> None:
    _tell("ray_ranks_story", 600)
