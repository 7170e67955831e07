"""Requests from end to end."""

from __future__ import annotations

import asyncio
import gc
import math
import time
import uuid
from collections import Counter
from typing import Any

import grpc
import pytest
import torch
from backpack_lm.attribution import attribute
from backpack_lm.overlay import Overlay
from backpack_lm.patch import ReleaseContent, RevisionContent
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_proto.v1 import sync_pb2 as spb
from backpack_serving import rpc
from backpack_serving.engine.sampler import choose
from backpack_serving.errors import ServiceError
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.sampling import SamplingParams
from backpack_serving.wire import inference as wire
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.e2e.conftest import Metadata, System, copy, topic

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The story of the king and the"
EDITS = {
    "none": (),
    "copy": (copy("king", "ship"),),
    "topic": (topic("ship", "sea", "captain"),),
    "both": (copy("king", "nurse"), topic("nurse", "patient", strength=1)),
    "bias": (copy("king", "ship"), ipb.Edit(bias=ipb.BiasEdit(words=[pb.Word(text="the")], amount=-math.inf))),
}


async def _overlay(system: System, key: Metadata, served: ServedModel) -> Overlay:
    """What the tenant's live release means, from the canonical bytes in the store."""
    live = (await system.releases.GetChannel(ipb.GetChannelRequest(name="channels/live"), metadata=key)).channel
    request = spb.FetchReleaseRequest(tenant=live.name.split("/")[1], digest=live.release_digest)
    pieces = [piece async for piece in system.sync.FetchRelease(request, metadata=system.replica)]
    blobs = [piece.data for piece in pieces]  # each is small enough to be one piece
    return Overlay.compile(ReleaseContent(tuple(map(RevisionContent.from_bytes, blobs))), served.table)


def _oracle(served: ServedModel, overlay: Overlay, ids: list[int], sampling: SamplingParams) -> list[int]:
    made: list[int] = []
    vocabulary = served.manifest.config.tokens

    def pick(logits: torch.Tensor) -> int:
        return choose(logits[:vocabulary], sampling, len(ids) + len(made))

    for token in served.model.generate(ids, overlay, pick):
        made.append(token)
        if len(made) == sampling.max_tokens or token == served.tokenizer.end_of_text:
            break
    return made


async def test_tenants_in_one_batch_get_what_the_oracle_says_under_their_release(
    system: System, served: ServedModel
) -> None:
    keys = {name: await system.tenant(*edits) for name, edits in EDITS.items()}
    streams = await asyncio.gather(
        *(system.stream(key, PROMPT, max_tokens=24, seed=2, temperature=0.7, top_k=30) for key in keys.values())
    )
    sampling = SamplingParams(max_tokens=24, temperature=0.7, top_k=30, seed=2)
    ids, digests = served.tokenizer.encode(PROMPT), set()
    for key, stream in zip(keys.values(), streams, strict=True):
        overlay = await _overlay(system, key, served)
        tokens = [token.id for part in stream for token in part.tokens]
        assert tokens == _oracle(served, overlay, ids, sampling)
        ended = tokens[-1] == served.tokenizer.end_of_text
        said = tokens[:-1] if ended else tokens
        assert "".join(part.text for part in stream) == served.tokenizer.decode(said)
        assert stream[0].served.release_digest == overlay.digest
        assert stream[0].served.model_fingerprint == served.manifest.fingerprint
        assert stream[-1].finish_reason == (pb.FINISH_REASON_STOP if ended else pb.FINISH_REASON_LENGTH)
        assert (stream[-1].usage.prompt_tokens, stream[-1].usage.generated_tokens) == (len(ids), len(tokens))
        digests.add(overlay.digest)
    assert len(digests) == len(EDITS)


async def test_generate_is_the_stream_in_one_piece(system: System) -> None:
    key = await system.tenant(*EDITS["copy"])
    sampling = {"max_tokens": 12, "seed": 5, "log_probabilities": 2}
    parts = await system.stream(key, PROMPT, **sampling)
    request = pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(**sampling))
    whole = await system.inference.Generate(request, metadata=key)
    assert whole.text == "".join(part.text for part in parts)
    streamed = [token for part in parts for token in part.tokens]
    assert [t.id for t in whole.tokens] == [t.id for t in streamed]
    logs = [[t.log_probability for t in tokens] for tokens in (whole.tokens, streamed)]
    assert logs[0] == pytest.approx(logs[1], abs=1e-4), "the same but for the order of additions"
    for answer in (whole, parts[0]):
        assert answer.served.staleness.ToMilliseconds() < 3000
        answer.served.ClearField("staleness")
    assert whole.served == parts[0].served
    assert all(len(t.alternatives) == 2 and t.log_probability < 0 for t in whole.tokens)
    ids = pb.TokenIds(ids=[t.id for t in (await _tokenize(system, key, PROMPT)).tokens])
    request.prompt.tokens.CopyFrom(ids)
    assert (await system.inference.Generate(request, metadata=key)).text == whole.text


async def _tokenize(system: System, key: Metadata, text: str) -> pb.TokenizeResponse:
    return await system.inference.Tokenize(pb.TokenizeRequest(text=text), metadata=key)


async def test_the_first_token_comes_alone_then_they_are_gathered(system: System) -> None:
    key = await system.tenant()
    request = pb.GenerateStreamRequest(prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=30, seed=1))
    request.coalesce.FromMilliseconds(1000)
    started = time.monotonic()
    gathered = [part async for part in system.inference.GenerateStream(request, metadata=key)]
    first, *rest = (len(part.tokens) for part in gathered)
    assert first < 15, "the first message waits for nothing; more than one token only if they were there already"
    assert first + sum(rest) == 30
    assert len(rest) <= 1 + (time.monotonic() - started)
    request.coalesce.FromMilliseconds(0)
    apart = [part async for part in system.inference.GenerateStream(request, metadata=key)]
    assert len(apart) > 2
    assert [t.id for p in apart for t in p.tokens] == [t.id for p in gathered for t in p.tokens]


@pytest.mark.parametrize("temperature", [1e-7, 1e-37, 1e-40, 1e-300])
@pytest.mark.parametrize("others", [{}, {"top_k": 9, "top_p": 0.9}], ids=str)
async def test_the_coldest_temperatures_are_greedy(
    system: System, temperature: float, others: dict[str, float]
) -> None:
    key = await system.tenant()
    made = [
        [t.id for p in await system.stream(key, PROMPT, max_tokens=5, **how) for t in p.tokens]
        for how in ({"temperature": 0.0}, {"temperature": temperature, "seed": 1, **others})
    ]
    assert made[0] == made[1]


async def test_stop_strings_end_the_text_before_them(system: System) -> None:
    key = await system.tenant(*EDITS["copy"])
    whole = "".join(p.text for p in await system.stream(key, PROMPT, max_tokens=30, seed=2, temperature=0.7, top_k=30))
    stop = whole[20:26]
    parts = await system.stream(key, PROMPT, max_tokens=30, seed=2, temperature=0.7, top_k=30, stop=[stop])
    assert "".join(p.text for p in parts) == whole[: whole.find(stop)]
    assert parts[-1].finish_reason == pb.FINISH_REASON_STOP
    assert parts[-1].usage.generated_tokens < 30


async def test_a_stop_string_ends_the_work_though_the_answer_comes_in_one_piece(system: System) -> None:
    """The engine isn't asked for the other tokens."""
    key = await system.tenant()
    sampling = pb.Sampling(max_tokens=450, seed=2, ignore_end_of_text=True)
    whole = await system.stream(key, PROMPT, max_tokens=30, seed=2, ignore_end_of_text=True)
    sampling.stop.append("".join(p.text for p in whole)[20:26])

    def made() -> float:
        assert system.metrics is not None
        kind = {"kind": "generated"}
        return system.metrics.registry.get_sample_value("backpack_replica_tokens_total", kind) or 0.0

    before = made()
    request = pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), sampling=sampling)
    answer = await system.inference.Generate(request, metadata=key)
    assert answer.finish_reason == pb.FINISH_REASON_STOP
    assert answer.usage.generated_tokens < 30
    assert made() - before < 300


async def test_an_activation_steers_the_next_request_and_not_the_one_that_runs(system: System) -> None:
    key = await system.tenant()
    request = pb.GenerateStreamRequest(
        prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=400, seed=3, ignore_end_of_text=True)
    )
    alone = [t.id async for p in system.inference.GenerateStream(request, metadata=key) for t in p.tokens]
    call = aiter(system.inference.GenerateStream(request, metadata=key))
    first = await anext(call)
    await system.activate(key, await system.release(key, *EDITS["copy"]))
    await system.known(key)
    tokens = [t.id for t in first.tokens] + [t.id async for part in call for t in part.tokens]
    assert first.served.release == 0
    assert tokens == alone
    steered = await system.stream(key, PROMPT, max_tokens=2)
    assert steered[0].served.release == 1
    live = (await system.releases.GetChannel(ipb.GetChannelRequest(name="channels/live"), metadata=key)).channel
    await system.releases.Rollback(ipb.RollbackRequest(channel="channels/live", etag=live.etag), metadata=key)
    await system.known(key)
    assert (await system.stream(key, PROMPT, max_tokens=2))[0].served.release == 0


async def test_a_channel_of_ones_own(system: System) -> None:
    key = await system.tenant()
    moved = await system.activate(key, await system.release(key, *EDITS["copy"]), channel="beta")
    await system.known(key)
    request = pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=1), channel="beta")
    request.min_revision.CopyFrom(moved.position)
    answer = await system.inference.Generate(request, metadata=key)
    assert (answer.served.channel, answer.served.release) == ("beta", 1)


async def test_explanations_add_up_and_are_the_models(system: System, served: ServedModel) -> None:
    key = await system.tenant(*EDITS["both"])
    request = pb.ExplainRequest(prompt=pb.Prompt(text=PROMPT), target=pb.Word(text="nurse"), limit=7)
    answer = await system.inference.Explain(request, metadata=key)
    listed = [c.contribution for c in answer.contributions]
    assert len(listed) == 7
    assert listed == sorted(listed, key=abs, reverse=True)
    assert math.fsum(listed) + answer.unlisted == pytest.approx(answer.logit, abs=1e-9)
    overlay = await _overlay(system, key, served)
    ids = torch.tensor(served.tokenizer.encode(PROMPT))
    expected = attribute(served.model, served.table, ids, overlay, answer.target.id)
    assert answer.logit == pytest.approx(float(served.model(ids[None], overlay)[0, -1, answer.target.id]), abs=1e-4)
    top = answer.contributions[0]
    assert top.contribution == pytest.approx(float(expected.terms.contributions[top.position, top.sense]))
    assert top.multiplier != 1.0


async def test_scores_and_senses(system: System, served: ServedModel) -> None:
    key = await system.tenant(*EDITS["copy"])
    score = await system.inference.Score(pb.ScoreRequest(text=pb.Prompt(text=PROMPT)), metadata=key)
    logs = [t.log_probability for t in score.tokens[1:]]
    assert not score.tokens[0].HasField("log_probability")
    assert score.perplexity == pytest.approx(math.exp(-sum(logs) / len(logs)))
    senses = [
        await system.inference.ListSenses(pb.ListSensesRequest(word=pb.Word(text=w), limit=3), metadata=key)
        for w in ("king", "ship")
    ]
    assert [s.positive for s in senses[0].senses] == [s.positive for s in senses[1].senses]
    assert all(s.edited for s in senses[0].senses)
    assert not any(s.edited for s in senses[1].senses)
    model = await system.inference.GetModel(pb.GetModelRequest(), metadata=key)
    assert (model.num_senses, model.fingerprint) == (8, served.manifest.fingerprint)


# ---- bad input


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_dropped_stream_frees_its_slot(system: System, made: Counter[str], how: str) -> None:
    key = await system.tenant()
    request = pb.GenerateStreamRequest(
        prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=500, seed=1, ignore_end_of_text=True)
    )
    calls = []
    for _ in range(4):  # every slot
        call = system.inference.GenerateStream(request, metadata=key, timeout=1.0 if how == "deadline" else None)
        await call.read()
        calls.append(call)
    if how == "cancel":
        for call in calls:
            call.cancel()
    else:
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
                while await call.read():
                    pass
    await asyncio.gather(*(system.stream(key, PROMPT, max_tokens=1) for _ in range(4)))
    assert len(made) == 8
    assert max(made.values()) < 490, "who came next waited until one had ended"


async def test_a_repeated_write_has_one_effect(system: System) -> None:
    key = await system.tenant()
    request = ipb.CreateRevisionRequest(parent="patches/p", edits=[copy("king", "ship")], request_id=str(uuid.uuid4()))
    answers = [await system.patches.CreateRevision(request, metadata=key) for _ in range(3)]
    assert len({a.revision.name for a in answers}) == 1
    assert len({a.position.revision for a in answers}) == 1
    request.edits[0].copy.source.text = "sea"
    with pytest.raises(ServiceError, match="used for another request"), rpc.errors():
        await system.patches.CreateRevision(request, metadata=key)


async def test_a_dry_run_stores_nothing(system: System) -> None:
    key = await system.tenant()
    request = ipb.CreateRevisionRequest(parent="patches/p", edits=[copy("king", "ship")], validate_only=True)
    answer = await system.patches.CreateRevision(request, metadata=key)
    assert answer.revision.name.endswith("/revisions/1")
    listed = await system.patches.ListRevisions(ipb.ListRevisionsRequest(parent="patches/p"), metadata=key)
    assert not listed.revisions


async def test_a_revoked_key_is_refused_within_moments(system: System) -> None:
    key = await system.tenant()
    id_ = key[0][1].split("_")[1]
    tenant = (await system.stream(key, PROMPT, max_tokens=1))[0].served.tenant
    name = f"tenants/{tenant}/keys/{id_}"
    await system.tenants.RevokeApiKey(ipb.RevokeApiKeyRequest(name=name), metadata=system.admin)
    for _ in range(100):
        try:
            await system.stream(key, PROMPT, max_tokens=1)
        except grpc.aio.AioRpcError as error:
            assert error.code().name == "UNAUTHENTICATED"
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the revoked key still works")


async def test_audit_names_who_did_what_and_the_chain_is_whole(system: System) -> None:
    key = await system.tenant(*EDITS["copy"])
    entries = (await system.audit.ListAuditEntries(ipb.ListAuditEntriesRequest(), metadata=key)).entries
    methods = [e.method for e in entries]
    assert methods == [
        "Activate",
        "CreateRelease",
        "CreateRevision",
        "CreatePatch",
        "CreateApiKey",
        "CreateTenant",
    ]
    assert entries[0].principal.startswith("tenants/t")
    chain = await system.audit.VerifyChain(ipb.VerifyChainRequest(), metadata=key)
    assert chain.intact


async def test_the_collector_leaves_alone_what_was_loaded(system: System) -> None:
    assert len(gc.get_objects()) < gc.get_freeze_count()


async def test_a_replica_serves_only_gateways(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    from backpack_proto.v1 import directory_pb2, directory_pb2_grpc, inference_pb2_grpc

    channel = rpc.channel(system.settings.directory_address)
    watch = directory_pb2_grpc.DirectoryServiceStub(channel).WatchReplicas(directory_pb2.WatchReplicasRequest())
    address = (await watch.read()).replicas[0].address
    watch.cancel()
    await channel.close()
    channel = rpc.channel(address)
    stub, key = inference_pb2_grpc.InferenceServiceStub(channel), await system.tenant()
    request = pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT))
    endless = pb.GenerateRequest(prompt=request.prompt, sampling=pb.Sampling(samples=3_000_000))
    read_generation, read = wire.read_generation, []

    def watched(asked: Any, *how: Any) -> wire.GenerationParams:
        read.append(asked)
        return read_generation(asked, *how)

    monkeypatch.setattr(wire, "read_generation", watched)
    for metadata, reason in ((key, "NOT_A_GATEWAY"), (system.replica, "NO_PIN")):
        for asked in (request, endless):
            with pytest.raises(ServiceError) as refused, rpc.errors():
                await stub.Generate(asked, metadata=metadata)
            assert refused.value.reason == reason
            assert not read, "nothing is done for a stranger"
    await system.stream(key, PROMPT, max_tokens=1)
    assert len(read) == 2, "by the gateway and by the replica, for a caller that they know"
    for call in (stub.Tokenize(pb.TokenizeRequest(text=PROMPT)), stub.GetModel(pb.GetModelRequest())):
        with pytest.raises(ServiceError) as refused, rpc.errors():
            await call
        assert refused.value.reason == "NOT_A_GATEWAY"
    pin = pb.Pin(tenant="t0", channel="live", release=1, release_digest="00" * 32)
    metadata = (*system.replica, ("backpack-pin-bin", pin.SerializeToString()))
    with pytest.raises(ServiceError) as refused, rpc.errors():
        await stub.Generate(request, metadata=metadata)
    assert refused.value.reason == "NO_SUCH_RELEASE", "an unknown release must never be served as another"
    with pytest.raises(ServiceError) as refused, rpc.errors():
        await stub.Generate(request, metadata=(*system.replica, ("backpack-pin-bin", b"\xff")))
    assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", "NOT_A_MESSAGE")
    for digest in ("", "\0", "../view"):
        pin = pb.Pin(tenant="t0", release_digest=digest)
        compare = pb.CompareRequest(prompt=request.prompt, releases=[pb.ReleaseChoice(number=1)], pins=[pin])
        pinned = (*system.replica, ("backpack-pin-bin", pin.SerializeToString()))
        for call in (stub.Generate(request, metadata=pinned), stub.Compare(compare, metadata=system.replica)):
            with pytest.raises(ServiceError) as refused, rpc.errors():
                await call
            assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", "BAD_DIGEST")
    await channel.close()


async def test_health_and_reflection(system: System, caplog: pytest.LogCaptureFixture) -> None:
    channel = rpc.channel(system.gateway)
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "backpack.v1.InferenceService"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.List(health_pb2.HealthListRequest())
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    await channel.close()

    def services() -> set[str]:
        with rpc.sync_channel(system.gateway) as plain:
            return set(ProtoReflectionDescriptorDatabase(plain).get_services())

    assert "backpack.v1.InferenceService" in await asyncio.to_thread(services)
