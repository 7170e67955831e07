"""Who leaves, what a drain ends, limits, CORS, TLS: the HTTP server in this process, before a whole system."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import pytest_asyncio
import trustme
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_serving.auth.tls import Tls
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.sequence import Output
from backpack_serving.errors import Unauthenticated, Unavailable
from backpack_serving.http import bootstrap, caller, listener, probe
from backpack_serving.observability import tracing
from backpack_serving.observability.metrics import Metrics

from tests.e2e.conftest import Metadata, System, copy, running
from tests.http.conftest import PROMPT
from tests.waiting import PATIENCE, eventually

LONG = {"model": "live", "prompt": PROMPT, "max_tokens": 450, "ignore_end_of_text": True, "stream": True}


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes ten milliseconds at least, so that a stream lasts."""
    step = Engine.step

    def slowly(self: Engine) -> list[Output]:
        time.sleep(0.01)
        return step(self)

    monkeypatch.setattr(Engine, "step", slowly)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    async with running(tmp_path_factory.mktemp("state"), slots=4, http_address="") as system:
        yield system


@asynccontextmanager
async def http(system: System, **settings: Any) -> AsyncIterator[tuple[bootstrap.HttpServer, Metrics]]:
    addresses = {
        "http_address": "127.0.0.1:0",
        "gateway_address": system.gateway,
        "interventions_address": system.interventions,
    }
    metrics = Metrics()
    server = await bootstrap.start(system.settings.model_copy(update={**addresses, **settings}), metrics)
    try:
        yield server, metrics
    finally:
        await server.stop()


def headers(key: Metadata) -> dict[str, str]:
    return {"content-type": "application/json", **dict(key)}


def counted(metrics: Metrics | None, part: str, method: str, code: str) -> float:
    assert metrics is not None
    labels = {"part": part, "method": method, "code": code}
    return metrics.registry.get_sample_value("backpack_calls_total", labels) or 0


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_cancels_its_call(system: System, stream: bool) -> None:
    key, method = await system.tenant(), "GenerateStream" if stream else "Generate"
    async with http(system) as (server, metrics), httpx.AsyncClient(base_url=f"http://{server.address}") as client:
        before = counted(system.metrics, "gateway", method, "CANCELLED")
        if stream:
            async with client.stream("POST", "/v1/completions", json=LONG, headers=headers(key)) as answer:
                assert answer.status_code == 200
                await anext(answer.aiter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/completions", json={**LONG, "stream": False}, headers=headers(key), timeout=0.5)

        async def cancelled() -> bool:
            return (
                counted(metrics, "http", "Completions", "CANCELLED") == 1
                and counted(system.metrics, "gateway", method, "CANCELLED") == before + 1
            )

        await eventually(cancelled)


async def test_who_leaves_a_connect_stream_cancels_its_call(system: System) -> None:
    key, before = await system.tenant(), counted(system.metrics, "gateway", "GenerateStream", "CANCELLED")
    asked = json.dumps({"prompt": {"text": PROMPT}, "sampling": {"maxTokens": 450, "ignoreEndOfText": True}}).encode()
    body = b"\0" + len(asked).to_bytes(4, "big") + asked
    async with http(system) as (server, metrics), httpx.AsyncClient(base_url=f"http://{server.address}") as client:
        kind = {**headers(key), "content-type": "application/connect+json"}
        path = "/backpack.v1.InferenceService/GenerateStream"
        async with client.stream("POST", path, content=body, headers=kind) as answer:
            assert answer.status_code == 200
            await anext(answer.aiter_bytes())

        async def cancelled() -> bool:
            return (
                counted(metrics, "http", "GenerateStream", "CANCELLED") == 1
                and counted(system.metrics, "gateway", "GenerateStream", "CANCELLED") == before + 1
            )

        await eventually(cancelled)


async def test_a_drain_finishes_streams_and_refuses_new_requests(system: System) -> None:
    key = await system.tenant()
    async with (
        http(system, drain=60.0) as (server, _),
        httpx.AsyncClient(base_url=f"http://{server.address}") as client,
    ):
        asked = {**LONG, "max_tokens": 50}
        async with client.stream("POST", "/v1/completions", json=asked, headers=headers(key)) as answer:
            lines = answer.aiter_lines()
            said = [await anext(lines)]
            stopping = asyncio.create_task(server.stop())
            await eventually(lambda: _refused(server.address))
            said += [line async for line in lines]
        await stopping
    assert said[-2:] == ["data: [DONE]", ""]
    tokens = [json.loads(line.removeprefix("data: ")) for line in said if line.startswith("data: {")]
    assert tokens[-1]["choices"][0]["finish_reason"] == "length"


async def _refused(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def test_what_a_drain_ends_is_told_to_try_again(system: System) -> None:
    key = await system.tenant()
    async with (
        http(system, drain=0.0) as (server, metrics),
        httpx.AsyncClient(base_url=f"http://{server.address}") as client,
    ):
        connect = {"prompt": {"text": PROMPT}, "sampling": {"maxTokens": 450, "ignoreEndOfText": True}}
        whole = asyncio.create_task(
            client.post("/v1/completions", json={**LONG, "stream": False}, headers=headers(key), timeout=60)
        )
        unary = asyncio.create_task(
            client.post("/backpack.v1.InferenceService/Generate", json=connect, headers=headers(key), timeout=60)
        )
        async with client.stream("POST", "/v1/completions", json=LONG, headers=headers(key)) as answer:
            lines = answer.aiter_lines()
            said = [await anext(lines)]

            async def runs() -> bool:
                running = metrics.registry.get_sample_value
                names = ("Completions", "Generate")
                return [running("backpack_calls_running", {"part": "http", "method": name}) for name in names] == [2, 1]

            await eventually(runs)
            stopping = asyncio.create_task(server.stop())
            said += [line async for line in lines]
        refused, second = await whole, await unary
        await stopping
    last = json.loads(said[-2].removeprefix("data: "))
    assert last["error"]["code"] == "DRAINING"
    assert "data: [DONE]" not in said
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "DRAINING")
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("1", "100")
    assert (second.status_code, second.json()["code"], second.headers["backpack-reason"]) == (
        503,
        "unavailable",
        "DRAINING",
    )


async def test_a_request_on_a_connection_that_is_kept_is_refused_while_it_drains(system: System) -> None:
    key = await system.tenant()
    async with http(system) as (server, _), httpx.AsyncClient(base_url=f"http://{server.address}") as client:
        server.listener.calls.draining = True
        answer = await client.post("/v1/completions", json=LONG, headers=headers(key))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "DRAINING")
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503


async def test_headers_have_a_limit_and_a_time(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    async with http(system) as (server, _):
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: " + b"a" * (listener.HEAD_BYTES + 1))
        assert (await reader.readline()).startswith(b"HTTP/1.1 431")
        writer.close()
        reader, writer = await asyncio.open_connection(host, int(port))
        head = b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: " + b"a" * (listener.HEAD_BYTES // 2) + b"\r\n\r\n"
        for _ in range(4):  # each counts for itself
            writer.write(head)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            while await reader.readline() != b"\r\n":
                pass
            assert await reader.readexactly(len('{"status":"SERVING"}'))
        writer.close()
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/models HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")
        async with asyncio.timeout(PATIENCE):  # trailers count, too: it is closed before they end
            with suppress(ConnectionError):
                for at in range(40):
                    writer.write(b"x%d: %s\r\n" % (at, b"a" * 1024))
                await reader.read()
        writer.close()
        monkeypatch.setattr(listener, "HEAD_SECONDS", 0.02)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: ")
        assert await reader.read() == b""
        writer.close()


async def test_bodies_have_a_limit_and_a_type(system: System) -> None:
    key = await system.tenant()
    async with http(system) as (server, metrics), httpx.AsyncClient(base_url=f"http://{server.address}") as client:
        large = json.dumps({"model": "live", "prompt": "a" * 2**20}).encode()
        answer = await client.post("/v1/completions", content=large, headers=headers(key))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "BODY_TOO_LARGE")
        answer = await client.post(
            "/v1/completions", content=b"{}", headers={**headers(key), "content-type": "text/plain"}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "NOT_JSON_TYPE")
        answer = await client.get("/v1/completions", headers=headers(key))
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        answer = await client.get("/v1/nothing/here", headers=headers(key))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "NO_SUCH_PATH")
        assert counted(metrics, "http", "Completions", "INVALID_ARGUMENT") == 3
        assert counted(metrics, "http", "Other", "NOT_FOUND") == 1


async def test_pages_of_other_origins_may_call_where_they_are_named(system: System) -> None:
    key, asking = await system.tenant(), {"origin": "https://studio.example"}
    preflight = {**asking, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with http(system) as (server, _), httpx.AsyncClient(base_url=f"http://{server.address}") as client:
        answer = await client.options("/v1/completions", headers=preflight)
        assert answer.status_code == 405
        answer = await client.get("/v1/models", headers={**headers(key), **asking})
        assert "access-control-allow-origin" not in answer.headers
    origins = frozenset({"https://studio.example"})
    async with (
        http(system, http_origins=origins) as (server, _),
        httpx.AsyncClient(base_url=f"http://{server.address}") as client,
    ):
        answer = await client.options("/v1/completions", headers=preflight)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://studio.example")
        answer = await client.get("/v1/models", headers={**headers(key), **asking})
        assert answer.headers["access-control-allow-origin"] == "https://studio.example"
        refused = await client.get("/v1/models", headers=asking)  # its reason may be read, too
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://studio.example")
        answer = await client.options("/v1/completions", headers={**preflight, "origin": "https://other.example"})
        assert answer.status_code == 400


async def test_without_a_gateway_it_lives_and_isnt_ready(system: System) -> None:
    async with (
        http(system, gateway_address="127.0.0.1:1") as (server, _),
        httpx.AsyncClient(base_url=f"http://{server.address}") as client,
    ):
        assert (await client.get("/healthz")).json() == {"status": "SERVING"}
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "NOT_SERVING")
        key = await system.tenant()
        answer = await client.post("/v1/completions", json={**LONG, "stream": True}, headers=headers(key))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "TRANSPORT")


async def test_certificates_are_read_again(system: System, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    def renew(name: str) -> None:
        made = authority.issue_cert(name, "127.0.0.1")
        made.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
        made.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))

    renew("first.example")
    tls: Any = {"tls_certificate": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    trust = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    async with http(system, **tls) as (server, _):

        async def names() -> list[str]:
            host, _, port = server.address.rpartition(":")
            _, writer = await asyncio.open_connection(host, int(port), ssl=trust)
            certificate = writer.get_extra_info("ssl_object").getpeercert()
            writer.close()
            return [name for kind, name in certificate["subjectAltName"] if kind == "DNS"]

        assert await names() == ["first.example"]
        async with httpx.AsyncClient(verify=trust) as client:
            assert (await client.get(f"https://{server.address}/healthz")).status_code == 200
        by_name = Tls(authorities=tmp_path / "ca.pem", name="first.example")  # as containers' health checks ask

        async def serves() -> bool:
            return await asyncio.to_thread(probe.ready, f"https://{server.address}", 5, by_name) == (True, "SERVING")

        await eventually(serves)  # the gateway says so twice a second
        with pytest.raises(Unavailable):
            await asyncio.to_thread(probe.ready, f"https://{server.address}", 5, replace(by_name, name="other.example"))
        renew("second.example")
        assert await names() == ["second.example"]


async def test_a_user_is_in_the_same_half_of_a_canary_as_over_grpc(system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    second = await system.release(key, copy("king", "nurse"))
    channel = (await system.releases.GetChannel(ipb.GetChannelRequest(name="channels/live"), metadata=key)).channel
    started = ipb.StartCanaryRequest(channel="channels/live", release=second, permille=500, salt="s", etag=channel.etag)
    position = (await system.releases.StartCanary(started, metadata=key)).position
    halves = set()
    async with http(system) as (server, _), httpx.AsyncClient(base_url=f"http://{server.address}") as client:
        for user in map(str, range(12)):
            request = pb.ScoreRequest(text=pb.Prompt(text=PROMPT), request_key=user, min_revision=position)
            theirs = (await system.inference.Score(request, metadata=key)).served
            asked = {"model": "live", "prompt": PROMPT, "max_tokens": 1, "echo": True, "logprobs": 0, "user": user}
            answer = await client.post("/v1/completions", json=asked, headers=headers(key))
            ours = answer.json()["choices"][0]["served"]
            assert (ours["canary"], ours["release"]) == (theirs.canary, theirs.release)
            halves.add(theirs.canary)
    assert halves == {True, False}


async def test_a_request_is_a_span_whose_child_is_the_gateways(system: System) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    key, exported, provider = await system.tenant(), InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    tracing.use(provider)
    try:
        async with http(system) as (server, _), httpx.AsyncClient(base_url=f"http://{server.address}") as client:
            trace = "0af7651916cd43dd8448eb211c80319c"
            told = {**headers(key), "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
            asked = {"model": "live", "prompt": PROMPT, "max_tokens": 1}
            assert (await client.post("/v1/completions", json=asked, headers=told)).status_code == 200
    finally:
        tracing.use(None)
    spans: dict[str, list[Any]] = {}
    for span in exported.get_finished_spans():
        spans.setdefault(span.name, []).append(span)
    (own,) = spans["openai/Completions"]
    assert own.context.trace_id == int(trace, 16)
    parents = {span.parent.span_id for span in spans["backpack.v1.InferenceService/Generate"]}
    assert own.context.span_id in parents


@pytest.mark.parametrize(
    "given", [{}, {"authorization": ""}, {"authorization": "Basic YTpi"}, {"authorization": "Bearer "}]
)
async def test_nothing_goes_on_without_a_credential(given: dict[str, str]) -> None:
    """The connection to the gateway may have a certificate that stands for somebody."""
    with pytest.raises(Unauthenticated) as refused:
        caller.metadata(given)
    assert refused.value.reason == "NO_CREDENTIAL"
    with pytest.raises(Unauthenticated) as refused:
        caller.metadata({"authorization": "Bearer é"})
    assert refused.value.reason == "MALFORMED_KEY"
