"""A release that was just made is judged by a replica before a channel moves to it, whoever asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from backpack_proto.v1 import edits_pb2, interventions_pb2, sync_pb2
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.errors import Forbidden, PreconditionFailed

from tests.e2e.conftest import Metadata, System, copy, running

ipb = interventions_pb2
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: Any) -> AsyncIterator[System]:
    async with running(tmp_path_factory.mktemp("judged"), slots=4, degradation=0.05) as system:
        yield system


def remove(*words: str) -> ipb.Edit:
    cells = [ipb.Cells(word=pb.Word(text=word)) for word in words]
    return ipb.Edit(scale=edits_pb2.ScaleEdit(cells=cells, factor=0.0))


COMMON = remove("the", "of", "and", "to", "in", "a")
"""Makes every text worse, by far more than is allowed."""


async def move(system: System, key: Metadata, release: int, allow: bool = False) -> ipb.Channel:
    at = await system.releases.GetChannel(ipb.GetChannelRequest(name="channels/live"), metadata=key)
    request = ipb.ActivateRequest(
        channel="channels/live", release=release, etag=at.channel.etag, allow_degradation=allow
    )
    with rpc.errors():
        return (await system.releases.Activate(request, metadata=key)).channel


async def judged(system: System, key: Metadata, number: int) -> ipb.Release:
    """The release, once it is judged."""
    request = ipb.GetReleaseRequest(name=f"releases/{number}")
    async with asyncio.timeout(30):
        while True:
            found = (await system.releases.GetRelease(request, metadata=key)).release
            if found.HasField("judgement"):
                return found
            await asyncio.sleep(0.05)


async def test_who_never_asks_is_told_all_the_same(system: System) -> None:
    key = await system.tenant()
    worse, harmless = await system.release(key, COMMON), await system.release(key, copy("nurse", "doctor"))
    with pytest.raises(PreconditionFailed, match=r"perplexity of ordinary text .* and 5.0% is the most") as caught:
        await move(system, key, worse)
    assert caught.value.reason == "DEGRADES"
    assert (await move(system, key, harmless)).judgement.endswith("%)")
    assert (await move(system, key, worse, allow=True)).judgement.endswith("%), allowed")
    entries = await system.audit.ListAuditEntries(ipb.ListAuditEntriesRequest(page_size=1), metadata=key)
    assert entries.entries[0].judgement.endswith("%), allowed")

    asked = await system.inference.Judge(pb.JudgeRequest(release=worse, limit=1), metadata=key)
    kept = (await judged(system, key, worse)).judgement
    assert (kept.tokens, kept.perplexity_before, kept.perplexity_after) == (
        asked.tokens,
        asked.perplexity_before,
        asked.perplexity_after,
    )


async def test_all_releases_of_a_burst_are_judged(system: System) -> None:
    key = await system.tenant()
    numbers = [await system.release(key, remove(word)) for word in ("the", "of", "and", "to")]
    found = [await judged(system, key, number) for number in numbers]
    assert len({release.judgement.perplexity_after for release in found}) == len(found)


async def test_only_gateways_and_replicas_report_judgements(system: System) -> None:
    key = await system.tenant()
    request = sync_pb2.RecordJudgementRequest(tenant="t0", judgement=ipb.Judgement(tokens=1, perplexity_before=1))
    with pytest.raises(Forbidden), rpc.errors():
        await system.sync.RecordJudgement(request, metadata=key)


async def test_a_deleted_release_serves_nobody(system: System) -> None:
    key = await system.tenant()
    first, second = [await system.release(key, copy("nurse", word)) for word in ("king", "ship")]
    await judged(system, key, second)
    await system.releases.DeleteRelease(ipb.DeleteReleaseRequest(name=f"releases/{first}"), metadata=key)
    listed = await system.releases.ListReleases(ipb.ListReleasesRequest(), metadata=key)
    assert [release.number for release in listed.releases] == [second, 0]
    request = ipb.ListReleasesRequest(show_deleted=True)
    listed = await system.releases.ListReleases(request, metadata=key)
    assert [(release.number, release.deleted) for release in listed.releases] == [
        (second, False),
        (first, True),
        (0, False),
    ]
