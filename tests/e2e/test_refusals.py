"""Requests that are refused, from end to end: each with a reason, the offending value and the fix."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_proto.v1 import sync_pb2 as spb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError

from tests.e2e.conftest import Metadata, System, copy

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The story of the king and the"

Call = Callable[[System, Metadata], Awaitable[Any]]


def _generate(**fields: Any) -> Call:
    fields = {"prompt": pb.Prompt(text=PROMPT), **fields}
    return lambda system, key: system.inference.Generate(pb.GenerateRequest(**fields), metadata=key)


def _sampling(**fields: Any) -> Call:
    return _generate(sampling=pb.Sampling(**fields))


def _tokenize(text: str) -> Call:
    return lambda system, key: system.inference.Tokenize(pb.TokenizeRequest(text=text), metadata=key)


def _ids(*ids: int) -> pb.Prompt:
    return pb.Prompt(tokens=pb.TokenIds(ids=ids))


@pytest.mark.parametrize(
    ("call", "code", "reason", "says"),
    [
        (_generate(prompt=pb.Prompt(text="")), "INVALID_ARGUMENT", "EMPTY", "give a text or token ids"),
        (_generate(prompt=_ids()), "INVALID_ARGUMENT", "EMPTY", "prompt"),
        (_generate(prompt=_ids(1, 99999)), "INVALID_ARGUMENT", "UNKNOWN_TOKEN", "99999"),
        (_generate(prompt=_ids(*[5] * 513)), "INVALID_ARGUMENT", "TOO_LONG", "513 tokens; the context holds 512"),
        (_generate(prompt=_ids(*[5] * 512)), "INVALID_ARGUMENT", "TOO_LONG", "together at most 512"),
        (_sampling(max_tokens=510), "INVALID_ARGUMENT", "TOO_LONG", "together at most 512"),
        (_sampling(max_tokens=-1), "INVALID_ARGUMENT", "OUT_OF_RANGE", "max_tokens"),
        (_sampling(temperature=math.nan), "INVALID_ARGUMENT", "OUT_OF_RANGE", "temperature: nan"),
        (_sampling(temperature=-1), "INVALID_ARGUMENT", "OUT_OF_RANGE", "0 (greedy) or more"),
        (_sampling(top_p=0), "INVALID_ARGUMENT", "OUT_OF_RANGE", "top_p"),
        (_sampling(top_p=math.nan), "INVALID_ARGUMENT", "OUT_OF_RANGE", "top_p"),
        (_sampling(top_k=-1), "INVALID_ARGUMENT", "OUT_OF_RANGE", "top_k"),
        (_sampling(log_probabilities=21), "INVALID_ARGUMENT", "OUT_OF_RANGE", "21; 0 to 20"),
        (_sampling(stop=[""]), "INVALID_ARGUMENT", "OUT_OF_RANGE", "stop[0]"),
        (_generate(channel="nowhere"), "NOT_FOUND", "NO_SUCH_CHANNEL", "activate a release on it"),
        (
            lambda system, key: system.inference.Score(pb.ScoreRequest(text=_ids(5)), metadata=key),
            "INVALID_ARGUMENT",
            "TOO_SHORT",
            "at least two",
        ),
        (
            lambda system, key: system.inference.ListSenses(
                pb.ListSensesRequest(word=pb.Word(text="kingdomless")), metadata=key
            ),
            "INVALID_ARGUMENT",
            "NOT_ONE_TOKEN",
            "'kingdomless' is",
        ),
        (
            lambda system, key: system.inference.Explain(
                pb.ExplainRequest(prompt=pb.Prompt(text=PROMPT), limit=1001), metadata=key
            ),
            "INVALID_ARGUMENT",
            "OUT_OF_RANGE",
            "1001",
        ),
        (
            lambda system, key: system.inference.GetModel(pb.GetModelRequest()),
            "UNAUTHENTICATED",
            "NO_CREDENTIAL",
            "authorization",
        ),
        (
            lambda system, key: system.inference.GetModel(pb.GetModelRequest(), metadata=rpc.with_key("bp_oops")),
            "UNAUTHENTICATED",
            "MALFORMED_KEY",
            "copy it whole",
        ),
        (
            lambda system, key: system.inference.GetModel(pb.GetModelRequest(), metadata=system.admin),
            "PERMISSION_DENIED",
            "MISSING_ROLE",
            "needs caller",
        ),
        (
            lambda system, key: system.tenants.CreateTenant(ipb.CreateTenantRequest(tenant_id="x"), metadata=key),
            "PERMISSION_DENIED",
            "MISSING_ROLE",
            "needs admin",
        ),
        (
            lambda system, key: system.patches.CreateRevision(
                ipb.CreateRevisionRequest(parent="patches/p"), metadata=key
            ),
            "INVALID_ARGUMENT",
            "EMPTY",
            "at least one edit",
        ),
        (
            lambda system, key: system.patches.CreateRevision(
                ipb.CreateRevisionRequest(parent="patches/p", edits=[copy("king", "king")]), metadata=key
            ),
            "INVALID_ARGUMENT",
            "ZERO_EFFECT",
            "onto themselves",
        ),
        (
            lambda system, key: system.patches.CreateRevision(
                ipb.CreateRevisionRequest(parent="patches/none", edits=[copy("king", "ship")]), metadata=key
            ),
            "NOT_FOUND",
            "NO_SUCH_PATCH",
            "create the patch first",
        ),
        (
            lambda system, key: system.patches.GetRevision(
                ipb.GetRevisionRequest(name="patches/p/revisions/x"), metadata=key
            ),
            "INVALID_ARGUMENT",
            "BAD_NAME",
            "'x' is no number",
        ),
        (
            lambda system, key: system.patches.GetRevision(
                ipb.GetRevisionRequest(name="tenants/other/patches/p/revisions/1"), metadata=key
            ),
            "NOT_FOUND",
            "NOT_YOURS",
            "isn't a resource of",
        ),
        (
            lambda system, key: system.releases.Activate(
                ipb.ActivateRequest(channel="channels/live", release=0, etag="stale"), metadata=key
            ),
            "ABORTED",
            "STALE_ETAG",
            "Read it again",
        ),
        (
            lambda system, key: system.releases.ListReleases(ipb.ListReleasesRequest(page_token="!"), metadata=key),
            "INVALID_ARGUMENT",
            "BAD_PAGE_TOKEN",
            "not from a page",
        ),
        (
            lambda system, key: _watch(system, "cd" * 32),
            "FAILED_PRECONDITION",
            "WRONG_MODEL",
            "cdcdcdcdcdcd",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.replace("_", "").isupper() else "",
)
async def test_bad_input_is_refused_with_the_value_and_the_fix(
    system: System, call: Call, code: str, reason: str, says: str
) -> None:
    key = await _some_tenant(system)
    with pytest.raises(ServiceError) as refused, rpc.errors():
        await call(system, key)
    assert (refused.value.code, refused.value.reason) == (code, reason)
    assert says in refused.value.message
    assert "Traceback" not in refused.value.message


_known: dict[int, Metadata] = {}


async def _some_tenant(system: System) -> Metadata:
    if id(system) not in _known:
        _known[id(system)] = await system.tenant()
    return _known[id(system)]


async def _watch(system: System, fingerprint: str) -> None:
    hello = spb.Hello(kind=spb.READER_KIND_GATEWAY, incarnation="x", model_fingerprint=fingerprint)
    async for _ in system.sync.Sync(iter([spb.SyncRequest(hello=hello)]), metadata=system.replica):
        return


@pytest.mark.parametrize("data", [b"\xff\xff", b"\x0a\x02\xff\xff"], ids=["no fields", "no UTF-8"])
async def test_bytes_that_are_no_message_are_the_callers_mistake(
    system: System, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a stream, after its beginning as well: what reads on has to end with it."""
    hello = spb.Hello(
        kind=spb.READER_KIND_GATEWAY, incarnation="x", model_fingerprint=(await _model(system)).fingerprint
    )
    header = ipb.UploadHeader(parent="patches/p", kind=ipb.EDIT_KIND_ADD, size=8)
    header.safetensors.SetInParent()
    streams = {
        "PatchService/UploadRevision": ("stream_unary", ipb.UploadRevisionRequest(header=header)),
        "SyncService/Sync": ("stream_stream", spb.SyncRequest(hello=hello)),
    }
    key = await _some_tenant(system)
    gateway, control = rpc.channel(system.gateway), rpc.channel(system.interventions)
    calls: list[Any] = [
        gateway.unary_unary("/backpack.v1.InferenceService/Generate")(data, metadata=key),
        gateway.unary_stream("/backpack.v1.InferenceService/GenerateStream")(data, metadata=key),
        gateway.unary_unary("/grpc.health.v1.Health/Check")(data),
        control.unary_unary("/backpack.v1.ReleaseService/Activate")(data, metadata=key),
    ]
    for method, (kind, begins) in streams.items():
        who = system.replica if "Sync" in method else key
        sent = begins.SerializeToString()
        for messages in ([data], [sent, data]):
            calls.append(getattr(control, kind)(f"/backpack.v1.{method}")(iter(messages), metadata=who, timeout=60))
    for call in calls:
        with pytest.raises(ServiceError) as refused, rpc.errors():
            if hasattr(call, "__aiter__"):
                _ = [part async for part in call]
            else:
                await call
        assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", "NOT_A_MESSAGE")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    await gateway.close()
    await control.close()


async def _model(system: System) -> pb.GetModelResponse:
    key = await _some_tenant(system)
    return await system.inference.GetModel(pb.GetModelRequest(), metadata=key)


async def test_several_mistakes_are_told_at_once(system: System) -> None:
    key = await _some_tenant(system)
    with pytest.raises(ServiceError) as refused, rpc.errors():
        await _sampling(temperature=-1, top_k=-2, top_p=2)(system, key)
    assert [v.field for v in refused.value.violations] == [
        "sampling.temperature",
        "sampling.top_k",
        "sampling.top_p",
    ]


async def test_a_text_that_no_context_holds_is_refused_before_it_is_read(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding such a one takes a second; a gateway's event loop has better to do."""
    encode, read = Tokenizer.encode, []

    def watched(self: Tokenizer, text: str) -> list[int]:
        read.append((text, threading.current_thread() is threading.main_thread()))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    key, tokenizer = await system.tenant(), Tokenizer.read(system.settings.model / "tokenizer.json")
    most = 512 * tokenizer.longest
    for text in ("ab" * 500_000, "\N{WAVE DASH}" * (most // 3 + 1)):
        for call in (_tokenize(text)(system, key), _generate(prompt=pb.Prompt(text=text))(system, key)):
            with pytest.raises(ServiceError) as refused, rpc.errors():
                await call
            assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", "TOO_LONG")
            assert f"{len(text.encode())} bytes of text; the context's 512 tokens hold at most {most}" in str(
                refused.value
            )
    assert not [text for text, _ in read if len(text) > 100]
    longest = next(token for token in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(token)) == most // 512)
    text = tokenizer.piece(longest) * 512
    answer = await _tokenize(text)(system, key)
    assert "".join(token.text for token in answer.tokens) == text
    assert [on_loop for found, on_loop in read if found == text] == [False]


async def test_a_full_queue_says_when_to_come_back(system: System) -> None:
    key = await system.tenant()
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=100, seed=1, ignore_end_of_text=True)
    )

    async def one() -> str:
        try:
            with rpc.errors():
                await system.inference.Generate(request, metadata=key)
        except ServiceError as error:
            assert (error.code, error.reason, error.retry_after) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 1.0)
            return error.reason
        return "ok"

    outcomes = await asyncio.gather(*(one() for _ in range(20)))
    assert outcomes.count("ok") >= 6  # four slots and a queue of two
    assert outcomes.count("QUEUE_FULL") > 0
