"""Logs and spans: who asked, which request, and never what, unless the operator wants it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_serving.observability import telemetry, tracing
from backpack_serving.settings import Settings
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests import commands
from tests.e2e.conftest import running

SECRET = "The story of a very secret queen"


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The lines that were logged, as JSON."""
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    telemetry.configure(Settings(log_format="json"), "test")
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines() if line.startswith("{")]
    structlog.reset_defaults()


@pytest.mark.parametrize("log_prompts", [False, True])
async def test_logs_tell_who_and_which_and_the_prompt_only_if_asked(
    tmp_path: Path, logged: Callable[[], list[dict[str, Any]]], log_prompts: bool
) -> None:
    async with running(tmp_path, slots=4, log_prompts=log_prompts) as system:
        key = await system.tenant()
        request = pb.GenerateStreamRequest(prompt=pb.Prompt(text=SECRET), sampling=pb.Sampling(max_tokens=2))
        call = system.inference.GenerateStream(request, metadata=(*key, ("x-request-id", "ticket-7")))
        parts = [part async for part in call]
        tenant = parts[0].served.tenant
        assert dict(await call.trailing_metadata())["x-request-id"] == "ticket-7"
        request.sampling.max_tokens = 1000
        call = system.inference.GenerateStream(request, metadata=(*key, ("x-request-id", "no word")))
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
            await call.read()
        made_up = dict(await call.trailing_metadata())["x-request-id"]
        asked, unpatched = pb.Prompt(text=SECRET), pb.ReleaseChoice(number=0)
        sampling = pb.Sampling(max_tokens=1)
        await system.inference.Generate(pb.GenerateRequest(prompt=asked, sampling=sampling), metadata=key)
        await system.inference.Score(pb.ScoreRequest(text=asked), metadata=key)
        await system.inference.Explain(pb.ExplainRequest(prompt=asked), metadata=key)
        await system.inference.Compare(pb.CompareRequest(prompt=asked, releases=[unpatched]), metadata=key)
    lines = logged()
    calls = [line for line in lines if line["event"] == "call" and line["method"].endswith("/GenerateStream")]
    ours = [line for line in calls if line["request_id"] == "ticket-7"]
    assert len(ours) == 2, "the gateway and the replica, by the same id"
    assert all((line["tenant"], line["code"]) == (tenant, "OK") and line["seconds"] > 0 for line in ours)
    (refused,) = (line for line in calls if line["request_id"] == made_up)
    assert (refused["code"], refused["reason"], refused["tenant"]) == ("INVALID_ARGUMENT", "TOO_LONG", tenant)
    text = json.dumps(lines)
    assert ("secret queen" in text) is log_prompts
    told = {line["method"].rpartition("/")[2] for line in lines if line.get("prompt") == SECRET}
    everyone = {"GenerateStream", "Generate", "Score", "Explain", "Compare"}
    assert told == (everyone if log_prompts else set())
    assert key[0][1].split("_")[2] not in text, "nor a key's secret"
    assert "/Report" not in text


async def test_a_connection_that_is_made_anew_for_its_age_is_no_warning(
    tmp_path: Path, logged: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reader's is, each half hour."""
    monkeypatch.setattr("backpack_serving.rpc.server._OPTIONS", (("grpc.max_connection_age_grace_ms", 500),))
    async with running(tmp_path, slots=4, connection_age=0.5):
        async with asyncio.timeout(30):
            while not (lost := [line for line in logged() if line.get("reason") == "max connection age"]):
                await asyncio.sleep(0.1)
    assert {line["level"] for line in lost} == {"info"}


async def test_what_the_database_refuses_is_logged_without_what_was_written(
    tmp_path: Path, logged: Callable[[], list[dict[str, Any]]]
) -> None:
    async with running(tmp_path, slots=4) as system:
        key = await system.tenant()
        with contextlib.closing(sqlite3.connect(tmp_path / "interventions.db")) as database:
            database.execute("CREATE TRIGGER t BEFORE INSERT ON patches BEGIN SELECT RAISE(ABORT, 'no more'); END")
        request = ipb.CreatePatchRequest(patch_id="q", description=SECRET)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await system.patches.CreatePatch(request, metadata=key)
    assert refused.value.details() == "an internal error; the server's log has more"
    (line,) = (line for line in logged() if line["event"] == "handler failed")
    assert "the database refuses what the rules allowed: no more" in line["exception"]
    assert "secret queen" not in line["exception"]


async def test_why_the_database_fails_is_for_the_log_and_not_for_callers(
    tmp_path: Path, logged: Callable[[], list[dict[str, Any]]]
) -> None:
    """Of PostgreSQL it is where it listens, and as which role it is called; strangers were told."""
    async with running(tmp_path, slots=4) as system:
        key = await system.tenant()
        with contextlib.closing(sqlite3.connect(tmp_path / "interventions.db")) as database:
            database.execute("ALTER TABLE patches RENAME TO others")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await system.patches.ListPatches(ipb.ListPatchesRequest(), metadata=key)
    assert (failed.value.code().name, failed.value.details()) == ("UNAVAILABLE", "the database failed")
    why = {line["why"] for line in logged() if line["event"] == "call refused"}
    assert why == {f"{tmp_path}/interventions.db: no such table: patches"}


@pytest.mark.parametrize("form", ["json", "console"])
def test_what_libraries_log_has_the_form_that_was_chosen(form: str) -> None:
    """Their tracebacks were lines of text between those of JSON."""
    code = f"""
import logging
from backpack_serving.observability import telemetry
from backpack_serving.settings import Settings
telemetry.configure(Settings(log_format={form!r}), "test")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("asyncio").exception("task %s failed", 7)
logging.getLogger("asyncio").debug("not asked for")
"""
    path = os.pathsep.join(sys.path)
    words, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": path, "NO_COLOR": "1"}
    said = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stderr
    if form == "json":
        line = json.loads(said)
        assert (line["event"], line["level"]) == ("task 7 failed", "error")
        assert line["exception"].endswith("ZeroDivisionError: division by zero")
    else:
        assert re.match(r"\d\d:\d\d:\d\d \[error    \] task 7 failed", said)
    assert "not asked for" not in said


def test_what_callers_do_leaves_no_traceback_and_no_key_in_the_log() -> None:
    """gRPC's clients don't send such metadata; curl does."""
    code = """
import asyncio, logging
from backpack_serving.observability import telemetry
from backpack_serving.inference import directory
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings

METADATA = {
    b":method": b"POST", b":scheme": b"http", b":authority": b"x",
    b":path": b"/backpack.v1.DirectoryService/Report",
    b"content-type": b"application/grpc", b"te": b"trailers", b"authorization": b"Bearer queen\\xff",
}

def frame(kind, flags, stream, payload):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

async def main():
    telemetry.configure(Settings(log_format="json"), "test")
    server = await directory.serve(Settings(directory_address="127.0.0.1:0"), Metrics())
    host, port = server.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = b"".join(bytes([0, len(k)]) + k + bytes([len(v)]) + v for k, v in METADATA.items())
    writer.write(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + frame(4, 0, 0, b""))
    writer.write(frame(1, 4, 1, head) + frame(0, 1, 1, bytes(5)))
    while True:
        size, kind, flags = int.from_bytes(await reader.readexactly(3), "big"), *await reader.readexactly(2)
        await reader.readexactly(4 + size)
        if kind == 1 and flags & 1:  # the trailers
            break
    logging.getLogger("grpc._cython.cygrpc").error("ExecuteBatchError raised in core by servicer method [/x]")
    writer.close()
    await server.stop(0)

asyncio.run(main())
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    assert said.stderr == ""


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracing.use(provider)
    yield kept
    tracing.use(None)
    provider.shutdown()


async def test_spans_lead_from_the_gateway_to_the_engine(tmp_path: Path, spans: InMemorySpanExporter) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with running(tmp_path, slots=4) as system:
        key = await system.tenant()
        request = pb.GenerateStreamRequest(prompt=pb.Prompt(text=SECRET), sampling=pb.Sampling(max_tokens=2))
        call = system.inference.GenerateStream(request, metadata=(*key, ("traceparent", parent)))
        async for _ in call:
            pass
    trace = [span for span in spans.get_finished_spans() if f"{span.context.trace_id:032x}" in parent]

    def one(name: str, under: int) -> ReadableSpan:
        (found,) = (s for s in trace if s.name == name and s.parent is not None and s.parent.span_id == under)
        return found

    method = "backpack.v1.InferenceService/GenerateStream"
    gateway = one(method, int("b7ad6b7169203331", 16))
    replica = one(method, gateway.context.span_id)
    engine = one("engine", replica.context.span_id)
    assert dict(engine.attributes or {})["samples"] == 1
    assert [event.name for event in engine.events] == ["first token"]
    assert len(trace) == 3
    assert "secret" not in "".join(span.to_json() for span in spans.get_finished_spans())


def test_spans_are_off_by_default() -> None:
    assert Settings().otel_endpoint == ""
    assert tracing.headers() == ()


async def test_a_collector_that_is_away_is_not_waited_for_at_the_end() -> None:
    """Each attempt at the last spans waits twice as long as the one before: a process ended ten seconds later."""
    attempts = []

    class Away(trace_service_pb2_grpc.TraceServiceServicer):
        async def Export(self, request: Any, context: Any) -> None:
            attempts.append(request)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Away(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    program = (
        f"from backpack_serving.observability import tracing; tracing.configure('http://127.0.0.1:{port}', 'test')\n"
        "with tracing.span('last'): pass"
    )
    answer = await commands.run_command(sys.executable, "-c", program)
    assert answer.returncode == 0, answer.stderr
    await server.stop(None)
    assert 1 <= len(attempts) <= 2
