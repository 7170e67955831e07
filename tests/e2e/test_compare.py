"""Comparing releases, and generation that explains itself, from end to end."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import pytest_asyncio
import torch
from backpack_lm.overlay import Overlay
from backpack_lm.patch import ReleaseContent, RevisionContent
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_proto.v1 import sync_pb2 as spb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError
from backpack_serving.inference.served_model import ServedModel

from tests.e2e.conftest import Metadata, System, copy, topic
from tests.models.conftest import scores

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The story of the king and the"
TOLERANCE = 1e-4


def _releases(*choices: int | str) -> list[pb.ReleaseChoice]:
    return [
        pb.ReleaseChoice(number=choice) if isinstance(choice, int)
        else pb.ReleaseChoice(unpatched=True) if choice == "unpatched"
        else pb.ReleaseChoice(channel=choice)
        for choice in choices
    ]  # fmt: skip


def _request(*choices: int | str, **fields: Any) -> pb.CompareRequest:
    return pb.CompareRequest(prompt=pb.Prompt(text=PROMPT), releases=_releases(*choices), **fields)


async def _overlays(system: System, key: Metadata, served: ServedModel) -> dict[str, Overlay]:
    """What each of the tenant's releases means, from the canonical bytes in the store."""
    listed = (await system.releases.ListReleases(ipb.ListReleasesRequest(), metadata=key)).releases
    overlays = {}
    for release in listed:
        request = spb.FetchReleaseRequest(tenant=release.name.split("/")[1], digest=release.digest)
        blobs = [piece.data async for piece in system.sync.FetchRelease(request, metadata=system.replica)]
        overlays[release.digest] = Overlay.compile(
            ReleaseContent(tuple(map(RevisionContent.from_bytes, blobs))), served.table
        )
    return overlays


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tenant(system: System) -> Metadata:
    """Releases 1 to 4: no channel has had 2 and 3, 3 has two topics, 4 is as 1 but on another channel."""
    key = await system.tenant(copy("king", "ship"))
    await system.release(key, copy("sea", "ship"))
    await system.release(key, copy("king", "nurse"), topic("nurse", "doctor"), topic("sea", "ship", strength=1))
    activated = await system.activate(key, await system.release(key, copy("king", "ship")), channel="beta")
    request = pb.ListSensesRequest(word=pb.Word(text="king"), min_revision=activated.position)
    await system.inference.ListSenses(request, metadata=key)
    return key


async def test_next_tokens_under_many_releases_are_the_models(
    system: System, served: ServedModel, tenant: Metadata
) -> None:
    words = [pb.Word(text="ship"), pb.Word(text="nurse")]
    request = _request("unpatched", "live", 2, 3, "beta", top=5, targets=words)
    answer = await system.inference.Compare(request, metadata=tenant)
    assert [r.served.release for r in answer.releases] == [0, 1, 2, 3, 4]
    assert [r.served.channel for r in answer.releases] == ["", "live", "", "", "beta"]
    overlays = await _overlays(system, tenant, served)
    ids = torch.tensor(served.tokenizer.encode(PROMPT))
    assert [token.id for token in answer.tokens] == ids.tolist()
    for compared in answer.releases:
        overlay = overlays[compared.served.release_digest]
        logs = served.model(ids[None], overlay)[0, -1, : served.manifest.config.tokens].log_softmax(-1)
        found = [*compared.next.top, *compared.next.targets]
        assert [t.log_probability for t in found] == pytest.approx([float(logs[t.id]) for t in found], abs=TOLERANCE)
        assert [t.log_probability for t in compared.next.top] == pytest.approx(
            logs.topk(5).values.tolist(), abs=TOLERANCE
        )
        assert [t.text for t in compared.next.targets] == [" ship", " nurse"]
    plain, live, absent, nurse, beta = (r.next for r in answer.releases)
    assert absent == plain, "a release that touches no word of the text changes nothing"
    assert live == beta, "one release by two names"
    assert live.targets[0].log_probability > plain.targets[0].log_probability + 0.1
    assert nurse.targets[1].log_probability > plain.targets[1].log_probability + 0.1


async def test_scores_under_many_releases_are_those_of_score(
    system: System, served: ServedModel, tenant: Metadata
) -> None:
    request = _request("live", 0, 3, mode=pb.COMPARE_MODE_SCORE)
    answer = await system.inference.Compare(request, metadata=tenant)
    overlays, ids = await _overlays(system, tenant, served), torch.tensor(served.tokenizer.encode(PROMPT))
    for compared in answer.releases:
        expected = scores(served.model, ids, overlays[compared.served.release_digest])
        assert list(compared.score.log_probabilities) == pytest.approx(expected, abs=TOLERANCE)
        assert compared.score.log_probability == pytest.approx(math.fsum(expected), abs=10 * TOLERANCE)
    alone = await system.inference.Score(pb.ScoreRequest(text=pb.Prompt(text=PROMPT)), metadata=tenant)
    assert answer.releases[0].score.perplexity == pytest.approx(alone.perplexity, rel=TOLERANCE)
    assert answer.releases[0].served.release_digest == alone.served.release_digest


async def test_a_text_may_be_less_likely_than_its_perplexity_can_tell(system: System) -> None:
    cells = [ipb.Cells(word=pb.Word(text="the"))]
    key = await system.tenant(*[ipb.Edit(scale=ipb.ScaleEdit(cells=cells, factor=8))] * 5)
    text = pb.Prompt(text="the king of the the the king")
    alone = await system.inference.Score(pb.ScoreRequest(text=text), metadata=key)
    request = pb.CompareRequest(prompt=text, releases=_releases("live"), mode=pb.COMPARE_MODE_SCORE)
    beside = (await system.inference.Compare(request, metadata=key)).releases[0].score
    for score in (alone, beside):
        assert -math.inf < score.log_probability < -7 * 709, "more than that, and exp holds it"
        assert score.perplexity == math.inf


async def test_a_score_that_is_no_numbers_is_refused(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await system.tenant()
    monkeypatch.setattr(ServedModel, "score", lambda *_: [-1.0, math.nan])
    with pytest.raises(ServiceError) as refused, rpc.errors():
        await system.inference.Score(pb.ScoreRequest(text=pb.Prompt(text=PROMPT)), metadata=key)
    assert (refused.value.code, refused.value.reason) == ("INTERNAL", "NON_FINITE")


async def test_as_many_releases_as_may_be(system: System) -> None:
    """More than a replica reads together, most of them alike: each is answered in its place."""
    key = await system.tenant()
    words = ("king", "queen", "story")
    for number in range(1, 40):
        assert await system.release(key, copy(words[number % 3], "ship")) == number
    answer = await system.inference.Compare(_request(*range(39, -1, -1), top=1), metadata=key)
    assert [r.served.release for r in answer.releases] == list(range(39, -1, -1))
    by_word = {r.served.release % 3: r.next.top[0].log_probability for r in answer.releases if r.served.release}
    for compared in answer.releases[:-1]:
        assert compared.next.top[0].log_probability == by_word[compared.served.release % 3]


async def test_a_tenants_numbers_are_its_own(system: System, tenant: Metadata) -> None:
    other = await system.tenant(copy("king", "court"))
    mine = await system.inference.Compare(_request(1), metadata=tenant)
    theirs = await system.inference.Compare(_request(1), metadata=other)
    assert mine.releases[0].served.tenant != theirs.releases[0].served.tenant
    assert mine.releases[0].served.release_digest != theirs.releases[0].served.release_digest
    with pytest.raises(ServiceError, match="releases/3 doesn't exist"), rpc.errors():
        await system.inference.Compare(_request(1, 3), metadata=other)


async def test_pins_are_the_gateways(system: System, tenant: Metadata) -> None:
    """What a client writes where the gateway's pins go changes nothing."""
    request = _request(0)
    request.pins.add(tenant="t0", release=1, release_digest="ab" * 32)
    answer = await system.inference.Compare(request, metadata=tenant)
    assert [r.served.release for r in answer.releases] == [0]


REFUSED = {
    "no release": (_request(), "INVALID_ARGUMENT", "OUT_OF_RANGE", "0 releases; 1 to 256"),
    "too many": (_request(*range(257)), "INVALID_ARGUMENT", "OUT_OF_RANGE", "257 releases; 1 to 256"),
    "twice": (_request("live", 1, "live"), "INVALID_ARGUMENT", "DUPLICATE", "'live' is releases[0] already"),
    "unpatched twice": (_request("unpatched", 0), "INVALID_ARGUMENT", "DUPLICATE", "name each release once"),
    "negative": (_request(-1), "INVALID_ARGUMENT", "OUT_OF_RANGE", "-1; 0 (unpatched) or more"),
    "no choice": (
        pb.CompareRequest(prompt=pb.Prompt(text=PROMPT), releases=[pb.ReleaseChoice()]),
        "INVALID_ARGUMENT",
        "EMPTY",
        "give a number, a channel or unpatched",
    ),
    "unknown number": (_request(0, 99), "NOT_FOUND", "NO_SUCH_RELEASE", "releases/99 doesn't exist"),
    "unknown channel": (_request("nowhere"), "NOT_FOUND", "NO_SUCH_CHANNEL", "nowhere doesn't exist"),
    "top": (_request(0, top=101), "INVALID_ARGUMENT", "OUT_OF_RANGE", "101; 1 to 100"),
    "targets": (
        _request(0, targets=[pb.Word(text="king")] * 65),
        "INVALID_ARGUMENT",
        "TOO_MANY",
        "65; at most 64",
    ),
    "a word of two": (
        _request(0, targets=[pb.Word(text="kingdomless")]),
        "INVALID_ARGUMENT",
        "NOT_ONE_TOKEN",
        "targets[0]",
    ),
    "top of a score": (
        _request(0, top=3, mode=pb.COMPARE_MODE_SCORE),
        "INVALID_ARGUMENT",
        "NOT_IN_THIS_MODE",
        "leave it out to score",
    ),
    "mode": (
        _request(0, mode=7),
        "INVALID_ARGUMENT",
        "UNKNOWN_VALUE",
        "7; use COMPARE_MODE_NEXT_TOKEN or COMPARE_MODE_SCORE",
    ),
    "one token": (
        pb.CompareRequest(
            prompt=pb.Prompt(tokens=pb.TokenIds(ids=[5])), releases=_releases(0), mode=pb.COMPARE_MODE_SCORE
        ),
        "INVALID_ARGUMENT",
        "TOO_SHORT",
        "at least two",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_bad_comparisons_are_refused_with_the_value_and_the_fix(
    system: System, tenant: Metadata, name: str
) -> None:
    request, code, reason, says = REFUSED[name]
    with pytest.raises(ServiceError) as refused, rpc.errors():
        await system.inference.Compare(request, metadata=tenant)
    assert (refused.value.code, refused.value.reason) == (code, reason)
    assert says in refused.value.message


async def test_a_replica_compares_for_gateways_only_and_never_without_the_release(system: System) -> None:
    from backpack_proto.v1 import directory_pb2, directory_pb2_grpc

    channel = rpc.channel(system.settings.directory_address)
    watch = directory_pb2_grpc.DirectoryServiceStub(channel).WatchReplicas(directory_pb2.WatchReplicasRequest())
    address = (await watch.read()).replicas[0].address
    watch.cancel()
    await channel.close()
    channel = rpc.channel(address)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    unknown = _request(0, 1)
    unknown.pins.add(tenant="t0", release_digest=ReleaseContent().digest)
    unknown.pins.add(tenant="t0", release=1, release_digest="00" * 32)
    for request, metadata, reason in (
        (unknown, rpc.with_key("bp_wrong"), "NOT_A_GATEWAY"),
        (_request(0, 1), system.replica, "NO_PIN"),
        (unknown, system.replica, "NO_SUCH_RELEASE"),
    ):
        with pytest.raises(ServiceError) as refused, rpc.errors():
            await stub.Compare(request, metadata=metadata)
        assert refused.value.reason == reason
    await channel.close()


# ---- generation that explains itself


async def _explained(system: System, key: Metadata, limit: int, **sampling: Any) -> list[pb.Token]:
    request = pb.GenerateStreamRequest(
        prompt=pb.Prompt(text=PROMPT),
        sampling=pb.Sampling(log_probabilities=0, **sampling),
        explain=pb.ExplainOptions(limit=limit),
    )
    return [t async for part in system.inference.GenerateStream(request, metadata=key) for t in part.tokens]


async def test_every_generated_token_comes_with_what_made_it_likely(system: System, served: ServedModel) -> None:
    edits = copy("king", "nurse"), topic("nurse", "patient"), topic("sea", "ship", strength=1)
    key = await system.tenant(*edits)
    sampling = {"max_tokens": 24, "seed": 2, "temperature": 0.7, "top_k": 30}
    tokens = await _explained(system, key, 5, **sampling)
    plain = [token for part in await system.stream(key, PROMPT, **sampling) for token in part.tokens]
    assert [t.id for t in tokens] == [t.id for t in plain], "explaining changes nothing"
    assert not any(t.HasField("explanation") for t in plain)
    (overlay,) = [o for o in (await _overlays(system, key, served)).values() if not o.empty]
    ids = served.tokenizer.encode(PROMPT)
    for token in tokens:
        found, logits = token.explanation, served.model(torch.tensor([ids]), overlay)[0, -1]
        listed = [c.contribution for c in found.contributions]
        assert len(listed) == 5
        assert listed == sorted(listed, key=abs, reverse=True)
        assert math.fsum(listed) + found.unlisted == pytest.approx(found.logit, abs=1e-9)
        near = TOLERANCE + 1e-5 * abs(found.logit)  # float32's rounding grows with the logit, and topics make it large
        assert found.logit == pytest.approx(float(logits[token.id]), abs=near)
        others = logits[: served.manifest.config.tokens].logsumexp(0)
        assert found.logit - float(others) == pytest.approx(token.log_probability, abs=near)
        assert all(c.token.id == ids[c.position] for c in found.contributions)
        ids.append(token.id)
    assert any(c.multiplier not in (0.0, 1.0) for t in tokens for c in t.explanation.contributions)


async def test_samples_in_one_answer_are_each_explained(system: System) -> None:
    key = await system.tenant()
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text=PROMPT),
        sampling=pb.Sampling(max_tokens=6, seed=1, samples=2),
        explain=pb.ExplainOptions(),
    )
    answer = await system.inference.Generate(request, metadata=key)
    for sample in (answer, answer.more_samples[0]):
        assert [len(t.explanation.contributions) for t in sample.tokens] == [8] * len(sample.tokens)


async def test_streams_that_explain_nothing_do_not_wait(system: System) -> None:
    """One stream explains 200 tokens; others start and end meanwhile."""
    key = await system.tenant()
    explaining = asyncio.create_task(_explained(system, key, 64, max_tokens=200, seed=3, ignore_end_of_text=True))
    others = 0
    while not explaining.done():
        await system.stream(key, PROMPT, max_tokens=2)
        others += 1
    assert len(await explaining) == 200
    assert others >= 3


@pytest.mark.parametrize(
    ("limit", "sampling", "reason", "says"),
    [
        (65, {"max_tokens": 1}, "OUT_OF_RANGE", "65; 1 to 64, or 0 for 8"),
        (-1, {"max_tokens": 1}, "OUT_OF_RANGE", "-1; 1 to 64"),
        (64, {"max_tokens": 400, "samples": 2}, "TOO_LARGE", "51200 contributions, at most 40000"),
    ],
)
async def test_bad_explaining_is_refused(
    system: System, tenant: Metadata, limit: int, sampling: dict[str, Any], reason: str, says: str
) -> None:
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(**sampling), explain=pb.ExplainOptions(limit=limit)
    )
    with pytest.raises(ServiceError) as refused, rpc.errors():
        await system.inference.Generate(request, metadata=tenant)
    assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", reason)
    assert says in refused.value.message
