"""What HTTP adds to gRPC: the same streams through a gateway, and through an HTTP server before it, in turn.

On Backpack-Small with random weights, which cost what trained ones do: time to first token, and tokens per second.
Before a replica that makes nothing (see `tests.bench.gateway`), where no prompt is read: how much later the first
message of a stream comes, one stream at a time; and, with many, messages for each second of the processor that a
process of HTTP used, and the gateway behind it.

    python -m tests.bench.over_http
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import torch
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_serving import rpc
from backpack_serving.interventions import bootstrap as interventions
from backpack_serving.settings import Settings

from tests.bench import gateway, tax
from tests.bench.report import console, spread, write
from tests.conftest import free_port
from tests.e2e.conftest import System
from tests.e2e.test_processes import Processes

STREAMS = 32
ROUNDS, ROUNDS_EMPTY, ALONE = 9, 5, 300


def over_http(address: str, key: Any, **fields: Any) -> tax.Way:
    """A stream by HTTP/1.1, read as it comes: what a client's library costs isn't the server's."""
    host, _, port = address.rpartition(":")
    authorization = dict(key)["authorization"]

    async def way(prompt: list[int], seed: int) -> AsyncIterator[int]:
        asked = {
            "model": "live", "prompt": prompt, "max_tokens": tax.NEW_TOKENS, "seed": seed, "temperature": 1.0,
            "ignore_end_of_text": True, "stream": True, "stream_options": {"include_usage": True}, **fields,
        }  # fmt: skip
        body = json.dumps(asked).encode()
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"authorization: %s\r\ncontent-length: %d\r\n\r\n%s" % (authorization.encode(), len(body), body)
        )
        first, last = True, b""
        async for line in reader:
            if line.startswith(b"data: {"):
                last = line
                if first:
                    first = False
                    yield 1
        writer.close()
        yield json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"] - 1

    return way


async def on_small(settings: Settings, http: str, processes: dict[str, psutil.Process]) -> dict[str, Any]:
    """Figures of both ways, and of each round's pair."""
    system = System(settings.gateway_address, settings.interventions_address, settings)
    key = await system.tenant()
    ways = {"gRPC": tax._grpc(rpc.channel(settings.gateway_address), key), "HTTP": over_http(http, key)}
    parts = {name: [process] for name, process in processes.items()}
    measured: dict[str, list[tax.Measured]] = {name: [] for name in ways}
    for turn in range(-1, ROUNDS):  # the first is a warm-up
        for name, way in list(ways.items())[:: 1 if turn % 2 else -1]:  # what goes first changes
            result = await tax._measure(way, parts, STREAMS, f"{name}, round {turn}")
            if turn >= 0:
                measured[name].append(result)
        console.print(f"round {turn + 1} of {ROUNDS}")
    await system.close()
    pairs = list(zip(measured["HTTP"], measured["gRPC"], strict=True))
    return {
        **{
            name: {
                "first_ms": spread([m.first for m in results]),
                "tokens_per_second": spread([m.rate for m in results]),
                "cores": {part: spread([m.cores[part] for m in results]) for part in parts},
            }
            for name, results in measured.items()
        },
        "HTTP of gRPC": {
            "tokens_per_second": spread([http.rate / grpc.rate for http, grpc in pairs]),
            "first_ms_later": spread([http.first - grpc.first for http, grpc in pairs]),
        },
    }


async def before_nothing(settings: Settings, http: str, processes: dict[str, psutil.Process]) -> dict[str, Any]:
    """How much later a first message comes, ms; messages for each second of a core, of HTTP and of the gateway."""
    system = System(settings.gateway_address, settings.interventions_address, settings)
    key = await _tenant(system)
    way = over_http(http, key)
    rates: dict[str, list[float]] = {name: [] for name in processes}

    async def one(at: int) -> None:
        async for _ in way([1], at):
            pass

    for turn in range(-1, ROUNDS_EMPTY):
        used = {name: gateway._used(process) for name, process in processes.items()}
        await asyncio.gather(*(one(at) for at in range(STREAMS)))
        for name, process in processes.items():
            if turn >= 0:
                rates[name].append(STREAMS * gateway.MESSAGES / (gateway._used(process) - used[name]))
    by_grpc, firsts = tax._grpc(rpc.channel(settings.gateway_address), key), []
    for turn in range(ALONE):
        waits = {}
        for name, each in (("HTTP", way), ("gRPC", by_grpc))[:: 1 if turn % 2 else -1]:
            began, waits[name] = time.perf_counter(), 0.0
            async for _ in each([1], turn):
                waits[name] = waits[name] or time.perf_counter() - began
        firsts.append(waits)
    await system.close()
    return {
        **{name: spread(each) for name, each in rates.items()},
        "gRPC first_ms": spread([waits["gRPC"] * 1e3 for waits in firsts]),
        "HTTP first_ms": spread([waits["HTTP"] * 1e3 for waits in firsts]),
        "first_ms_later": spread([(waits["HTTP"] - waits["gRPC"]) * 1e3 for waits in firsts]),
    }


async def _tenant(system: System) -> Any:
    """As `System.tenant`, where no replica answers what it waits with."""
    await system.tenants.CreateTenant(ipb.CreateTenantRequest(tenant_id="bench"), metadata=system.admin)
    request = ipb.CreateApiKeyRequest(parent="tenants/bench", roles=[ipb.ROLE_CALLER])
    key = rpc.with_key((await system.tenants.CreateApiKey(request, metadata=system.admin)).secret)
    await asyncio.sleep(2)
    return key


def tell(small: dict[str, Any], empty: dict[str, Any]) -> None:
    """Write the tables' rows."""

    def shown(of: dict[str, float], form: str) -> str:
        return f"{of['median']:{form}} ({of['q1']:{form}}–{of['q3']:{form}})"

    pair = small["HTTP of gRPC"]
    rows = [
        [
            f"{name}, {STREAMS} streams",
            shown(small[name]["first_ms"], ".1f"),
            shown(small[name]["tokens_per_second"], ".0f"),
            *(f"{small[name]['cores'][part]['median']:.3f}" for part in ("gateway", "http")),
        ]
        for name in ("gRPC", "HTTP")
    ]
    later, ratio = shown(pair["first_ms_later"], "+.1f"), shown(pair["tokens_per_second"], ".2f")
    rows.append(["HTTP beside gRPC, by round", f"{later} ms", f"× {ratio}", "", ""])
    carried = (shown(empty[part], ".0f") for part in ("gateway", "http"))
    rows.append(["a replica that makes nothing: messages/s of a core", "", "", *carried])
    waits = " and ".join(f"{shown(empty[f'{name} first_ms'], '.1f')} by {name}" for name in ("gRPC", "HTTP"))
    rows.append([f"… one stream at a time: {waits}", f"{shown(empty['first_ms_later'], '+.1f')} ms", "", "", ""])
    write(
        "http",
        f"What HTTP adds to gRPC (Backpack-Small, {tax.PROMPT_TOKENS} + {tax.NEW_TOKENS} tokens, one thread)",
        "python -m tests.bench.over_http",
        ["way", "first token, ms (q1–q3)", "tokens/s (q1–q3)", "cores: gateway", "cores: http"],
        rows,
        {"small": small, "empty": empty},
    )


def _serve(state: Path, *parts: str) -> tuple[Processes, str, dict[str, psutil.Process]]:
    interventions.mint_key(Settings(state=state).key_file("replica"))
    processes, http = Processes(state, slots=STREAMS), f"127.0.0.1:{free_port()}"
    for part in parts:
        processes.start(part, BACKPACK_HTTP_ADDRESS=http, BACKPACK_LOG_LEVEL="warning")
    return processes, http, {part: psutil.Process(processes.pid(part)) for part in ("gateway", "http") if part in parts}


def main() -> None:
    torch.set_num_threads(1)
    os.environ["BACKPACK_PRECISION"] = "auto"  # as served; tests have float32
    empty_state = Path(tempfile.mkdtemp())
    processes, http, _ = _serve(empty_state, "interventions", "directory")
    heard, told = multiprocessing.get_context("spawn").Pipe(duplex=False)
    endless = multiprocessing.get_context("spawn").Process(
        target=gateway._replica, args=(processes.settings, told), daemon=True
    )
    try:
        endless.start()
        heard.recv()
        for part in ("gateway", "http"):
            processes.start(part, BACKPACK_HTTP_ADDRESS=http, BACKPACK_LOG_LEVEL="warning")
        measured = {part: psutil.Process(processes.pid(part)) for part in ("gateway", "http")}
        empty = asyncio.run(before_nothing(processes.settings, http, measured))
    finally:
        endless.kill()
        processes.stop()
    state = Path(tempfile.mkdtemp())
    os.environ["BACKPACK_MODEL"] = str(tax._small(state / "model"))
    started = time.perf_counter()
    processes, http, measured = _serve(state, "interventions", "directory", "inference", "gateway", "http")
    console.print(f"started in {time.perf_counter() - started:.0f} s")
    try:
        tell(asyncio.run(on_small(processes.settings, http, measured)), empty)
    finally:
        processes.stop()


if __name__ == "__main__":
    main()
