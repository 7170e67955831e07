"""How long an activation and a rollback take until the last of 8 connected replicas, and a gateway, hold them.

The intervention service is a process of its own, on SQLite. Eight whole replicas (engine, gRPC server, reader) and
a gateway share a second process; each has its own streams, fetches, verifies, compiles, and its own files on disk.
What is timed is Activate or Rollback with wait ALL, from sending it to its answer; after each, every replica must
have the release ready and the gateway must serve it.

    python -m tests.bench.sync [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_proto.v1 import sync_pb2 as spb
from backpack_serving import rpc
from backpack_serving.gateway import bootstrap as gateway
from backpack_serving.inference import replica
from backpack_serving.observability.metrics import Metrics
from pydantic import SecretStr
from rich.progress import track

from tests.bench.report import console, spread, write
from tests.e2e.conftest import Metadata, System, copy, topic
from tests.e2e.test_processes import Processes
from tests.waiting import eventually

REPLICAS = 8
WORDS = ("ship", "nurse", "sea", "doctor", "house", "river", "law", "court", "horse", "water")


async def _timed(system: System, key: Metadata, method: str, **fields: Any) -> tuple[float, ipb.Channel]:
    """(seconds until all hold it, the channel after it)."""
    now = await system.releases.GetChannel(ipb.GetChannelRequest(name="channels/live"), metadata=key)
    request = getattr(ipb, f"{method}Request")(
        channel="channels/live", etag=now.channel.etag, wait=ipb.WAIT_ALL, **fields
    )
    request.wait_timeout.FromSeconds(30)
    started = time.perf_counter()
    answer = await getattr(system.releases, method)(request, metadata=key)
    seconds = time.perf_counter() - started
    r = answer.rollout
    assert (r.complete, r.replicas_acked, r.gateways_acked) == (True, REPLICAS, 1), r
    return seconds, answer.channel


async def _check(system: System, key: Metadata, fleet: Sequence[replica.Replica], channel: ipb.Channel) -> None:
    """Everybody has it, and the next request gets it."""
    assert all(channel.release_digest in one.releases.resident() for one in fleet)
    request = pb.GenerateRequest(prompt=pb.Prompt(text="The king"), sampling=pb.Sampling(max_tokens=1))
    served = (await system.inference.Generate(request, metadata=key)).served
    assert served.release_digest == channel.release_digest


async def _connected(system: System) -> bool:
    """Whether all readers have streams and have caught up."""
    answer = await system.fleet.ListReaders(spb.ListReadersRequest(), metadata=system.admin)
    return sum(reader.position == answer.position for reader in answer.readers) == REPLICAS + 1


async def _measure(system: System, fleet: Sequence[replica.Replica], rounds: int) -> dict[str, list[float]]:
    key = await system.tenant(copy("king", "ship"))
    await eventually(lambda: _connected(system))
    found: dict[str, list[float]] = {"new": [], "ready": [], "rollback": []}
    for turn in track(range(-5, rounds), "rounds", console=console):  # the first are a warm-up
        word, other = WORDS[turn % len(WORDS)], WORDS[(turn // len(WORDS)) % len(WORDS)]
        edits = (copy("king", word), topic(word, other, strength=1 + turn % 3))
        release = await system.release(key, *edits)
        new, channel = await _timed(system, key, "Activate", release=release)
        await _check(system, key, fleet, channel)
        fetched = [one.releases.fetched for one in fleet]
        back, channel = await _timed(system, key, "Rollback")
        await _check(system, key, fleet, channel)
        ready, channel = await _timed(system, key, "Activate", release=release)
        await _check(system, key, fleet, channel)
        assert [one.releases.fetched for one in fleet] == fetched, "something was fetched"
        if turn >= 0:
            for name, seconds in (("new", new), ("ready", ready), ("rollback", back)):
                found[name].append(1e3 * seconds)
    return found


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


async def main(processes: Processes, rounds: int) -> None:
    settings, fleet = processes.settings, []
    key = SecretStr(settings.key_for("replica"))
    for number in track(range(REPLICAS), "replicas", console=console):
        own = settings.model_copy(
            update={
                "state": settings.state / f"replica-{number}",
                "service_key": key,
                "inference_address": "127.0.0.1:0",
            }
        )
        report = replica.report_to(rpc.channel(settings.directory_address))
        fleet.append(await replica.start(own, report, rpc.channel(settings.interventions_address), Metrics()))
    front = await gateway.start(settings, Metrics())
    await front.ready()
    system = System(front.address, settings.interventions_address, settings)
    found = await _measure(system, fleet, rounds)
    titles = {
        "new": "Activate a release made just before",
        "ready": "Activate a release that is ready",
        "rollback": "Rollback",
    }
    figures = {name: {**spread(values), "p99": _p99(values), "worst": max(values)} for name, values in found.items()}
    write(
        "sync",
        f"Until the last of {REPLICAS} connected replicas holds a change ({rounds} times each, default model)",
        "python -m tests.bench.sync",
        ["change", "p50, ms", "p99, ms", "worst, ms"],
        [[titles[name], f"{f['median']:.0f}", f"{f['p99']:.0f}", f"{f['worst']:.0f}"] for name, f in figures.items()],
        figures,
    )
    await system.close()
    await front.stop()
    await asyncio.gather(*(one.stop() for one in fleet))


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=100)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        processes = Processes(Path(folder))
        try:
            for part in ("interventions", "directory"):
                processes.start(part)
            asyncio.run(main(processes, chosen.rounds))
        finally:
            processes.stop()
