"""What gRPC, the gateway and Ray Serve add to the engine: time to first token, and tokens per second.

Ways to the same engine, those of a system without Ray and then those of one with it, in turn, round by round:

    engine                its asyncio loop, in this process
    replica               a replica process, called directly
    gateway               … through a gateway process
    engine, Ray beside    Ray's own processes are never quite idle
    ray                   a replica under Ray Serve, called directly
    ray + gateway         … through a gateway process

The cores that each part used are told with it: the replica (with Ray's own processes; for an engine this process),
the gateway, and the client, which is this process and shares the machine with them. One connection for all streams
of a way; the engine has 32 slots, so of 256 streams most wait.

    python -m tests.bench.tax          (`make bench` runs it in a network namespace, as the Ray test)
    python -m tests.bench.tax small    Backpack-Small with random weights, which cost what trained ones do

The first measures the model of BACKPACK_MODEL, by default the project's own. What a way costs is a time for each
message; what share of the engine's speed that is depends on how long the model's step takes, hence a second model.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from backpack_lm.checkpoint import TOKENIZER, save
from backpack_lm.config import SMALL
from backpack_lm.installed import folder_of
from backpack_lm.kernels import Precision
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay
from backpack_lm.patch import ReleaseContent
from backpack_proto.v1 import directory_pb2, directory_pb2_grpc, inference_pb2_grpc
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_serving import rpc
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.loop import EngineLoop
from backpack_serving.engine.runner import Runner
from backpack_serving.engine.scheduler import Scheduler
from backpack_serving.engine.sequence import GenerationRequest
from backpack_serving.engine.slots import OverlayRows, Slots
from backpack_serving.inference import app
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.interventions import bootstrap as interventions
from backpack_serving.sampling import SamplingParams
from backpack_serving.settings import Settings
from ray import serve

from tests.bench.report import console, spread, write
from tests.conftest import free_port
from tests.e2e.conftest import System
from tests.e2e.test_processes import Processes

PROMPT_TOKENS, NEW_TOKENS = 64, 64
PARTS = ("replica", "gateway", "client")
ROUNDS = {1: 60, 32: 24, 256: 3}
ROUNDS_SMALL = {1: 15, 32: 3}
"""How often, for how many streams at once."""

SMALL_VOCABULARY = 16384
"""That of the default model, whose tokenizer the random one borrows."""

Way = Callable[[list[int], int], AsyncIterator[int]]
"""(prompt, seed) → how many tokens came, each time some came."""

Parts = Mapping[str, Sequence[psutil.Process]]
"""What serves, and the client, by their column of the table."""


@dataclass(frozen=True, slots=True)
class Measured:
    """`first` in ms: the median over streams. `cores`: what each part used, on average."""

    first: float
    rate: float
    cores: dict[str, float]


def _seconds(processes: Iterable[psutil.Process]) -> float:
    """Processor time that these have used so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


async def _measure(way: Way, parts: Parts, streams: int, seed: str) -> Measured:
    """So many streams at once, from the first request to the last token."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(1, 16000) for _ in range(PROMPT_TOKENS)] for _ in range(streams)]
    firsts: list[float] = []

    async def one(prompt: list[int], at: int) -> int:
        started, count = time.perf_counter(), 0
        async for tokens in way(prompt, at):
            if not count:
                firsts.append(time.perf_counter() - started)
            count += tokens
        return count

    used, started = {part: _seconds(of) for part, of in parts.items()}, time.perf_counter()
    counts = await asyncio.gather(*(one(prompt, at) for at, prompt in enumerate(prompts)))
    elapsed = time.perf_counter() - started
    assert counts == [NEW_TOKENS] * streams, counts
    cores = {part: (_seconds(of) - used[part]) / elapsed for part, of in parts.items()}
    return Measured(sorted(firsts)[len(firsts) // 2] * 1e3, sum(counts) / elapsed, cores)


def _engine() -> tuple[Way, EngineLoop]:
    served = ServedModel.read(Settings().model, Precision(Settings().precision), room=65536)
    loop = EngineLoop(
        Engine(
            Runner(served.model, served.storage, 32),
            Slots(32),
            OverlayRows(65536),
            Scheduler(Settings().step_tokens, 256),
        )
    )
    overlay = Overlay.compile(ReleaseContent(), served.table)

    async def way(prompt: list[int], seed: int) -> AsyncIterator[int]:
        sampling = SamplingParams(max_tokens=NEW_TOKENS, seed=seed, ignore_end_of_text=True)
        async for outputs in loop.generate(
            GenerationRequest(f"{time.time_ns()}-{seed}", "t", tuple(prompt), sampling, overlay)
        ):
            yield len(outputs)

    return way, loop


def _grpc(channel: Any, metadata: Any) -> Way:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)

    async def way(prompt: list[int], seed: int) -> AsyncIterator[int]:
        request = pb.GenerateStreamRequest(
            prompt=pb.Prompt(tokens=pb.TokenIds(ids=prompt)),
            # As the engine beside it draws.
            sampling=pb.Sampling(max_tokens=NEW_TOKENS, seed=seed, temperature=1.0, ignore_end_of_text=True),
        )
        async for part in stub.GenerateStream(request, metadata=metadata):
            yield len(part.tokens)

    return way


async def _replica(directory: str, metadata: Any) -> str:
    """Its address."""
    channel = rpc.channel(directory)
    call = directory_pb2_grpc.DirectoryServiceStub(channel).WatchReplicas(
        directory_pb2.WatchReplicasRequest(), metadata=metadata
    )
    while not (message := await call.read()).replicas:
        pass
    call.cancel()
    await channel.close()
    return str(message.replicas[0].address)


def _small(folder: Path) -> Path:
    """A folder with a model of Backpack-Small's shape: its vocabulary is smaller, its tokens are the default's."""
    model = Backpack(SMALL.with_vocabulary(SMALL_VOCABULARY, 0))
    with console.status("writing a model of Backpack-Small's shape, with its topic denominators: minutes"):
        save(model.eval(), folder_of("micro") / TOKENIZER, folder)
    return folder


async def measure(
    settings: Settings, servers: Parts, small: bool, under_ray: bool = False
) -> dict[str, dict[str, Any]]:
    """Figures of the ways without Ray, or of those with it, by name and number of streams."""
    names = itertools.count(time.time_ns())  # of tenants: another round's are there already
    system = System(settings.gateway_address, settings.interventions_address, settings, _names=names)
    key = await system.tenant()
    live = (await system.releases.GetChannel(ipb.GetChannelRequest(name="channels/live"), metadata=key)).channel
    pin = pb.Pin(tenant=live.name.split("/")[1], channel="live", release_digest=live.release_digest)
    pinned = (*system.replica, ("backpack-pin-bin", pin.SerializeToString()))
    engine, loop = _engine()
    application = (("application", app.DIRECTORY),) if under_ray else ()
    address, client = await _replica(settings.directory_address, application), [psutil.Process()]
    behind = {"replica": servers["replica"], "client": client}
    bare = "engine, Ray beside" if under_ray else "engine"
    ways: dict[str, tuple[Way, Parts]] = {bare: (engine, {"replica": client})}
    ways["ray" if under_ray else "replica"] = _grpc(rpc.channel(address), pinned), behind
    gateway = _grpc(rpc.channel(settings.gateway_address), key)
    ways["ray + gateway" if under_ray else "gateway"] = gateway, {**servers, "client": client}
    figures: dict[str, dict[str, Any]] = {}
    for streams, rounds in (ROUNDS_SMALL if small else ROUNDS).items():
        measured: dict[str, list[Measured]] = {name: [] for name in ways}
        for turn in range(-1, rounds):  # the first is a warm-up
            for name, (way, parts) in ways.items():
                if turn < 0 and streams > 32:
                    continue  # warm by now, and long
                # A stream before, as another way's model is in the processor's caches. Prompts of its own: what
                # another way asked of the same replica would be in its prefix cache.
                await _measure(way, parts, 1, f"{name}, before round {turn} of {streams}")
                result = await _measure(way, parts, streams, f"{name}, round {turn}")
                if turn >= 0:
                    measured[name].append(result)
            console.print(f"{streams} streams, round {turn + 1} of {rounds}")
        for name, results in measured.items():
            ratio = [a.rate / b.rate for a, b in zip(results, measured[bare], strict=True)]
            figures[f"{name}; {streams}"] = {
                "first_ms": spread([m.first for m in results]),
                "tokens_per_second": spread([m.rate for m in results]),
                "of_engine": spread(ratio),
                "cores": {of: spread([m.cores[of] for m in results]) for of in ways[name][1]},
            }
    await loop.stop()
    await system.close()
    return figures


def tell(figures: dict[str, dict[str, Any]], small: bool) -> None:
    """Write the table."""
    rows = [
        [
            *name.split("; "),
            f"{f['first_ms']['median']:.1f} ({f['first_ms']['q1']:.1f}–{f['first_ms']['q3']:.1f})",
            f"{f['tokens_per_second']['median']:.0f}",
            f"{f['of_engine']['median']:.2f} ({f['of_engine']['q1']:.2f}–{f['of_engine']['q3']:.2f})",
            *(f"{f['cores'][part]['median']:.2f}" if part in f["cores"] else "" for part in PARTS),
        ]
        for name, f in figures.items()
    ]
    described = "Backpack-Small" if small else Settings().model.name + " model"
    precision = str(Precision.AUTO.dtype()).removeprefix("torch.")
    write(
        "tax_small" if small else "tax",
        f"What the ways to the engine cost ({described}, {precision}, "
        f"{PROMPT_TOKENS} + {NEW_TOKENS} tokens, one thread)",
        " ".join(["python -m tests.bench.tax", *sys.argv[1:]]),
        [
            "way",
            "streams",
            "first token, ms (q1–q3)",
            "tokens/s",
            "of the engine (q1–q3)",
            *(f"cores: {part}" for part in PARTS),
        ],
        rows,
        figures,
    )


if __name__ == "__main__":
    import os

    import torch

    torch.set_num_threads(1)
    os.environ["BACKPACK_PRECISION"] = "auto"  # as served; tests have float32
    state = Path(tempfile.mkdtemp())
    small = sys.argv[1:] == ["small"]
    if small:
        os.environ["BACKPACK_MODEL"] = str(_small(state / "model"))
    interventions.mint_key(Settings(state=state).key_file("replica"))
    processes = Processes(state, slots=32)
    on_ray = processes.settings.model_copy(
        update={"directory_address": f"127.0.0.1:{free_port()}", "gateway_address": f"127.0.0.1:{free_port()}"}
    )
    me = psutil.Process()
    try:
        for part in ("interventions", "directory", "inference", "gateway"):
            processes.start(part)
        servers = {
            "replica": [psutil.Process(processes.pid("inference"))],
            "gateway": [psutil.Process(processes.pid("gateway"))],
        }
        figures = asyncio.run(measure(processes.settings, servers, small))
        for part in ("gateway", "inference", "directory"):
            processes.kill(part)
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        app.start(on_ray, int(on_ray.directory_address.rpartition(":")[2]))
        rays = [process for process in me.children(recursive=True) if process.pid not in processes.pids()]
        processes.start(
            "gateway",
            BACKPACK_GATEWAY_ADDRESS=on_ray.gateway_address,
            BACKPACK_DIRECTORY_ADDRESS=on_ray.directory_address,
            BACKPACK_DIRECTORY_APPLICATION=app.DIRECTORY,
        )
        servers = {"replica": rays, "gateway": [psutil.Process(processes.pid("gateway"))]}
        figures |= asyncio.run(measure(on_ray, servers, small, under_ray=True))
        tell(figures, small)
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        processes.stop()
    os._exit(0)  # grpc's threads of this process must not outlive Ray's
