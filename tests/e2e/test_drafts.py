"""Drafts: edits in a request, tried over a release without being stored."""

from __future__ import annotations

from typing import Any

import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_serving import rpc
from backpack_serving.errors import ServiceError

from tests.e2e.conftest import Metadata, System, copy, topic
from tests.e2e.test_named_release import PROMPT
from tests.e2e.test_named_release import REQUESTS as OTHERS
from tests.waiting import eventually

REQUESTS = {**OTHERS, "Judge": pb.JudgeRequest(limit=3)}

pytestmark = pytest.mark.asyncio(loop_scope="module")


def _scale(word: str, factor: float, *senses: int) -> ipb.Edit:
    cells = [ipb.Cells(word=pb.Word(text=word), senses=senses)]
    return ipb.Edit(scale=ipb.ScaleEdit(cells=cells, factor=factor))


async def _ask(system: System, method: str, request: Any, key: Metadata) -> Any:
    """The answer; of a stream, all of its messages as one."""
    with rpc.errors():
        call = getattr(system.inference, method)(request, metadata=key)
        if method != "GenerateStream":
            return await call
        answer = pb.GenerateStreamResponse()
        async for part in call:
            text = answer.text + part.text
            answer.MergeFrom(part)
            answer.text = text
        return answer


def _with_draft(method: str, *edits: ipb.Edit, **fields: Any) -> Any:
    request = type(REQUESTS[method])(draft=pb.Draft(edits=edits), **fields)
    request.MergeFrom(REQUESTS[method])
    return request


async def _release_of(system: System, key: Metadata, *revisions: tuple[ipb.Edit, ...]) -> tuple[int, list[str]]:
    """A stored release of these revisions, and their digests."""
    made = [
        await system.patches.CreateRevision(ipb.CreateRevisionRequest(parent="patches/p", edits=edits), metadata=key)
        for edits in revisions
    ]
    request = ipb.CreateReleaseRequest(revisions=[one.revision.name for one in made])
    answer = await system.releases.CreateRelease(request, metadata=key)
    return answer.release.number, [one.revision.digest for one in made]


def _said(answer: Any) -> Any:
    """The answer without what it was made with, which the token of a next page names, too."""
    said = type(answer)()
    said.CopyFrom(answer)
    said.ClearField("served")
    if isinstance(said, pb.FindSensesResponse):
        said.ClearField("next_page_token")
    return said


async def _releases(system: System, key: Metadata) -> ipb.ListReleasesResponse:
    """All of a tenant; without their judgements, which come when somebody asks."""
    found = await system.releases.ListReleases(ipb.ListReleasesRequest(), metadata=key)
    for release in found.releases:
        release.ClearField("judgement")
    return found


@pytest.mark.parametrize("method", REQUESTS)
async def test_a_draft_answers_as_the_release_that_it_would_be(system: System, method: str) -> None:
    """Over the channel's release, over another and over none; and nothing is stored."""
    base, added = (copy("king", "ship"),), (copy("story", "nurse"), _scale("king", 0.5), topic("sea", strength=2))
    key = await system.tenant(*base)
    both, digests = await _release_of(system, key, base, added)
    alone, _ = await _release_of(system, key, added)
    before = await _releases(system, key)
    plain = await _ask(system, method, REQUESTS[method], key)
    for fields, stored, number in (({}, both, 1), ({"release": 1}, both, 1), ({"release": 0}, alone, 0)):
        tried = await _ask(system, method, _with_draft(method, *added, **fields), key)
        request = type(REQUESTS[method])(release=stored)
        request.MergeFrom(REQUESTS[method])
        released = await _ask(system, method, request, key)
        assert _said(tried) == _said(released), fields
        assert _said(tried) != _said(plain), fields
        assert (tried.served.release, tried.served.draft_digest) == (number, digests[1])
        assert not released.served.draft_digest
        assert tried.served.release_digest not in (released.served.release_digest, plain.served.release_digest)
    again = await _ask(system, method, REQUESTS[method], key)
    assert (_said(again), again.served.release_digest) == (_said(plain), plain.served.release_digest)
    assert await _releases(system, key) == before


async def test_a_judgement_says_what_is_done_to_ordinary_text(system: System) -> None:
    key = await system.tenant()
    plain = await _ask(system, "Judge", pb.JudgeRequest(release=0), key)
    assert plain.perplexity_before == plain.perplexity_after
    assert not plain.moved
    assert (plain.cells, plain.topics, plain.biased) == (0, 0, 0)
    harm = await _ask(system, "Judge", _with_draft("Judge", _scale("the", 0.0), topic("sea")), key)
    senses = (await _ask(system, "ListSenses", pb.ListSensesRequest(word=pb.Word(text="the")), key)).senses
    assert (harm.tokens, harm.cells, harm.topics, harm.biased) == (plain.tokens, len(senses), 1, 0)
    assert harm.perplexity_before == plain.perplexity_before
    assert harm.perplexity_after > 1.05 * harm.perplexity_before
    moves = [abs(word.after - word.before) for word in harm.moved]
    assert len(moves) == 3
    assert moves == sorted(moves, reverse=True)
    for limit in (-1, 101):
        with pytest.raises(ServiceError) as refused:
            await _ask(system, "Judge", pb.JudgeRequest(limit=limit), key)
        assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", "OUT_OF_RANGE")


async def test_drafts_are_compared_beside_releases(system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    added = copy("story", "nurse")
    both, _ = await _release_of(system, key, (copy("king", "ship"),), (added,))
    draft, other = pb.Draft(edits=[added]), pb.Draft(edits=[_scale("story", 0.25)])
    choices = [
        pb.ReleaseChoice(unpatched=True),
        pb.ReleaseChoice(channel="live"),
        pb.ReleaseChoice(channel="live", draft=draft),
        pb.ReleaseChoice(channel="live", draft=other),
        pb.ReleaseChoice(number=both),
        pb.ReleaseChoice(unpatched=True, draft=draft),
    ]
    for mode in (pb.COMPARE_MODE_NEXT_TOKEN, pb.COMPARE_MODE_SCORE):
        request = pb.CompareRequest(prompt=PROMPT, releases=choices, mode=mode)
        found = (await system.inference.Compare(request, metadata=key)).releases
        results = [(one.next.SerializeToString(), one.score.SerializeToString()) for one in found]
        assert results[2] == results[4], "a draft over a release is what the release of both would be"
        assert len(set(results)) == 5, "and the others are all different"
        assert [bool(one.served.draft_digest) for one in found] == [False, False, True, True, False, True]
        assert [one.served.release for one in found] == [0, 1, 1, 1, both, 0]


async def test_a_draft_is_compiled_once_and_kept_like_a_release(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backpack_lm.overlay import Overlay

    key = await system.tenant()
    made: list[str] = []
    compile = Overlay.compile

    def counting(release: Any, *rest: Any) -> Overlay:
        made.append(release.digest)
        return compile(release, *rest)

    monkeypatch.setattr(Overlay, "compile", counting)
    answers = [await _ask(system, "Score", _with_draft("Score", copy("king", "queen")), key) for _ in range(3)]
    assert made == [answers[0].served.release_digest]


@pytest.mark.parametrize(
    ("edits", "field", "reason"),
    [
        ([], "draft.edits", "EMPTY"),
        ([ipb.Edit()], "draft.edits[0]", "UNKNOWN_KIND"),
        ([_scale("king", 1.0)], "draft.edits[0].factor", "ZERO_EFFECT"),
        ([_scale("king", 2.0, 99)], "draft.edits[0].cells", "BAD_SENSE_INDEX"),
        ([copy("unpronounceableness", "king")], "draft.edits[0].copy.cells[0].word", "NOT_ONE_TOKEN"),
    ],
)
@pytest.mark.parametrize("method", ["Score", "GenerateStream"])
async def test_a_bad_draft_is_refused_at_its_place(
    system: System, method: str, edits: list[ipb.Edit], field: str, reason: str
) -> None:
    key = await system.tenant()
    with pytest.raises(ServiceError) as refused:
        await _ask(system, method, _with_draft(method, *edits), key)
    assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", reason)
    assert field in refused.value.message


async def test_a_bad_draft_of_a_comparison_is_refused_at_its_place(system: System) -> None:
    key = await system.tenant()
    bad, good = pb.Draft(edits=[_scale("king", 1.0)]), pb.Draft(edits=[copy("king", "ship")])
    many = [pb.Draft(edits=[_scale("king", 0.5 + n / 100)]) for n in range(17)]
    for drafts, field, reason in (
        ([good, bad], "releases[1].draft.edits[0].factor", "ZERO_EFFECT"),
        ([good, good], "releases[1]", "DUPLICATE"),
        (many, "releases", "TOO_MANY_DRAFTS"),
    ):
        releases = [pb.ReleaseChoice(unpatched=True, draft=draft) for draft in drafts]
        with pytest.raises(ServiceError) as refused, rpc.errors():
            await system.inference.Compare(pb.CompareRequest(prompt=PROMPT, releases=releases), metadata=key)
        assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", reason)
        assert field in refused.value.message


async def test_what_only_shows_when_a_draft_is_applied_is_the_callers_mistake(system: System) -> None:
    """Over a release that is full, there is no room for it."""
    key = await system.tenant()
    full, _ = await _release_of(system, key, *[(_scale("king", 0.5 + n / 100),) for n in range(8)])
    with pytest.raises(ServiceError) as refused:
        await _ask(system, "Score", _with_draft("Score", copy("king", "ship"), release=full), key)
    assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", "TOO_MANY_REVISIONS")
    assert "9 revisions, the draft among them" in refused.value.message


async def test_only_who_may_author_may_try(system: System) -> None:
    tenant = await system.tenant()
    name = (await _ask(system, "Score", REQUESTS["Score"], tenant)).served.tenant
    request = ipb.CreateApiKeyRequest(parent=f"tenants/{name}", roles=[ipb.ROLE_CALLER])
    caller = rpc.with_key((await system.tenants.CreateApiKey(request, metadata=system.admin)).secret)

    await eventually(lambda: system.inference.GetModel(pb.GetModelRequest(), metadata=caller))
    for method in REQUESTS:
        with pytest.raises(ServiceError) as refused:
            await _ask(system, method, _with_draft(method, copy("king", "ship")), caller)
        assert (refused.value.code, refused.value.reason) == ("PERMISSION_DENIED", "MISSING_ROLE")
    releases = [pb.ReleaseChoice(unpatched=True, draft=pb.Draft(edits=[copy("king", "ship")]))]
    with pytest.raises(ServiceError) as refused, rpc.errors():
        await system.inference.Compare(pb.CompareRequest(prompt=PROMPT, releases=releases), metadata=caller)
    assert refused.value.reason == "MISSING_ROLE"
