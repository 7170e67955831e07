"""A link over real gRPC, on a real disk: what holds is on disk first, and it goes on until it is told to end."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from backpack_lm.manifest import Manifest
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_proto.v1 import sync_pb2 as spb
from backpack_serving import rpc, tasks
from backpack_serving.errors import InvalidRequest, PreconditionFailed, Unavailable
from backpack_serving.interventions import bootstrap as interventions
from backpack_serving.observability.metrics import Metrics
from backpack_serving.references import CanaryTally, ReaderKind, Refusal
from backpack_serving.settings import Settings
from backpack_serving.sync.snapshot_file import SnapshotFile
from backpack_serving.sync.state import Stageable
from backpack_serving.sync.transport import run_forever
from structlog.testing import capture_logs

from tests.e2e.conftest import System
from tests.promises.follower import Follower
from tests.promises.proxy import FaultProxy
from tests.waiting import eventually


@pytest_asyncio.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    """An intervention service alone."""
    settings = Settings(state=tmp_path, drain=0.2, interventions_address="127.0.0.1:0")
    control = await interventions.start(settings, Metrics())
    system = System(control.address, control.address, settings)
    yield system
    await system.close()
    await control.stop()


def _follower(system: System, kind: ReaderKind, address: str = "") -> Follower:
    settings = system.settings
    fingerprint = Manifest.read(settings.model).fingerprint
    key, file = settings.key_for("replica"), settings.state / "reader" / "view"
    return Follower(kind, address or system.interventions, key, file, fingerprint)


async def _tenant(system: System, name: str) -> int:
    """A write that gateways are told of, and that only moves a replica's position; its revision."""
    request = ipb.CreateTenantRequest(tenant_id=name)
    return int((await system.tenants.CreateTenant(request, metadata=system.admin)).position.revision)


async def _reached(follower: Follower, revision: int) -> None:
    async def check() -> bool:
        return follower.client.view.position.revision >= revision

    await eventually(check)


async def test_p6_a_position_that_moves_alone_is_on_disk_before_it_holds(system: System) -> None:
    request = ipb.CreateApiKeyRequest(parent="tenants/acme", roles=[ipb.ROLE_AUTHOR])
    await _tenant(system, "acme")
    key = rpc.with_key((await system.tenants.CreateApiKey(request, metadata=system.admin)).secret)
    follower = _follower(system, ReaderKind.GATEWAY)
    await follower.start()
    for turn in range(8):  # readers aren't told of patches
        patch = ipb.CreatePatchRequest(patch_id=f"p{turn}")
        made = await system.patches.CreatePatch(patch, metadata=key)
        await _reached(follower, made.position.revision)
        if turn % 2:
            await follower.stop()  # at once: there is no second in which the position might still be written
            await follower.start()
            assert follower.client.view.position.revision >= made.position.revision
    await follower.stop()
    assert not follower.early
    positions = [view.position for view in follower.seen]
    assert positions == sorted(positions)


async def test_a_whole_file_that_is_no_view_is_as_good_as_none(system: System) -> None:
    follower = _follower(system, ReaderKind.GATEWAY)
    SnapshotFile(follower.file).write(b"\x04\0\0\0of a release")
    with capture_logs() as logs:
        await follower.start()
    assert str(follower.file) in [line.get("file") for line in logs]
    await _reached(follower, await _tenant(system, "acme"))
    assert follower.on_disk.position == follower.client.view.position
    await follower.stop()


async def test_p6_views_are_written_to_disk_one_after_the_other(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams break while the disk writes: the next stream's view must not be written beside it."""
    sync, writing, together = os.fsync, threading.Lock(), []

    def fsync(descriptor: int) -> None:
        if not writing.acquire(blocking=False):
            together.append(descriptor)
            return
        time.sleep(0.3)
        sync(descriptor)
        writing.release()

    proxy = await FaultProxy(system.interventions).start()
    follower = _follower(system, ReaderKind.GATEWAY, proxy.address)
    await follower.start()
    await _reached(follower, 1)
    monkeypatch.setattr("backpack_serving.sync.snapshot_file.os.fsync", fsync)
    for turn in range(12):
        revision = await _tenant(system, f"t{turn}")
        await asyncio.sleep(0.15)
        proxy.reset()
    await _reached(follower, revision)
    assert follower.on_disk == follower.client.view
    await follower.stop()
    await proxy.stop()
    assert not together
    assert not follower.early
    assert follower.on_disk == follower.seen[-1], "what was written last is what holds"


@pytest.mark.parametrize("counts", [(20, 20, -1), (-5, -5, -5), (1, 2, 0), (2**53 + 1, 0, 0)])
async def test_counts_that_no_gateway_can_have_are_refused(system: System, counts: tuple[int, int, int]) -> None:
    """A negative number of answers ended a canary; enormous ones made a tenant's question an internal error."""
    requests, errors, non_finite = counts
    tally = spb.Tally(tenant="acme", channel="live", requests=requests, errors=errors, non_finite=non_finite)
    hello = spb.Hello(
        kind=spb.READER_KIND_GATEWAY,
        incarnation="x",
        model_fingerprint=Manifest.read(system.settings.model).fingerprint,
        whole=True,
    )
    said = [spb.SyncRequest(hello=hello), spb.SyncRequest(report=spb.Report(tallies=[tally]))]
    with pytest.raises(InvalidRequest, match=r"report\.tallies"), rpc.errors():
        async for _ in system.sync.Sync(iter(said), metadata=system.replica):
            pass


async def test_a_transport_goes_on_after_a_message_that_can_not_be_sent(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC gives such a call up by cancelling it: to who reads from it that looks like being told to end."""
    bad = [(CanaryTally("acme", "live", "ab", requests=2**64, errors=0),)]
    follower = _follower(system, ReaderKind.GATEWAY)
    monkeypatch.setattr(follower, "tallies", lambda: bad.pop() if bad else ())
    await follower.start()

    async def sent() -> bool:
        return not bad

    await eventually(sent)
    await _reached(follower, await _tenant(system, "after"))
    await follower.stop()


@pytest.mark.parametrize(
    ("kind", "at"), [(ReaderKind.GATEWAY, "stage"), (ReaderKind.GATEWAY, "swapped"), (ReaderKind.REPLICA, "swapped")]
)
async def test_a_transport_goes_on_after_a_mistake_of_its_owner(
    system: System, monkeypatch: pytest.MonkeyPatch, kind: ReaderKind, at: str
) -> None:
    """Where a stream stages and swaps, and beside it, where a replica's position moves alone."""
    follower = _follower(system, kind)
    await follower.start()
    await _reached(follower, await _tenant(system, "before"))
    right, mistakes = getattr(follower, at), [RuntimeError("a mistake")]

    def wrong_once(*args: object) -> object:
        if mistakes:
            raise mistakes.pop()
        return right(*args)

    monkeypatch.setattr(follower, at, wrong_once)
    for name in ("during", "after"):
        await _reached(follower, await _tenant(system, name))
    await follower.stop()
    assert not mistakes


async def test_what_was_refused_is_tried_again_after_a_mistake(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    follower = _follower(system, ReaderKind.REPLICA)
    await follower.start()
    await _reached(follower, 1)
    tries = 0

    async def stage(work: tuple[Stageable, ...]) -> tuple[Refusal, ...]:
        nonlocal tries
        tries += bool(work)
        if tries == 2:
            raise RuntimeError("a mistake")
        refusals = (Refusal(*change.key, change.serving[0].digest, "LATER", "not now", False) for change in work)
        return tuple(refusals) if tries < 3 else ()

    monkeypatch.setattr(follower, "stage", stage)
    await _tenant(system, "acme")  # with a channel

    async def known() -> bool:
        return ("acme", "live") in follower.client.view.channels

    await eventually(known)
    await follower.stop()
    assert tries == 3


async def test_whatever_ends_a_stream_another_one_follows() -> None:
    mistakes, again = [RuntimeError("a mistake"), OSError(28, "No space left on device")], asyncio.Event()

    async def once() -> None:
        if mistakes:
            raise mistakes.pop()
        again.set()
        await asyncio.sleep(60)

    task = asyncio.create_task(run_forever(once, "test"))
    async with asyncio.timeout(30):
        await again.wait()
    await tasks.end(task)
    assert task.cancelled()


async def test_why_a_stream_does_not_come_back_is_told_after_why_it_was_lost() -> None:
    """What a restored store or a new key refuses came after "this server is stopping", and was never told."""
    why = [
        Unavailable("DRAINING", "stopping"),
        Unavailable("TRANSPORT", "refused"),
        Unavailable("TRANSPORT", "refused by another"),
        PreconditionFailed("STORE_WENT_BACK", "raise the epoch"),
        Unavailable("TRANSPORT", "refused"),
    ]
    again = asyncio.Event()

    async def once() -> None:
        if why:
            raise why.pop(0)
        again.set()
        await asyncio.sleep(60)

    with capture_logs() as logs:
        task = asyncio.create_task(run_forever(once, "test"))
        async with asyncio.timeout(60):
            await again.wait()
        await tasks.end(task)
    assert [entry["reason"] for entry in logs] == ["stopping", "refused", "raise the epoch"]


async def test_a_cancellation_is_not_lost_to_an_error_that_comes_with_it() -> None:
    began = asyncio.Event()

    async def once() -> None:
        again = began.is_set()
        began.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if again:
                raise
            raise Unavailable("TRANSPORT", "the connection was reset in the same moment") from None

    task = asyncio.create_task(run_forever(once, "test"))
    await began.wait()
    task.cancel()
    await asyncio.wait([task], timeout=60)
    ended = task.cancelled()
    await tasks.end(task)
    assert ended


async def test_what_must_be_finished_is_finished_before_a_cancellation_is_raised() -> None:
    done: list[int] = []

    async def work() -> None:
        await asyncio.sleep(0.2)
        done.append(1)

    task = asyncio.create_task(tasks.finish(work()))
    for _ in range(3):
        await asyncio.sleep(0.01)
        task.cancel()
    await asyncio.wait([task], timeout=60)
    assert task.cancelled()
    assert done == [1]
