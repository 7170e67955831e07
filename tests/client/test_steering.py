"""Steering and operating through both kinds of client, against a system that serves."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from backpack_proto.v1 import interventions_pb2_grpc as grpc_v1
from backpack_serving import client as clients
from backpack_serving import rpc
from backpack_serving.client import (
    Add,
    AlreadyExists,
    AsyncClient,
    AsyncOperator,
    AsyncSteering,
    Bias,
    Cells,
    Conflict,
    Copy,
    Draft,
    Forbidden,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    ProjectOut,
    Role,
    Sampling,
    Scale,
    ServiceError,
    Set,
    Swap,
    Tally,
    Token,
    Topic,
    Unavailable,
    Vector,
)
from backpack_serving.client.connection import Connected
from safetensors.numpy import save

from tests.e2e.conftest import System, running
from tests.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The story of the king and the"
GREEDY = Sampling(max_tokens=8, temperature=0.0)


class Threaded:
    """A blocking client, whose methods are called in a thread and awaited: one test is for both kinds."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self.client, name)
        return lambda *args, **named: asyncio.to_thread(method, *args, **named)


@dataclass
class Calls:
    """Clients of one kind, for one new tenant. Typed as the coroutines are; `Threaded` has the same."""

    steering: AsyncSteering
    text: AsyncClient
    operator: AsyncOperator
    tenant: str
    address: str


NAMES = (f"tenant-{number}" for number in itertools.count())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: Any) -> AsyncIterator[System]:
    async with running(tmp_path_factory.mktemp("state"), slots=4) as system:
        yield system


@pytest_asyncio.fixture(params=["async", "blocking"], loop_scope="module")
async def calls(request: Any, system: System) -> AsyncIterator[Calls]:
    async with _calls(system, request.param == "blocking") as made:
        yield made


@asynccontextmanager
async def _calls(system: System, blocking: bool) -> AsyncIterator[Calls]:
    def of(kind: type[Connected], address: str, key: str) -> Any:
        if blocking:
            return Threaded(getattr(clients, kind.__name__.removeprefix("Async"))(address, key))
        return kind(address, key)

    operator = of(AsyncOperator, system.interventions, system.settings.key_for("admin"))
    tenant = next(NAMES)
    assert (await operator.create_tenant(tenant)).id == tenant
    made = await operator.create_key(tenant, [Role.RELEASER, "caller"])
    opened = (
        of(AsyncSteering, system.interventions, made.secret),
        of(AsyncClient, system.gateway, made.secret),
        operator,
    )
    yield Calls(*opened, tenant, system.interventions)
    for each in opened:
        await each.close()


async def _known(text: AsyncClient) -> None:
    """Until the gateway has heard of the key."""
    await eventually(text.model, passing=("UNAUTHENTICATED",))


async def test_from_a_patch_to_steered_text_and_back(calls: Calls) -> None:
    steering, text = calls.steering, calls.text
    await _known(text)
    plain = await text.generate(PROMPT, GREEDY)
    patch = await steering.create_patch("royal", "a king is a ship")
    assert (patch.id, patch.name, patch.newest) == ("royal", f"tenants/{calls.tenant}/patches/royal", 0)

    draft = await steering.create_revision("royal", [Copy("king", source="ship")], dry_run=True)
    revision = await steering.create_revision("royal", [Copy("king", source="ship")])
    assert (revision.id, revision.number, revision.digest) == ("royal:1", 1, draft.digest)
    assert revision.model == (await text.model()).fingerprint
    assert await steering.revision("royal") == await steering.revision("royal", 1) == revision
    assert await steering.revisions("royal") == (replace(revision, edits=()),)
    assert (await steering.patch("royal")).newest == 1

    release = await steering.create_release([revision, "royal:1"], "twice is as once")
    assert (release.number, release.revisions, release.notes) == (1, ("royal:1", "royal:1"), "twice is as once")
    assert await steering.release(1) == release == (await steering.releases())[0]
    before = await steering.channel()
    assert (before.id, before.release, before.previous) == ("live", 0, None)

    move = await steering.activate(release.number, wait="all", wait_seconds=30)
    assert (move.channel.release, move.channel.digest, move.channel.previous) == (1, release.digest, 0)
    assert move.rollout is not None
    assert move.rollout.complete
    assert (move.rollout.replicas_holding, move.rollout.gateways_holding) == (1, 1)
    steered = await text.generate(PROMPT, GREEDY, since=move.at)
    assert (steered.served.release, steered.served.digest) == (1, release.digest)
    assert steered.served.at >= move.at
    assert steered.text != plain.text
    held = await steering.until_held()
    assert (held, held.channel) == (await steering.status(), move.channel)

    back = await steering.rollback(etag=move.channel.etag)
    assert (back.channel.release, back.channel.previous, back.rollout) == (0, 1, None)
    assert (await text.generate(PROMPT, GREEDY, since=back.at)).text == plain.text
    assert await steering.channels() == (back.channel,)


async def test_every_edit_is_read_back_as_what_it_was(calls: Calls) -> None:
    steering = calls.steering
    await steering.create_patch("every")
    vector = Vector.of([0.01] * await _width(calls))
    written = (
        Scale("king", 0.5),
        Scale(["queen", Cells("court", (0, 3))], 0.0),
        Add(Cells("ship", (1,)), list(vector.values())),
        Set(Cells("ship", (2,)), vector),
        Copy(Cells("sea", (4,)), "land", source_sense=5),
        ProjectOut("nurse", "she"),
        Swap("ship", old="sea", new="land"),
        Topic(["sea", "sailing"], strength=2, constant=True),
        Bias(["sea", 7], -2.5),
        Bias(["kingdomless"], -math.inf, tokens="first"),
        Scale(Cells("kingdomless", (0,), tokens="first"), 0.5),
    )
    revision = await steering.create_revision("every", written)
    read = (await steering.revision("every", 1)).edits
    assert read == revision.edits
    assert [type(edit) for edit in read] == [type(edit) for edit in written]
    (first, second, third, *_), last = read[:4], read[-1]
    assert isinstance(first, Scale)
    assert isinstance(second, Scale)
    assert isinstance(third, Add)
    assert isinstance(last, Scale)
    assert [cells.word.text for cells in second.cells] == [" queen", " court"]  # type: ignore[union-attr]
    assert [cells.senses for cells in second.cells] == [tuple(range(8)), (0, 3)]  # type: ignore[union-attr]
    assert third.delta == vector
    assert isinstance(last.cells[0].word, Token)  # type: ignore[index, union-attr]
    again = await steering.create_revision("every", read)
    assert (again.digest, again.id) == (revision.digest, "every:2"), "what is read may be written"


async def _width(calls: Calls) -> int:
    await _known(calls.text)
    return (await calls.text.model()).width


async def test_a_stale_etag_overrules_nobody(calls: Calls) -> None:
    steering = calls.steering
    await _released(steering, 2)
    seen = await steering.channel()
    theirs = (await steering.activate(2)).channel
    for late in (
        lambda: steering.activate(1, etag=seen.etag),
        lambda: steering.rollback(etag=seen.etag),
        lambda: steering.start_canary(1, 50, etag=seen.etag),
    ):
        with pytest.raises(Conflict, match="Read it again, then decide") as stale:
            await late()
        assert stale.value.reason == "STALE_ETAG"
        assert stale.value.metadata == {"given": seen.etag, "current": theirs.etag}
    assert await steering.channel() == theirs


async def test_a_canary_is_started_watched_and_decided(calls: Calls) -> None:
    steering, text = calls.steering, calls.text
    await _known(text)
    await _released(steering, 1)
    started = await steering.start_canary(1, 500, salt="s", wait="quorum", wait_seconds=30)
    canary = started.channel.canary
    assert canary is not None
    assert (canary.release, canary.permille, canary.salt, started.channel.release) == (1, 500, "s", 0)
    served = [(await text.generate("x", Sampling(1), request_key=str(n), since=started.at)).served for n in range(12)]
    assert {(one.release, one.canary) for one in served} == {(0, False), (1, True)}
    status = await steering.status()
    assert status.channel == started.channel
    assert [(h.kind, h.release, h.canary, h.state, h.why) for h in status.holds] == [
        (kind, release, release == 1, "acked", "") for kind in ("replica", "gateway") for release in (0, 1)
    ]
    assert all(hold.at >= started.at for hold in status.holds)
    under = sum(one.canary for one in served)

    async def told() -> bool:
        return (await steering.status()).tally == Tally(requests=under, failed=0)

    await eventually(told)  # gateways tell once a second
    assert (await steering.start_canary(1, 900)).channel.canary == replace(canary, permille=900)
    assert (await steering.abort_canary()).channel.canary is None
    await steering.start_canary(1, 1)
    promoted = (await steering.promote_canary()).channel
    assert (promoted.release, promoted.previous, promoted.canary) == (1, 0, None)
    with pytest.raises(PreconditionFailed, match="has no canary"):
        await steering.promote_canary()


async def test_who_waits_for_a_refused_release_is_told(calls: Calls) -> None:
    steering = calls.steering
    await steering.create_patch("bad")
    # Many edits, each allowed, that together make vectors too large for float32.
    revision = await steering.create_revision("bad", [Scale("king", 8.0)] * 50)
    release = await steering.create_release([revision])
    move = await steering.activate(release.number, wait="all", wait_seconds=30)
    assert move.rollout is not None
    assert (move.rollout.complete, move.rollout.replicas_holding) == (False, 0)
    assert "OVERFLOW" in move.rollout.refusals[0]
    with pytest.raises(PreconditionFailed, match=r"live, release 1 is refused .*; roll back") as refused:
        await steering.until_held()
    assert refused.value.reason == "REFUSED"

    async def answered() -> bool:
        return [hold.state for hold in (await steering.status()).holds] == ["nacked", "acked"]

    await eventually(answered)  # the refusal ends the wait; the gateway may answer later
    await steering.rollback()
    assert (await steering.until_held(wait="quorum", seconds=30)).channel.release == 0


async def test_lists_are_read_to_their_end(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    steering = calls.steering
    await _released(steering, 5)
    for name in ("b", "c"):
        await steering.create_patch(name)
    assert (await steering.describe_patch("b", "what for")).description == "what for"
    assert (await steering.delete_patch("c")).deleted
    monkeypatch.setattr("backpack_serving.client.connection.PAGE", 2)
    assert [release.number for release in await steering.releases()] == [5, 4, 3, 2, 1, 0]
    assert [release.number for release in await steering.releases(3)] == [5, 4, 3]
    assert [revision.number for revision in await steering.revisions("p")] == [1, 2, 3, 4, 5]
    assert [patch.id for patch in await steering.patches()] == ["b", "p"]
    assert [patch.id for patch in await steering.patches(deleted=True)] == ["b", "c", "p"]
    for name in ("c1", "c2", "c3"):
        await steering.activate(0, name)
    listed = [channel.name.rpartition("/")[2] for channel in await steering.channels()]
    assert listed == ["c1", "c2", "c3", "live"]
    entries = (await steering.audit())[3:]
    assert [entry.method for entry in entries[:2]] == ["DeletePatch", "UpdatePatch"]
    assert {entry.tenant for entry in entries} == {calls.tenant}
    assert [entry.revision for entry in entries] == sorted((e.revision for e in entries), reverse=True)
    assert (await steering.audit(6))[3:] == entries[:3]
    chain = await steering.verify_audit()
    assert chain.intact
    assert chain.entries >= entries[0].revision


async def test_a_file_of_vectors_is_uploaded(calls: Calls, tmp_path: Path) -> None:
    steering, width = calls.steering, await _width(calls)
    content = _vectors(1500, width)
    assert len(content) > 2**20, "more than a message"
    await steering.create_patch("tuned")
    gone: list[int] = []
    draft = await steering.upload_revision("tuned", content, dry_run=True)
    made = await steering.upload_revision("tuned", content, sent=gone.append)
    assert (made.id, made.digest, made.edits) == ("tuned:1", draft.digest, ())
    assert gone == [2**20, len(content)]
    (tmp_path / "tuned.safetensors").write_bytes(content)
    assert (await steering.upload_revision("tuned", tmp_path / "tuned.safetensors")).digest == made.digest
    with pytest.raises(FileNotFoundError):
        await steering.upload_revision("tuned", tmp_path / "gone.safetensors")
    assert (await steering.upload_revision("tuned", content, replace=True)).digest != made.digest
    with pytest.raises(InvalidRequest):
        await steering.upload_revision("tuned", content[:-4])


def _vectors(count: int, width: int) -> bytes:
    """A safetensors file: a vector for sense 0 of so many words."""
    tokens, vectors = np.arange(2000, 2000 + count), np.full((count, width), 0.01, np.float32)
    return save({"tokens": tokens, "senses": np.zeros(count, np.int32), "vectors": vectors})


class Lossy:
    """Passes calls on to a service; of each of these methods it loses the first answer. `sent`: their calls."""

    def __init__(self, stub: Any, *methods: str) -> None:
        self.stub, self.sent = stub, dict.fromkeys(methods, 0)

    def __getattr__(self, name: str) -> Callable[[Any, rpc.Context], Awaitable[Any]]:
        async def passed_on(request: Any, context: rpc.Context) -> Any:
            with rpc.errors():
                answer = await getattr(self.stub, name)(request, metadata=rpc.with_key(rpc.bearer(context)))
            if name in self.sent:
                self.sent[name] += 1
                if self.sent[name] == 1:
                    raise Unavailable("TRANSPORT", "the connection broke", retry_after=0.01)
            return answer

        return passed_on


@pytest.mark.parametrize("blocking", [False, True])
async def test_a_write_whose_answer_is_lost_is_one_write(system: System, blocking: bool) -> None:
    """The service commits, and its answer is lost: the client asks again, with the write's id."""
    patches = Lossy(system.patches, "CreatePatch", "CreateRevision", "UploadRevision")
    releases = Lossy(system.releases, "CreateRelease", "Activate", "Rollback")
    tenants = Lossy(system.tenants, "RotateApiKey")
    services = [
        rpc.Service("backpack.v1.PatchService", grpc_v1.add_PatchServiceServicer_to_server, patches),
        rpc.Service("backpack.v1.ReleaseService", grpc_v1.add_ReleaseServiceServicer_to_server, releases),
        rpc.Service("backpack.v1.TenantService", grpc_v1.add_TenantServiceServicer_to_server, tenants),
    ]
    server = await rpc.start(services, "127.0.0.1:0")
    there = replace(system, interventions=server.address)
    async with AsyncExitStack() as ends:
        ends.push_async_callback(server.stop)
        calls = await ends.enter_async_context(_calls(there, blocking))
        steering = calls.steering
        await steering.create_patch("p")
        revision = await steering.create_revision("p", [Scale("king", 0.5)])
        await steering.upload_revision("p", _vectors(1, await _width(calls)))
        release = await steering.create_release([revision])
        await steering.activate(release.number)
        assert (await steering.rollback()).channel.release == 0
        assert {*patches.sent.values(), *releases.sent.values()} == {2}, "each was sent twice"
        assert (revision.number, (await steering.patch("p")).newest, release.number) == (1, 2, 1)
        assert [made.number for made in await steering.releases()] == [1, 0]
        assert (await steering.channel()).generation == (await _fresh(system, blocking)) + 2

        (key,) = await calls.operator.keys(calls.tenant)
        with pytest.raises(Unavailable):
            await calls.operator.rotate_key(calls.tenant, key.id)
        assert tenants.sent == {"RotateApiKey": 1}, "a secret is told once, and not to who asks again"


async def _fresh(system: System, blocking: bool) -> int:
    """The generation of a channel that nobody has moved."""
    async with _calls(system, blocking) as calls:
        return (await calls.steering.channel()).generation


async def test_tenants_and_keys_are_operated(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, tenant = calls.operator, calls.tenant
    (first,) = await operator.keys(tenant)
    assert (set(first.roles), first.revoked) == ({Role.CALLER, Role.RELEASER}, False)
    rotated = await operator.rotate_key(tenant, first.id)
    assert rotated.secret.startswith("bp_")
    assert rotated.secret not in repr(rotated)
    assert {(key.id, key.revoked) for key in await operator.keys(tenant)} == {
        (first.id, True),
        (rotated.key.id, False),
    }
    await operator.revoke_key(tenant, rotated.key.id)
    assert all(key.revoked for key in await operator.keys(tenant))
    for suspended in (True, False):
        await (operator.suspend if suspended else operator.resume)([tenant])
        assert {t.id: t.suspended for t in await operator.tenants()}[tenant] == suspended
    fleet = await operator.fleet()
    assert [(reader.kind, reader.connected) for reader in fleet.readers] == [("replica", True), ("gateway", True)]
    assert all(reader.silence < 30 for reader in fleet.readers)
    assert fleet.at.revision > 0
    monkeypatch.setattr("backpack_serving.client.operating.PAGE", 1)
    by_one = await operator.fleet()
    assert [reader.name for reader in by_one.readers] == [reader.name for reader in fleet.readers]


async def test_refusals_are_typed_and_name_the_fix(calls: Calls) -> None:
    steering, operator = calls.steering, calls.operator
    await steering.create_patch("p")
    assert (await steering.create_patch("p", exist_ok=True)).id == "p"
    refused: list[tuple[Awaitable[Any], type[ServiceError], str, str]] = [
        (steering.create_patch("p"), AlreadyExists, "PATCH_EXISTS", "add a revision to it"),
        (steering.create_patch("P!"), InvalidRequest, "", "P!"),
        (steering.patch("none"), NotFound, "", "none"),
        (steering.revision("p"), NotFound, "", "revisions/0"),
        (steering.create_revision("p", []), InvalidRequest, "EMPTY", "at least one edit"),
        (steering.create_revision("p", [Scale("kingdomless", 0)]), InvalidRequest, "NOT_ONE_TOKEN", "first token"),
        (steering.create_revision("p", [Scale(-1, 0)]), InvalidRequest, "OUT_OF_RANGE", "no request can hold"),
        (steering.create_revision("p", [Add("king", [1])]), InvalidRequest, "WRONG_WIDTH", "edits[0].delta: 1 number;"),
        (steering.create_revision("p", [Set("king", ["x"])]), InvalidRequest, "OUT_OF_RANGE", "edits[0].vector: ['x']"),  # type: ignore[list-item]
        (steering.create_revision("p", [Set("king", 5)]), InvalidRequest, "OUT_OF_RANGE", "write a list of float32"),  # type: ignore[arg-type]
        (steering.create_revision("p", Scale("king", 0)), InvalidRequest, "OUT_OF_RANGE", "write a list of edits"),  # type: ignore[arg-type]
        (steering.create_revision("p", ["king"]), InvalidRequest, "OUT_OF_RANGE", "edits[0]: 'king'; write an edit"),  # type: ignore[list-item]
        (steering.create_revision("p", [Bias("a", math.inf)]), InvalidRequest, "NON_FINITE", "edits[0].amount: inf"),
        (calls.text.generate("a", draft=[Scale("a", math.nan)]), InvalidRequest, "NON_FINITE", "draft.edits[0].factor"),
        (calls.text.compare("a", [Draft([Scale("a", 9)])]), InvalidRequest, "OUT_OF_RANGE", "releases[0].draft.edits"),
        (steering.create_release(["p"]), InvalidRequest, "BAD_NAME", "write PATCH:NUMBER"),
        (steering.create_release(["p:9"]), NotFound, "", "p/revisions/9"),
        (steering.activate(99), NotFound, "", "releases/99"),
        (steering.activate(2**70), InvalidRequest, "OUT_OF_RANGE", "no request can hold"),
        (steering.activate(0, wait="al"), InvalidRequest, "UNKNOWN_VALUE", "none, quorum or all"),  # type: ignore[arg-type]
        (
            steering.activate(0, wait="all", wait_seconds=float("inf")),
            InvalidRequest,
            "OUT_OF_RANGE",
            "no request",
        ),
        (steering.activate(0, wait="all", wait_seconds=61), InvalidRequest, "OUT_OF_RANGE", "0 to 60 s"),
        (steering.rollback(), PreconditionFailed, "NO_PREVIOUS_RELEASE", "activate one"),
        (steering.rollback("beta"), NotFound, "", "beta"),
        (steering.start_canary(0, 1000), InvalidRequest, "OUT_OF_RANGE", "1 to 999"),
        (operator.create_key(calls.tenant, ["king"]), InvalidRequest, "UNKNOWN_VALUE", "roles are admin"),
    ]
    for call, kind, reason, fix in refused:
        with pytest.raises(kind) as error:
            await call
        assert reason in error.value.reason
        assert fix in error.value.message, error.value.message
    caller = await operator.create_key(calls.tenant, [Role.CALLER])
    async with AsyncSteering(calls.address, caller.secret) as other:
        with pytest.raises(Forbidden, match="needs author"):
            await other.patches()


async def _released(steering: AsyncSteering, count: int) -> None:
    """So many releases, each of a revision of the patch p."""
    await steering.create_patch("p")
    for number in range(count):
        revision = await steering.create_revision("p", [Scale("king", 0.5 + number / 10)])
        await steering.create_release([revision])
