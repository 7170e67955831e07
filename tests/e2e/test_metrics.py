"""What Prometheus reads off a system that serves."""

from __future__ import annotations

import asyncio
import errno
import queue
import socket
import socketserver
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import pytest_asyncio
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import sync_pb2 as spb
from backpack_serving.observability import exposition, metrics
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import System, copy, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The story of the king and the"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(system: System) -> str:
    assert system.metrics is not None
    return exposition.listen(system.metrics.registry, "127.0.0.1:0")


async def _scrape(address: str) -> Mapping[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample over HTTP, by name and labels."""

    def get() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
            return str(answer.read().decode())

    return _samples(await asyncio.to_thread(get))


def _samples(text: str) -> Mapping[tuple[str, frozenset[tuple[str, str]]], float]:
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, frozenset(s.labels.items())): s.value for s in samples}


def _of(samples: Mapping[Any, float], name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


async def test_a_loaded_system_can_be_read(system: System, address: str) -> None:
    key = await system.tenant(copy("king", "ship"))
    streams = await asyncio.gather(*(system.stream(key, PROMPT, max_tokens=20, seed=n) for n in range(6)))
    tenant = streams[0][0].served.tenant
    with pytest.raises(grpc.aio.AioRpcError):
        await system.stream(key, "", max_tokens=20)
    samples = await _scrape(address)
    made = sum(len(part.tokens) for stream in streams for part in stream)
    prompt = streams[0][-1].usage.prompt_tokens
    call = {"part": "gateway", "method": "GenerateStream"}
    assert _of(samples, "backpack_calls_total", **call, code="OK") == 6
    assert _of(samples, "backpack_calls_total", **call, code="INVALID_ARGUMENT") == 1
    assert _of(samples, "backpack_errors_total", part="gateway", reason="EMPTY") == 1
    assert _of(samples, "backpack_calls_running", **call) == 0
    assert _of(samples, "backpack_call_seconds_count", **call) == 7
    assert _of(samples, "backpack_time_to_first_token_seconds_count") == 6
    assert _of(samples, "backpack_time_per_output_token_seconds_count") == 6
    assert _of(samples, "backpack_handoff_seconds_count") == 6
    assert _of(samples, "backpack_tokens_total", tenant=tenant, kind="generated") == made
    assert _of(samples, "backpack_tokens_total", tenant=tenant, kind="prompt") == 6 * prompt
    assert _of(samples, "backpack_replicas") == 1
    assert 0 <= _of(samples, "backpack_staleness_seconds") < 10
    assert _of(samples, "backpack_replica_tokens_total", kind="generated") == made
    assert _of(samples, "backpack_replica_slots") == 4
    assert _of(samples, "backpack_replica_cache_capacity_tokens") == 4 * 512
    assert _of(samples, "backpack_replica_releases") >= 1
    assert _of(samples, "backpack_replica_report_seconds_count") >= 1
    # Six prompts that are the same: those that come later use what was computed first.
    assert _of(samples, "backpack_replica_prompts_total") == 6
    hits = _of(samples, "backpack_replica_prefix_hits_total")
    assert 2 <= hits < 6
    assert _of(samples, "backpack_replica_reused_tokens_total") == hits * (prompt - 1)
    assert _of(samples, "backpack_calls_total", part="interventions", method="CreateTenant", code="OK") == 1


async def test_a_running_stream_shows_in_slots_and_caches(system: System, address: str) -> None:
    key = await system.tenant()
    request = pb.GenerateStreamRequest(
        prompt=pb.Prompt(text=PROMPT),
        sampling=pb.Sampling(max_tokens=490, seed=1, samples=4, ignore_end_of_text=True),
    )
    call = system.inference.GenerateStream(request, metadata=key)
    await call.read()
    assert system.metrics is not None
    for _ in range(20):  # while the stream goes on: a replica's load is counted every 50 ms
        samples = _samples(generate_latest(system.metrics.registry).decode())
        if _of(samples, "backpack_replica_running") > 0:
            break
        await asyncio.sleep(0.01)
    assert 1 <= _of(samples, "backpack_replica_running") <= 4
    assert _of(samples, "backpack_replica_tokens_in_flight") > 100
    assert _of(samples, "backpack_replica_cache_tokens") > 0
    assert _of(samples, "backpack_calls_running", part="gateway", method="GenerateStream") == 1
    call.cancel()
    for _ in range(600):
        samples = await _scrape(address)
        labels = {"part": "gateway", "method": "GenerateStream"}
        if _of(samples, "backpack_calls_running", **labels) == 0:
            break
        await asyncio.sleep(0.05)
    assert _of(samples, "backpack_calls_total", **labels, code="CANCELLED") == 1


async def test_names_are_all_that_is_ever_told(address: str) -> None:
    told = {name for name, _ in await _scrape(address)}
    created = {name for name in told if name.endswith("_created")}
    assert told - created <= metrics.names()


async def test_a_port_that_is_taken_gives_way_to_the_next(address: str) -> None:
    other = exposition.listen(metrics.Metrics().registry, address)
    host, _, port = address.rpartition(":")
    assert other.startswith(f"{host}:")
    assert 0 < int(other.rpartition(":")[2]) - int(port) < 16


async def test_a_listener_without_descriptors_waits_between_its_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asked again and again, for as long as clients held them all: a core, of those that compute."""
    short, accept, steps = threading.Event(), socketserver.TCPServer.get_request, queue.SimpleQueue[str]()

    def get_request(server: socketserver.TCPServer) -> Any:
        if short.is_set():
            steps.put("try")
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(server)

    monkeypatch.setattr(socketserver.TCPServer, "get_request", get_request)
    monkeypatch.setattr(exposition, "time", SimpleNamespace(sleep=lambda _: steps.put("pause")))
    short.set()
    address = exposition.listen(metrics.Metrics().registry, "127.0.0.1:0")
    scrape = asyncio.create_task(_scrape(address))
    seen = [await asyncio.to_thread(steps.get, timeout=30) for _ in range(6)]
    assert seen == ["try", "pause"] * 3
    short.clear()
    assert await scrape


async def test_metrics_are_told_over_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    address = exposition.listen(metrics.Metrics().registry, "[::1]:0")
    assert address.startswith("[::1]:")
    assert await _scrape(address)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("localhost", "give host:port"),
        ("127.0.0.1:99999", "give host:port"),
        ("203.0.113.5:9100", r"203.0.113.5:9100 \(BACKPACK_METRICS_ADDRESS\): Cannot assign"),
    ],
)
async def test_an_address_that_nobody_can_listen_on_is_refused_with_the_reason(address: str, says: str) -> None:
    with pytest.raises((ValueError, OSError), match=says):
        exposition.listen(metrics.Metrics().registry, address)


async def test_names_are_for_ever() -> None:
    """Dashboards and alerts ask for these; who renames one renames it there."""
    ours = {name for name in metrics.names() if name.startswith("backpack_")}
    plain = {name for name in ours if not name.endswith(("_bucket", "_sum", "_count"))}
    histograms = {name.removesuffix("_bucket") for name in ours if name.endswith("_bucket")}
    assert plain == {
        "backpack_calls_running",
        "backpack_calls_total",
        "backpack_errors_total",
        "backpack_replica_cache_capacity_tokens",
        "backpack_replica_cache_tokens",
        "backpack_replica_preemptions_total",
        "backpack_replica_prefix_hits_total",
        "backpack_replica_prompts_total",
        "backpack_replica_queued",
        "backpack_replica_releases",
        "backpack_replica_reused_tokens_total",
        "backpack_replica_running",
        "backpack_replica_slots",
        "backpack_replica_tokens_in_flight",
        "backpack_replica_tokens_total",
        "backpack_replicas",
        "backpack_second_tries_total",
        "backpack_staleness_seconds",
        "backpack_tenant_requests_total",
        "backpack_tokens_total",
    }
    assert histograms == {
        "backpack_call_seconds",
        "backpack_handoff_seconds",
        "backpack_replica_release_seconds",
        "backpack_replica_report_seconds",
        "backpack_time_per_output_token_seconds",
        "backpack_time_to_first_token_seconds",
    }


async def test_releases_that_a_replica_dropped_are_not_listed(tmp_path: Path) -> None:
    """What was told counted for as long as the stream lived, and what requests brought not at all."""
    async with running(tmp_path, slots=4, releases=1) as system:
        key = await system.tenant()
        for source in ("ship", "nurse", "sea", "war", "law"):
            await system.activate(key, await system.release(key, copy("king", source)))
            await system.known(key)
        assert system.metrics is not None

        async def listed() -> tuple[int, float]:
            readers = await system.fleet.ListReaders(spb.ListReadersRequest(), metadata=system.admin)
            (told,) = [r.releases for r in readers.readers if r.kind == spb.READER_KIND_REPLICA]
            return told, _of(_samples(generate_latest(system.metrics.registry).decode()), "backpack_replica_releases")

        for _ in range(100):
            told, held = await listed()
            if told == held:
                break
            await asyncio.sleep(0.1)
        assert told == held
