"""A Ray cluster of three nodes on one machine, deployed from deploy/ray/serve.yaml with `serve deploy`.

Two replicas share a load that never stops, while one is killed, a node is killed, and all are redeployed; then
they are scaled by load. Every stream ends with its tenant's text, or with a status that says that it may be
retried, and a retry succeeds. Run by test_ray.py, in a network of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import ray
import yaml
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError, Unavailable
from backpack_serving.gateway import bootstrap as gateway
from backpack_serving.inference import app
from backpack_serving.interventions import bootstrap as interventions
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings
from ray.cluster_utils import Cluster

from tests import commands
from tests.e2e.conftest import Metadata, System, copy
from tests.e2e.ray_story import PROMPT, actors, until

CONFIG = Path(__file__).parents[2] / "deploy" / "ray" / "serve.yaml"
GRPC_PORT = yaml.safe_load(CONFIG.read_text())["grpc_options"]["port"]


async def deploy(dashboard: str, state: Path, **arguments: Any) -> None:
    """`serve deploy` of the checked-in file, with other arguments for the replicas."""
    config = yaml.safe_load(CONFIG.read_text())
    (replicas,) = (a for a in config["applications"] if a["name"] == app.REPLICAS)
    replicas["args"] |= arguments
    file = state / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    command = ["serve", "deploy", str(file), "-a", f"http://{dashboard}"]
    answer = await commands.run_command(*command, no_proxy=dashboard.partition(":")[0])  # as compose has it
    assert answer.returncode == 0, f"serve deploy failed: {answer.stderr}"


class Load:
    """Streams without end, for two tenants: what became of each, and whether its text was right."""

    def __init__(self, system: System, keys: list[Metadata], expected: list[str], width: int) -> None:
        self._system, self._keys, self._expected = system, keys, expected
        self.outcomes: Counter[str] = Counter()
        self._stopped = False
        self._tasks = [asyncio.create_task(self._client(i % len(keys))) for i in range(width)]

    async def _client(self, tenant: int) -> None:
        retrying = False
        while not self._stopped or retrying:
            try:
                text = await stream(self._system, self._keys[tenant])
                assert text == self._expected[tenant], f"tenant {tenant} got {text!r}"
                self.outcomes["retried, ok" if retrying else "ok"] += 1
                retrying = False
            except Unavailable as error:  # says by its code that it may be retried
                self.outcomes[f"retryable: {error.reason}"] += 1
                retrying = True
                await asyncio.sleep(error.retry_after or 0.1)
            except ServiceError as error:
                raise AssertionError(f"not retryable: {error.code} {error.reason}") from error

    @property
    def failures(self) -> int:
        """Streams that were cut off, all of them retryable: another failure ends the story."""
        return sum(n for outcome, n in self.outcomes.items() if outcome.startswith("retryable"))

    async def count(self, more: int) -> None:
        """Wait for so many more good streams."""
        before = self.outcomes["ok"]
        while self.outcomes["ok"] < before + more:
            for task in self._tasks:
                if task.done():
                    await task  # raises what it failed with
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Let the streams that run end, and whatever is being retried."""
        self._stopped = True
        await asyncio.gather(*self._tasks)


async def stream(system: System, key: Metadata) -> str:
    request = pb.GenerateStreamRequest(
        prompt=pb.Prompt(text=PROMPT),
        sampling=pb.Sampling(max_tokens=120, seed=2, temperature=0.7, ignore_end_of_text=True),
    )
    with rpc.errors():
        return "".join([part.text async for part in system.inference.GenerateStream(request, metadata=key)])


def _raylets() -> set[int]:
    """The nodes on which replicas run: Ray's node processes are the parents of those of its actors."""
    return {process.ppid() for process in actors(app.REPLICAS).values()}


async def story(settings: Settings, front: gateway.Gateway, cluster: Cluster, dashboard: str) -> None:
    system = System(front.address, settings.interventions_address, settings)
    router, state = front.router, settings.state
    # The engine's slots are few, so that requests wait in line and every part of the path is busy.
    replica_settings = {
        "state": str(state),
        "threads": 1,
        "slots": 2,
        "interventions_address": settings.interventions_address,
    }
    await deploy(dashboard, state, count=2, settings=replica_settings)
    await until("two replicas in the directory", lambda: router.size == 2, 120)
    assert len(_raylets()) == 2, "one on each node"

    keys = [await system.tenant(copy("king", word)) for word in ("ship", "nurse")]
    expected = [await stream(system, key) for key in keys]
    assert expected[0] != expected[1]
    load = Load(system, keys, expected, width=8)
    await load.count(16)

    # Both take part: each has a share of what is in flight.
    busy: Counter[str] = Counter()
    for _ in range(20):
        busy.update(t.replica.id for t in router._targets.values() if t.replica.running)
        await asyncio.sleep(0.1)
    print(f"reports in which a replica was busy, of 20: {sorted(busy.values())}", flush=True)
    assert len(busy) == 2
    assert not load.failures

    # A replica is killed.
    before = router.replicas()
    os.kill(sorted(actors(app.REPLICAS))[0], signal.SIGKILL)
    await until("the dead replica is out of the directory", lambda: len(router.replicas() & before) == 1, 30)
    await until("Ray has restored it", lambda: router.size == 2, 120)
    await load.count(8)
    assert load.outcomes["retryable: REPLICA_LOST"] > 0, load.outcomes
    print(f"a replica killed: {dict(load.outcomes)}", flush=True)

    # A node is killed, with what runs on it.
    (doomed,) = [n for n in cluster.worker_nodes if _raylet(n) == sorted(_raylets())[-1]]
    before = router.replicas()
    cluster.remove_node(doomed, allow_graceful=False)
    await until("the dead node's replica is out", lambda: len(router.replicas() & before) == 1, 30)
    await until("Ray has placed another on the node that is left", lambda: router.size == 2, 120)
    cluster.add_node(num_cpus=4)
    await load.count(8)
    print(f"… and a node killed: {dict(load.outcomes)}", flush=True)

    # All are replaced, without a stream lost.
    failures = load.failures
    before, good = router.replicas(), load.outcomes["ok"]
    await deploy(dashboard, state, count=2, settings=replica_settings | {"slots": 3})
    await until("every replica is a new one", lambda: router.size == 2 and not router.replicas() & before, 180)
    await load.count(8)
    print(f"redeployed under load, {load.outcomes['ok'] - good} streams: {dict(load.outcomes)}", flush=True)
    assert load.failures == failures, "the redeploy lost something"
    await load.stop()

    # Fewer replicas when it is quiet, more under load; shrinking while something runs loses nothing either.
    scaled = {"min_replicas": 1, "max_replicas": 2, "tokens_in_flight": 200, "average_seconds": 2}
    scaled |= {"up_after_seconds": 1, "down_after_seconds": 4}
    await deploy(dashboard, state, count=1, autoscaling=scaled, settings=replica_settings)
    await until("scaled down when quiet", lambda: len(router.replicas()) == 1, 180)
    load = Load(system, keys, expected, width=8)
    await until("scaled up by tokens in flight", lambda: router.size == 2, 120)
    await load.count(8)
    await load.stop()
    load = Load(system, keys, expected, width=1)
    await until("scaled down with little to do", lambda: len(router.replicas()) == 1, 180)
    await load.stop()
    print(f"scaled with little to do: {dict(load.outcomes)}", flush=True)
    assert not load.failures
    assert [await stream(system, key) for key in keys] == expected
    await system.close()


def _raylet(node: Any) -> int:
    (raylet,) = node.all_processes["raylet"]
    return int(raylet.process.pid)


def _draining(router: Any) -> bool:
    return any(t.replica.draining for t in router._targets.values())


async def main(settings: Settings, cluster: Cluster, dashboard: str) -> None:
    control = await interventions.start(settings, Metrics())
    front = await gateway.start(settings, Metrics())
    try:
        await story(settings, front, cluster, dashboard)
    finally:
        await front.stop()
        await control.stop()


if __name__ == "__main__":
    os.environ["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "0.5"  # 10 by default
    state = Path(tempfile.mkdtemp())
    chosen = Settings(
        state=state,
        gateway_address="127.0.0.1:0",
        interventions_address="127.0.0.1:18471",
        directory_address=f"127.0.0.1:{GRPC_PORT}",
        directory_application=app.DIRECTORY,
        service_key=interventions.mint_key(Settings(state=state).key_file("replica")),
    )
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=4)
        board = ray.init(address=nodes.address, log_to_driver=False).address_info["webui_url"]
        asyncio.run(main(chosen, nodes, board))
    finally:
        ray.shutdown()
        nodes.shutdown()
    print("the story ends well", flush=True)
    sys.exit(0)
