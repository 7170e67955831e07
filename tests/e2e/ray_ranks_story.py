"""A Ray cluster of two nodes on one machine, and a replica with a rank on each.

It gives the tokens of one rank, is drained and redeployed, and comes back after its other rank was killed, has hung,
and was lost with its node. Run by test_ray.py, in a network of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
from backpack_lm import cache
from backpack_lm.installed import folder_of
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError
from backpack_serving.gateway import bootstrap as gateway
from backpack_serving.inference import app
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.interventions import bootstrap as interventions
from backpack_serving.observability.metrics import Metrics
from backpack_serving.sampling import SamplingParams
from backpack_serving.settings import Settings
from ray import serve
from ray.cluster_utils import Cluster

from tests.e2e.conftest import Metadata, System, copy, topic
from tests.e2e.ray_cluster_story import GRPC_PORT, deploy
from tests.e2e.ray_story import PROMPT, actors, until
from tests.e2e.test_embedded import _oracle, _overlay
from tests.waiting import eventually

LOST_SECONDS = 2.0
"""Within which a lost rank ends its replica's streams and takes it out of the directory."""


def other_ranks() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::Rank:1"] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def the_rank() -> psutil.Process:
    (rank,) = other_ranks()
    return rank


async def tokens(system: System, key: Metadata) -> list[int]:
    parts = await system.stream(key, PROMPT, max_tokens=24, temperature=0.0, ignore_end_of_text=True)
    return [token.id for part in parts for token in part.tokens]


async def long_stream(system: System, key: Metadata, began: asyncio.Event, count: int = 480) -> str:
    """A stream of so many tokens: "ok", or the reason of its retryable end."""
    sampling = pb.Sampling(max_tokens=count, seed=1, ignore_end_of_text=True)
    request = pb.GenerateStreamRequest(prompt=pb.Prompt(text=PROMPT), sampling=sampling)
    try:
        with rpc.errors():
            async for _ in system.inference.GenerateStream(request, metadata=key):
                began.set()
    except ServiceError as error:
        assert error.code == "UNAVAILABLE", error
        assert error.retry_after is not None, error
        return error.reason
    return "ok"


async def lose(system: System, router: Any, key: Metadata, what: str, act: Callable[[], object]) -> None:
    """Lose a rank under two streams, and wait for the group that Serve starts instead."""
    before = router.replicas()
    began = [asyncio.Event() for _ in range(2)]
    streams = [asyncio.create_task(long_stream(system, key, event)) for event in began]
    await asyncio.gather(*(event.wait() for event in began))
    since = time.monotonic()
    act()

    async def seconds_until(ended: Callable[[], bool]) -> float:
        await eventually(ended, what, 30)
        return time.monotonic() - since

    def is_listed() -> bool:
        """As one that takes requests."""
        return any(not target.replica.draining for target in router._targets.values())

    ended, forgotten = await asyncio.gather(
        seconds_until(lambda: all(stream.done() for stream in streams)), seconds_until(lambda: not is_listed())
    )
    assert router.size == 0
    outcomes = [stream.result() for stream in streams]
    assert outcomes == ["REPLICA_LOST"] * 2, outcomes
    await eventually(lambda: router.size == 1 and not router.replicas() & before, what, 240)
    print(
        f"{what}: streams ended after {ended:.2f} s, out of the directory after "
        f"{forgotten:.2f} s, another group serves after {time.monotonic() - since:.1f} s",
        flush=True,
    )
    assert max(ended, forgotten) < LOST_SECONDS


async def story(settings: Settings, front: gateway.Gateway, cluster: Cluster, dashboard: str) -> None:
    system, router = System(front.address, settings.interventions_address, settings), front.router
    chosen = {
        "model": str(settings.model),
        "precision": "float32",
        "state": str(settings.state),
        "interventions_address": settings.interventions_address,
    }
    arguments = {"tensor_parallel": 2, "placement": "SPREAD", "cpus": 1, "surge_percent": 0}
    await deploy(dashboard, settings.state, **arguments, settings=chosen | {"slots": 4})
    await until("a replica in the directory", lambda: router.size == 1, 240)
    (replica,) = actors(app.REPLICAS).values()
    assert replica.ppid() != the_rank().ppid(), "each rank on a node of its own"
    assert the_rank().nice() == os.getpriority(os.PRIO_PROCESS, 0), "no less a process than a gateway"
    assert len(list(settings.state.glob("caches/*/backpack/tables/*"))) == 2, "each node has made its own table"

    served = ServedModel.read(folder_of("micro"))
    keys = [await system.tenant(*edits) for edits in ((), (copy("king", "nurse"), topic("nurse", "patient")))]
    sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_end_of_text=True)
    ids = served.tokenizer.encode(PROMPT)
    expected = [_oracle(served, await _overlay(system, key, served), ids, sampling) for key in keys]

    async def check() -> None:
        assert await asyncio.gather(*(tokens(system, key) for key in keys)) == expected

    await check()
    print("greedy tokens of two tenants are those of one rank", flush=True)

    # Redeployed, it drains as one: the stream that runs ends well, and no rank is left over.
    began, before = asyncio.Event(), router.replicas()
    stream = asyncio.create_task(long_stream(system, keys[0], began))
    await began.wait()
    await deploy(dashboard, settings.state, **arguments, settings=chosen | {"slots": 3})
    assert await stream == "ok"
    await until("redeployed, with no stream lost", lambda: router.size == 1 and not router.replicas() & before, 240)
    await check()
    the_rank()

    await lose(system, router, keys[0], "a rank killed", lambda: the_rank().kill())
    await check()
    await lose(system, router, keys[0], "a rank stopped", lambda: the_rank().send_signal(signal.SIGSTOP))
    await check()
    await eventually(lambda: len(other_ranks()) == 1, "the rank that was stopped is ended")
    node = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}[the_rank().ppid()]
    doomed = [
        node.all_processes["raylet"][0].process.pid,
        *(c.pid for c in psutil.Process(the_rank().ppid()).children()),
    ]
    await lose(system, router, keys[0], "a node killed", lambda: [psutil.Process(pid).kill() for pid in doomed])
    await check()
    await system.close()


async def main(settings: Settings, cluster: Cluster, dashboard: str) -> None:
    control = await interventions.start(settings, Metrics())
    front = await gateway.start(settings, Metrics())
    try:
        await story(settings, front, cluster, dashboard)
    finally:
        await front.stop()
        await control.stop()


if __name__ == "__main__":
    state = Path(tempfile.mkdtemp())
    chosen = Settings(
        state=state,
        model=folder_of("micro"),
        gateway_address="127.0.0.1:0",
        interventions_address="127.0.0.1:18471",
        directory_address=f"127.0.0.1:{GRPC_PORT}",
        directory_application=app.DIRECTORY,
        service_key=interventions.mint_key(Settings(state=state).key_file("replica")),
    )
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    try:
        for number in range(2):
            own = state / "caches" / str(number)
            (own / "backpack").mkdir(parents=True)
            (own / "backpack" / "kernels").symlink_to(cache.folder("kernels"))  # as images bring them
            nodes.add_node(num_cpus=2, env_vars={"XDG_CACHE_HOME": str(own)})
        board = ray.init(address=nodes.address, log_to_driver=False).address_info["webui_url"]
        asyncio.run(main(chosen, nodes, board))
        serve.shutdown()
        for rank in other_ranks():
            rank.wait(10)  # with its replica, whose drain Serve waited for
    finally:
        ray.shutdown()
        nodes.shutdown()
    print("the story ends well", flush=True)
    sys.exit(0)
