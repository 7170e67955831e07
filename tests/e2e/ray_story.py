"""Two replicas under a local Ray, killed and recovered. Run by test_ray.py, in a network of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import ray
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError
from backpack_serving.gateway import bootstrap as gateway
from backpack_serving.inference import app
from backpack_serving.interventions import bootstrap as interventions
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings
from ray import serve

from tests.e2e.conftest import Metadata, System, copy
from tests.waiting import PATIENCE, eventually

PROMPT = "The story of the king and the"


def actors(application: str) -> dict[int, psutil.Process]:
    """Ray names the processes of its actors. Those that this one started: a story kills some, and another's Ray, in a
    container for one, has actors of the same names."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::ServeReplica:{application}:"):
                found[process.pid] = process
        except psutil.Error:
            continue
    return found


async def until(what: str, check: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait for it, and say how long that took: the story is told to whoever runs it."""
    started = time.monotonic()
    await eventually(check, what, seconds)
    print(f"{what}: after {time.monotonic() - started:.1f} s", flush=True)


async def text(system: System, key: Metadata, tokens: int = 24) -> tuple[str, str]:
    parts = await system.stream(key, PROMPT, max_tokens=tokens, seed=2, temperature=0.7, ignore_end_of_text=True)
    return "".join(p.text for p in parts), parts[0].served.release_digest


async def story(settings: Settings, front: gateway.Gateway) -> None:
    system = System(front.address, settings.interventions_address, settings)
    router = front.router
    await until("two replicas in the directory", lambda: router.size == 2)
    for process in actors(app.REPLICAS).values():
        assert process.nice() == os.getpriority(os.PRIO_PROCESS, 0), "no less a process than a gateway"
    keys = [await system.tenant(copy("king", word)) for word in ("ship", "nurse")]

    # Two tenants at once, over both replicas: each its own release, whichever replica it was.
    answers = await asyncio.gather(*(text(system, key) for _ in range(8) for key in keys))
    assert len(set(answers[0::2])) == 1, set(answers[0::2])
    assert len(set(answers[1::2])) == 1, set(answers[1::2])
    assert answers[0] != answers[1]
    before = router.replicas()
    print(f"{len(answers)} streams for two tenants over {len(before)} replicas", flush=True)

    # Kill one under load.
    outcomes: list[str] = []
    running: set[int] = set()

    async def one(number: int, key: Metadata) -> None:
        request = pb.GenerateStreamRequest(
            prompt=pb.Prompt(text=PROMPT),
            sampling=pb.Sampling(max_tokens=400, seed=1, ignore_end_of_text=True),
        )
        try:
            with rpc.errors():
                async for _ in system.inference.GenerateStream(request, metadata=key):
                    running.add(number)
            outcomes.append("ok")
        except ServiceError as error:
            outcomes.append(error.reason)
        finally:
            running.discard(number)

    victim = sorted(actors(app.REPLICAS))[0]  # looked for now: that takes as long as some streams
    load = [asyncio.create_task(one(number, key)) for number, key in enumerate(10 * keys)]
    await until("both have four streams, as many as their slots", lambda: len(running) == 8)
    os.kill(victim, signal.SIGKILL)
    await asyncio.gather(*load)
    print(f"streams that ran when a replica was killed: {sorted(outcomes)}", flush=True)
    assert set(outcomes) == {"ok", "REPLICA_LOST"}, outcomes
    assert [(await text(system, key)) for key in keys] == list(answers[:2]), "the one that is left serves on"

    await until("the dead one is out of the directory", lambda: len(router.replicas() & before) == 1, 10)
    await until("Serve has replaced it", lambda: router.size == 2)
    assert await asyncio.gather(*(text(system, key) for _ in range(8) for key in keys)) == answers

    # Kill the directory: requests go on, and it fills again.
    (directory,) = actors(app.DIRECTORY).values()
    directory.kill()
    assert [(await text(system, key)) for key in keys] == list(answers[:2])
    await until("a new directory process", lambda: bool(actors(app.DIRECTORY).keys() - {directory.pid}))
    await asyncio.sleep(4)  # longer than replicas stay listed unheard
    await until("two replicas again", lambda: router.size == 2)
    assert [(await text(system, key)) for key in keys] == list(answers[:2])
    await system.close()


async def main(settings: Settings) -> None:
    control = await interventions.start(settings, Metrics())
    front = await gateway.start(settings, Metrics())
    try:
        await story(settings, front)
    finally:
        await front.stop()
        await control.stop()


if __name__ == "__main__":
    state = Path(tempfile.mkdtemp())
    grpc_port = 18472
    chosen = Settings(
        state=state,
        threads=1,
        slots=4,
        gateway_address="127.0.0.1:0",
        interventions_address="127.0.0.1:18471",
        directory_address=f"127.0.0.1:{grpc_port}",
        directory_application=app.DIRECTORY,
        service_key=interventions.mint_key(Settings(state=state).key_file("replica")),
    )
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        # Ray forks; it must be up before this process opens its first gRPC channel.
        app.start(chosen, grpc_port, count=2)
        asyncio.run(main(chosen))
    finally:
        serve.shutdown()
        ray.shutdown()
    print("the story ends well", flush=True)
    sys.exit(0)
