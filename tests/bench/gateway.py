"""What a gateway process can carry: streamed messages per second of its core.

A replica that makes nothing stands behind it: a process that answers every call at once with messages of one
token, as fast as they are taken, under the release that was pinned. So the gateway is what is measured, by the
processor time that it used; and, beside it, the same messages without a gateway, by that of the replica.

    python -m tests.bench.gateway
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
from backpack_lm.manifest import Manifest
from backpack_proto.v1 import directory_pb2, inference_pb2_grpc
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_serving import rpc
from backpack_serving.inference import replica
from backpack_serving.inference import wire as answers
from backpack_serving.interventions import bootstrap as interventions
from backpack_serving.settings import Settings
from backpack_serving.wire import inference as wire

from tests.bench.report import console, spread, write
from tests.e2e.conftest import System
from tests.e2e.test_processes import Processes

MESSAGES, ROUNDS = 200, 3
STREAMS = (1, 32, 256)


class Endless(inference_pb2_grpc.InferenceServiceServicer):
    """Answers with so many messages at once."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: rpc.Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        pin = answers.read_pin(context)
        await context.send_initial_metadata(())
        message = pb.GenerateStreamResponse(text=" ship", tokens=[pb.Token(id=1234, text=" ship")])
        first = pb.GenerateStreamResponse(served=answers.served(pin, pin.release_digest, self._manifest))
        first.MergeFrom(message)
        yield first
        for _ in range(MESSAGES - 2):
            yield message
        usage = pb.Usage(prompt_tokens=1, generated_tokens=MESSAGES)
        yield pb.GenerateStreamResponse(finish_reason=pb.FINISH_REASON_LENGTH, usage=usage)


def _replica(settings: Settings, told: Any) -> None:
    async def serve() -> None:
        manifest = Manifest.read(settings.model)
        service = rpc.Service(
            "backpack.v1.InferenceService",
            inference_pb2_grpc.add_InferenceServiceServicer_to_server,
            Endless(manifest),
        )
        server = await rpc.start([service], "127.0.0.1:0")
        told.send(server.address)
        report = replica.report_to(rpc.channel(settings.directory_address))
        state = directory_pb2.Replica(
            id="endless", address=server.address, model_fingerprint=manifest.fingerprint, slots=1000
        )
        while True:
            with contextlib.suppress(Exception):
                await report(state)
            await asyncio.sleep(0.25)

    asyncio.run(serve())


async def _carry(stub: Any, metadata: Any, streams: int) -> int:
    request = pb.GenerateStreamRequest(prompt=pb.Prompt(text="x"), sampling=pb.Sampling(max_tokens=MESSAGES))

    async def one() -> int:
        return sum([1 async for _ in stub.GenerateStream(request, metadata=metadata)])

    return sum(await asyncio.gather(*(one() for _ in range(streams))))


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def main(processes: Processes, endless: multiprocessing.Process, address: str) -> None:
    settings = processes.settings
    system = System(settings.gateway_address, settings.interventions_address, settings)
    await system.tenants.CreateTenant(ipb.CreateTenantRequest(tenant_id="bench"), metadata=system.admin)
    request = ipb.CreateApiKeyRequest(parent="tenants/bench", roles=[ipb.ROLE_CALLER])
    key = rpc.with_key((await system.tenants.CreateApiKey(request, metadata=system.admin)).secret)
    await asyncio.sleep(2)
    pin = pb.Pin(tenant="bench", channel="live", release_digest="00" * 32)
    direct = inference_pb2_grpc.InferenceServiceStub(rpc.channel(address))
    pinned = (*system.replica, (wire.PIN, pin.SerializeToString()))
    ways = {
        "gateway": (system.inference, key, psutil.Process(processes.pid("gateway"))),
        "bare grpc.aio": (direct, pinned, psutil.Process(endless.pid)),
    }
    figures: dict[str, Any] = {}
    for streams in STREAMS:
        rates: dict[str, list[float]] = {name: [] for name in ways}
        walls: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(-1, ROUNDS):  # the first is a warm-up
            for name, (stub, metadata, process) in ways.items():
                used, started = _used(process), time.perf_counter()
                carried = sum([await _carry(stub, metadata, streams) for _ in range(max(1, 16 // streams))])
                if turn >= 0:
                    rates[name].append(carried / (_used(process) - used))
                    walls[name].append(carried / (time.perf_counter() - started))
            console.print(f"{streams} streams, round {turn + 1} of {ROUNDS}")
        for name in ways:
            figures[f"{name}, {streams}"] = {"per_core": spread(rates[name]), "per_second": spread(walls[name])}
    rows = [
        [
            name.split(", ")[0],
            name.split(", ")[1],
            f"{f['per_core']['median']:.0f} ({f['per_core']['q1']:.0f}–{f['per_core']['q3']:.0f})",
            f"{f['per_second']['median']:.0f}",
        ]
        for name, f in figures.items()
    ]
    write(
        "gateway",
        f"Streamed messages that a gateway process carries ({MESSAGES} a stream, one token each)",
        "python -m tests.bench.gateway",
        [
            "server",
            "streams",
            "messages per second of its core (q1–q3)",
            "messages/s, with the client on this machine",
        ],
        rows,
        figures,
    )
    await system.close()


if __name__ == "__main__":
    state = Path(tempfile.mkdtemp())
    interventions.mint_key(Settings(state=state).key_file("replica"))
    processes = Processes(state)
    context = multiprocessing.get_context("spawn")
    heard, told = context.Pipe(duplex=False)
    endless = context.Process(target=_replica, args=(processes.settings, told), daemon=True)
    try:
        for part in ("interventions", "directory"):
            processes.start(part)
        endless.start()
        where = heard.recv()
        processes.start("gateway", BACKPACK_LOG_LEVEL="warning")
        asyncio.run(main(processes, endless, where))
    finally:
        endless.kill()
        processes.stop()
