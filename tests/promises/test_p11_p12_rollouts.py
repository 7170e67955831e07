"""P11: a rollback fetches nothing and is everywhere at once. P12: canaries are sticky, and end by themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from backpack_lm.installed import folder_of
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_proto.v1 import sync_pb2 as spb
from backpack_serving import rpc
from backpack_serving.client import AsyncSteering
from backpack_serving.client import steering as client_steering
from backpack_serving.errors import Expired, ServiceError
from backpack_serving.inference.served_model import ServedModel

from tests.e2e.conftest import Metadata, System, copy
from tests.inference.test_release_cache import hidden_overflow
from tests.promises.conftest import Apart, apart
from tests.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The story of the king and the"
LIVE = "channels/live"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def parts(tmp_path_factory: Any) -> AsyncIterator[Apart]:
    # Few rows, so that a release can be larger than what the engine takes: one that only fails when it is used.
    async with apart(tmp_path_factory.mktemp("state"), overlay_rows=20, canary_requests=10) as parts:
        yield parts


@pytest.fixture(scope="module")
def system(parts: Apart) -> System:
    return parts.system()


async def _channel(system: System, key: Metadata) -> ipb.Channel:
    return (await system.releases.GetChannel(ipb.GetChannelRequest(name=LIVE), metadata=key)).channel


async def _move(system: System, key: Metadata, method: str, wait: Any = ipb.WAIT_ALL, **fields: Any) -> Any:
    etag = (await _channel(system, key)).etag
    request = getattr(ipb, f"{method}Request")(channel=LIVE, etag=etag, wait=wait, **fields)
    request.wait_timeout.FromSeconds(60)
    with rpc.errors():
        return await getattr(system.releases, method)(request, metadata=key)


async def _served(system: System, key: Metadata, request_key: str = "") -> pb.Served:
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=1), request_key=request_key
    )
    return (await system.inference.Generate(request, metadata=key)).served


async def test_p11_activations_and_rollbacks_fetch_nothing_and_the_answer_says_that_all_hold_it(
    parts: Apart, system: System
) -> None:
    key = await system.tenant(copy("king", "ship"))
    last = await system.release(key, copy("king", "nurse"))
    replica = parts.replica
    assert replica is not None
    newest = (await system.releases.ListReleases(ipb.ListReleasesRequest(), metadata=key)).releases[0]

    async def staged() -> bool:
        return newest.digest in replica.releases.resident()

    await eventually(staged)  # a release that was just made is got ready before it is activated
    fetched = replica.releases.fetched
    await _move(system, key, "Activate", release=last)
    for turn in range(30):
        answer = await _move(system, key, "Rollback")
        r = answer.rollout
        assert (r.complete, r.replicas, r.replicas_acked, r.gateways_acked) == (True, 1, 1, 1)
        served = await _served(system, key)
        assert served.release == answer.channel.release == (last - 1 if turn % 2 == 0 else last)
    assert replica.releases.fetched == fetched, "a rollback fetched something"


async def test_p12_a_canary_gets_its_share_and_sticks_to_its_keys_through_growth_and_promotion(
    parts: Apart, system: System
) -> None:
    key = await system.tenant(copy("king", "ship"))
    other = await system.release(key, copy("king", "nurse"))
    started = await _move(system, key, "StartCanary", release=other, permille=300)
    assert started.rollout.complete
    assert started.channel.canary.permille == 300
    names = [f"user-{n}" for n in range(150)]
    first = {n: await _served(system, key, n) for n in names}
    assert {served.canary for served in first.values()} == {True, False}
    assert all(served.release == (other if served.canary else 1) for served in first.values())
    taken = {n for n, served in first.items() if served.canary}
    assert abs(len(taken) - 45) < 3 * (150 * 0.3 * 0.7) ** 0.5
    assert {n for n in names if (await _served(system, key, n)).canary} == taken
    grown = await _move(system, key, "StartCanary", release=other, permille=600)
    assert grown.channel.canary.salt == started.channel.canary.salt
    assert taken < {n for n in names if (await _served(system, key, n)).canary}
    promoted = await _move(system, key, "PromoteCanary")
    assert not promoted.channel.HasField("canary")
    assert {(await _served(system, key, n)).release for n in names[:20]} == {other}
    assert (await _move(system, key, "Rollback")).channel.release == 1


def _hidden_overflow() -> list[ipb.Edit]:
    """Edits that are each allowed, and together amount to vectors that no sum can hold."""
    served = ServedModel.read(folder_of("micro"))
    (king,) = served.tokenizer.word_ids("king")
    cells = [ipb.Cells(word=pb.Word(text="king"))]
    scales = hidden_overflow(served, king, 3e38)
    return [ipb.Edit(scale=ipb.ScaleEdit(cells=cells, factor=scale.factor)) for scale in scales]


async def test_p12_a_canary_that_a_replica_refuses_ends_by_itself(system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    bad = await system.release(key, *_hidden_overflow())
    answer = await _move(system, key, "StartCanary", release=bad, permille=500)
    assert not answer.rollout.complete
    assert "NON_FINITE" in answer.rollout.refusals[0]

    async def ended() -> ipb.Channel | None:
        channel = await _channel(system, key)
        return None if channel.HasField("canary") else channel

    channel = await eventually(ended)
    assert channel.release == 1
    assert "NACK" in channel.canary_abort_reason
    assert "NON_FINITE" in channel.canary_abort_reason
    entries = (await system.audit.ListAuditEntries(ipb.ListAuditEntriesRequest(), metadata=key)).entries
    assert (entries[0].method, entries[0].principal) == ("AbortCanary", "tenants/system/keys/canary-guard")
    await eventually(lambda: _all_stable(system, key))
    with pytest.raises(ServiceError) as none:
        await _move(system, key, "AbortCanary")
    assert (none.value.code, none.value.reason) == ("FAILED_PRECONDITION", "NO_CANARY")


async def _all_stable(system: System, key: Metadata) -> bool:
    served = [await _served(system, key, f"user-{n}") for n in range(20)]
    return not any(s.canary for s in served)


async def test_p12_a_canary_whose_requests_fail_trips_the_error_gate(system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    large = await system.release(key, copy("king", "ship"), copy("nurse", "ship"), copy("sea", "ship"))
    assert (await _move(system, key, "StartCanary", release=large, permille=500)).rollout.complete
    outcomes: Counter[str] = Counter()

    async def aborted() -> str:
        for n in range(20):
            try:
                with rpc.errors():
                    await _served(system, key, f"user-{n}")
                outcomes["ok"] += 1
            except ServiceError as error:
                assert error.reason == "RELEASE_TOO_LARGE"
                outcomes["failed"] += 1
        return (await _channel(system, key)).canary_abort_reason

    assert "ERROR_GATE" in await eventually(aborted)
    await eventually(lambda: _all_stable(system, key))
    assert outcomes["failed"] >= 10
    assert outcomes["ok"] >= 5, "the channel's own release went on"


async def test_fleet_says_who_holds_what_and_who_refuses(parts: Apart, system: System) -> None:
    key = await system.tenant(copy("king", "ship"))
    bad = await system.release(key, *_hidden_overflow())

    async def states() -> list[tuple[int, int]]:
        request = spb.GetRolloutRequest(channel=LIVE)
        answer = await system.fleet.GetRollout(request, metadata=key)
        return [(hold.kind, hold.state) for hold in answer.holds]

    held = [
        (spb.READER_KIND_REPLICA, spb.HOLD_STATE_ACKED),
        (spb.READER_KIND_GATEWAY, spb.HOLD_STATE_ACKED),
    ]

    async def is_held() -> bool:
        return await states() == held

    await eventually(is_held)
    answer = await _move(system, key, "Activate", release=bad, wait=ipb.WAIT_QUORUM)
    assert (answer.rollout.complete, answer.rollout.replicas_acked, answer.rollout.replicas) == (False, 0, 1)

    async def is_refused() -> bool:  # the answer came with the replica's refusal; the gateway may hear of it later
        return await states() == [(spb.READER_KIND_REPLICA, spb.HOLD_STATE_NACKED), held[1]]

    await eventually(is_refused)
    # Never unpatched: what was refused is an error until somebody decides, and a rollback is enough.
    with pytest.raises(ServiceError) as refused, rpc.errors():
        await _served(system, key)
    assert (refused.value.code, refused.value.reason) == ("FAILED_PRECONDITION", "NON_FINITE")
    assert (await _move(system, key, "Rollback")).rollout.complete
    assert (await _served(system, key)).release == 1
    assert await states() == held

    readers = await system.fleet.ListReaders(spb.ListReadersRequest(), metadata=system.admin)
    assert [r.kind for r in readers.readers] == [spb.READER_KIND_REPLICA, spb.READER_KIND_GATEWAY]
    assert all(r.connected for r in readers.readers)
    with pytest.raises(ServiceError) as forbidden, rpc.errors():
        await system.fleet.ListReaders(spb.ListReadersRequest(), metadata=key)
    assert forbidden.value.code == "PERMISSION_DENIED"

    parts.proxy.half_open()

    async def stale() -> bool:
        return {state for _, state in await states()} == {spb.HOLD_STATE_STALE}

    await eventually(stale)
    waited = ipb.ActivateRequest(channel=LIVE, release=0, etag=(await _channel(system, key)).etag, wait=ipb.WAIT_ALL)
    waited.wait_timeout.FromMilliseconds(300)
    told = await system.releases.Activate(waited, metadata=key)
    assert (told.channel.release, told.rollout.complete) == (0, False), "the change is made, and not held yet"
    async with AsyncSteering(system.interventions, key[0][1].removeprefix("Bearer ")) as steering:
        with pytest.raises(Expired, match=r"release 0 isn't held after 0\.3 s") as late:
            await steering.until_held(seconds=0.3)
        assert late.value.reason == "NOT_HELD"
        parts.proxy.heal()
        status = await steering.until_held("live", "all")
    assert [(hold.kind, hold.release, hold.connected) for hold in status.holds] == [
        ("replica", 0, True),
        ("gateway", 0, True),
    ]


async def test_who_holds_a_channel_is_told_in_pages(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await system.tenant(copy("king", "ship"))
    second = await system.release(key, copy("king", "nurse"))
    assert (await _move(system, key, "StartCanary", release=second, permille=500)).rollout.complete
    whole = await system.fleet.GetRollout(spb.GetRolloutRequest(channel=LIVE), metadata=key)
    assert (len(whole.holds), whole.next_page_token) == (4, "")
    seen, request = [], spb.GetRolloutRequest(channel=LIVE, page_size=1)
    for _ in range(3):
        page = await system.fleet.GetRollout(request, metadata=key)
        seen += [(hold.incarnation, hold.release) for hold in page.holds]
        request.page_token = page.next_page_token
    assert request.page_token == ""
    assert seen == [(hold.incarnation, hold.release) for hold in whole.holds]
    with pytest.raises(ServiceError) as bad, rpc.errors():
        await system.fleet.GetRollout(spb.GetRolloutRequest(channel=LIVE, page_token="x"), metadata=key)
    assert bad.value.reason == "BAD_PAGE_TOKEN"

    monkeypatch.setattr(client_steering, "PAGE", 1)
    async with AsyncSteering(system.interventions, key[0][1].removeprefix("Bearer ")) as client:
        assert [(hold.kind, hold.release) for hold in (await client.status()).holds] == [
            ("replica", 1),
            ("replica", second),
            ("gateway", 1),
            ("gateway", second),
        ]
        call = client._call

        async def moved_after_the_first_page(method: Any, request: Any, timeout: float | None = None) -> Any:
            page = await call(method, request, timeout)
            if method == client._rollout_stub.GetRollout and page.channel.release == 1:
                await _move(system, key, "PromoteCanary")
            return page

        monkeypatch.setattr(client, "_call", moved_after_the_first_page)
        status = await client.status()
        assert status.channel.release == second
        assert [(hold.kind, hold.release) for hold in status.holds] == [("replica", second), ("gateway", second)]


@pytest.mark.parametrize(
    ("method", "fields", "code", "reason"),
    [
        ("StartCanary", {"release": 1, "permille": 0}, "INVALID_ARGUMENT", "OUT_OF_RANGE"),
        ("StartCanary", {"release": 1, "permille": 1000}, "INVALID_ARGUMENT", "OUT_OF_RANGE"),
        ("StartCanary", {"release": 9, "permille": 5}, "NOT_FOUND", "NO_SUCH_RELEASE"),
        ("StartCanary", {"release": 1, "permille": 5}, "FAILED_PRECONDITION", "SAME_RELEASE"),
        ("StartCanary", {"release": 1, "permille": 5, "salt": "\n"}, "INVALID_ARGUMENT", "BAD_SALT"),
        ("PromoteCanary", {}, "FAILED_PRECONDITION", "NO_CANARY"),
        ("Activate", {"release": 1, "wait": 9}, "INVALID_ARGUMENT", "UNKNOWN_VALUE"),
    ],
)
async def test_bad_moves_are_refused(
    system: System, method: str, fields: dict[str, Any], code: str, reason: str
) -> None:
    if "key" not in _shared:
        _shared["key"] = await system.tenant(copy("king", "ship"))
    with pytest.raises(ServiceError) as refused:
        await _move(system, _shared["key"], method, **fields)
    assert (refused.value.code, refused.value.reason) == (code, reason)


_shared: dict[str, Metadata] = {}
