"""P9 and P14 where releases are applied: what isn't exactly what was asked for is refused, never served."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import struct
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from backpack_lm.patch import (
    BiasEdit,
    Cell,
    PatchError,
    ReleaseContent,
    RevisionContent,
    ScaleEdit,
    SetEdit,
    TopicEdit,
    Vector,
    release_digest,
    served_digest,
)
from backpack_serving.errors import DataLoss, Expired, ServiceError, Unauthenticated, Unavailable
from backpack_serving.inference.release_cache import ReleaseCache
from backpack_serving.inference.release_files import ReleaseFiles
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.references import Position, ReleaseRef
from backpack_serving.sync.snapshot_file import SnapshotFile
from backpack_serving.sync.state import ChannelState, StateView


class Shelf:
    """Where releases are fetched from."""

    def __init__(self) -> None:
        self.blobs: dict[str, list[bytes]] = {}
        self.away: type[Exception] = Unavailable

    def put(self, served: ServedModel, *revisions: tuple[ScaleEdit | SetEdit | TopicEdit | BiasEdit, ...]) -> str:
        made = [RevisionContent(served.manifest.fingerprint, edits) for edits in revisions]
        release = ReleaseContent(tuple(made))
        self.blobs[release.digest] = [revision.to_bytes() for revision in made]
        return release.digest

    async def fetch(self, tenant: str, digest: str) -> list[bytes]:
        await asyncio.sleep(0)
        if digest not in self.blobs:
            raise self.away("TRANSPORT", "no answer")
        return self.blobs[digest]


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def make(served: ServedModel, shelf: Shelf, tmp_path: Path) -> Callable[..., ReleaseCache]:
    def make(capacity: int = 2, tenant_bytes: int = 2**26) -> ReleaseCache:
        return ReleaseCache(served, shelf.fetch, ReleaseFiles(tmp_path / "blobs"), capacity, tenant_bytes)

    return make


def _scale(token: int, factor: float = 0.5) -> tuple[ScaleEdit, ...]:
    return (ScaleEdit((Cell(token, 0),), factor),)


def _channel(digest: str, *earlier: str, name: str = "live") -> ChannelState:
    return ChannelState("acme", name, ReleaseRef(1, digest), None, tuple(ReleaseRef(0, d) for d in earlier))


async def _fuzz(served: ServedModel, shelf: Shelf, releases: ReleaseCache, rounds: int) -> int:
    """Damage good bytes in every way; every one must be refused, and nothing be compiled."""
    draw = random.Random(3)
    digest = shelf.put(served, _scale(5), (TopicEdit((7, 8), 2),), (SetEdit((Cell(9, 1),), _vector(served, 0.1)),))
    good, refused = shelf.blobs[digest], 0
    for _ in range(rounds):
        bad = [bytearray(data) for data in good]
        match draw.randrange(6):
            case 0:
                where = draw.choice(bad)
                where[draw.randrange(len(where))] ^= 1 << draw.randrange(8)
            case 1:
                where = draw.choice(bad)
                del where[draw.randrange(len(where)) :]
            case 2:
                draw.choice(bad).extend(draw.randbytes(draw.randint(1, 40)))
            case 3:
                del bad[draw.randrange(len(bad))]
            case 4:
                bad.insert(draw.randrange(len(bad) + 1), bytearray(draw.choice(good)))
            case 5:
                bad[draw.randrange(len(bad))] = bytearray(draw.randbytes(draw.randint(0, 300)))
        shelf.blobs[digest] = [bytes(data) for data in bad]
        if shelf.blobs[digest] == good:
            continue
        with pytest.raises((ServiceError, PatchError)):
            async with releases.use("acme", digest):
                raise AssertionError("damaged bytes were served")
        releases._refused.clear()
        refused += 1
    assert releases.count == 0
    shelf.blobs[digest] = good
    async with releases.use("acme", digest) as overlay:
        assert overlay.digest == digest
        assert not overlay.empty
    return refused


async def test_p9_fuzzed_bytes_are_never_served(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    assert await _fuzz(served, shelf, make(), 400) > 380


@pytest.mark.slow
async def test_p9_fuzzed_bytes_are_never_served_longer(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    assert await _fuzz(served, shelf, make(), 20_000) > 19_000


async def test_p9_another_releases_bytes_are_refused_though_they_are_whole(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    asked, other = shelf.put(served, _scale(5)), shelf.put(served, _scale(6))
    shelf.blobs[asked] = shelf.blobs[other]
    with pytest.raises(DataLoss, match="got the bytes of"):
        async with make().use("acme", asked):
            pass
    shelf.blobs[asked] = []  # the empty release's bytes: none
    with pytest.raises(DataLoss, match=release_digest([])):
        async with make().use("acme", asked):
            pass


def _vector(served: ServedModel, *values: float) -> Vector:
    width = served.manifest.shape.width
    return Vector(struct.pack(f"<{width}f", *(values[n % len(values)] for n in range(width))))


def hidden_overflow(served: ServedModel, token: int, largest: float) -> tuple[ScaleEdit, ...]:
    """Edits that are each allowed, and together make this the largest number of a word's vectors."""
    cells = tuple(Cell(token, sense) for sense in range(served.manifest.shape.num_senses))
    missing = largest / float(served.table.rows[token].abs().max())
    factors = []
    while missing > 8:
        factors.append(8.0)
        missing /= 8
    return tuple(ScaleEdit(cells, factor) for factor in (*factors, missing))


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        (lambda s: (SetEdit((Cell(5, 0),), _vector(s, float("nan"))),), "NON_FINITE"),
        (lambda s: (SetEdit((Cell(5, 0),), _vector(s, float("inf"))),), "NON_FINITE"),
        (lambda s: (SetEdit((Cell(5, 0),), _vector(s, 70_000.0)),), "OVERFLOW"),
        (lambda s: (SetEdit((Cell(5, 0),), _vector(s, 1000.0)),), "NORM_TOO_LARGE"),
        (lambda s: (ScaleEdit((Cell(5, 0),), 1.0),), "ZERO_EFFECT"),
        (lambda s: (ScaleEdit((Cell(5, 0),), 1e30),), "OUT_OF_RANGE"),
        (lambda s: (ScaleEdit(tuple(Cell(5, 0) for _ in range(5000)), 0.5),), "TOO_MANY_CELLS"),
        (lambda s: (ScaleEdit((Cell(10**6, 0),), 0.5),), "UNKNOWN_TOKEN"),
        (lambda s: hidden_overflow(s, 5, 3e38), "NON_FINITE"),
        (lambda s: hidden_overflow(s, 5, 4e38), "OVERFLOW"),
        (lambda s: (BiasEdit((5,), math.nan),), "NON_FINITE"),
        (lambda s: (BiasEdit((5,), 1e30),), "OUT_OF_RANGE"),
        (lambda s: (BiasEdit((10**6,), -math.inf),), "UNKNOWN_TOKEN"),
    ],
    ids=[
        *("nan", "inf", "16-bit", "norm", "zero", "factor", "cells", "token", "sum", "row"),
        *("bias nan", "bias", "bias token"),
    ],
)
async def test_p14_what_was_stored_wrongly_is_refused_again_where_it_is_applied(
    served: ServedModel,
    shelf: Shelf,
    make: Callable[..., ReleaseCache],
    edits: Callable[..., tuple[ScaleEdit | BiasEdit, ...]],
    reason: str,
) -> None:
    releases, digest = make(), shelf.put(served, edits(served))
    refusals = await releases.stage((_channel(digest),))
    assert [(r.reason, r.final, r.digest) for r in refusals] == [(reason, True, digest)]
    for _ in range(3):
        with pytest.raises(PatchError):
            async with releases.use("acme", digest):
                pass
    assert releases.fetched == 1, "what is wrong stays wrong: it isn't fetched again"
    assert releases.count == 0


async def test_revisions_that_forbid_all_words_together_are_refused(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    """As the service sees revisions one by one, and the model here is small enough."""
    tokens = range(served.manifest.shape.vocab_size)
    parts = [BiasEdit(tuple(tokens[at : at + 4096]), -math.inf) for at in range(0, len(tokens), 4096)]
    assert len(parts) <= 8, "revisions of a release"
    releases = make()
    some, every = (shelf.put(served, *((part,) for part in chosen)) for chosen in (parts[1:], parts))
    assert await releases.stage((_channel(some),)) == ()
    (refusal,) = await releases.stage((_channel(every),))
    assert (refusal.reason, refusal.final) == ("NOTHING_LEFT", True)


async def test_a_refusal_that_is_told_again_and_again_keeps_nothing_of_whom_it_was_told(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    releases, digest = make(), shelf.put(served, (ScaleEdit((Cell(5, 0),), 1.0),))
    depths = []
    for _ in range(20):
        with pytest.raises(PatchError) as refused:
            async with releases.use("acme", digest):
                pass
        depths.append(len(list(traceback.walk_tb(refused.value.__traceback__))))
    assert depths[-1] == depths[1]


async def test_p14_a_patch_of_another_model_is_refused(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    revision = RevisionContent("cd" * 32, _scale(5))
    digest = ReleaseContent((revision,)).digest
    shelf.blobs[digest] = [revision.to_bytes()]
    (refusal,) = await make().stage((_channel(digest),))
    assert refusal.reason == "WRONG_MODEL"


async def test_what_cant_be_had_now_may_be_had_later(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    digest = shelf.put(served, _scale(5))
    away, releases = shelf.blobs.pop(digest), make()
    for kind in (Unavailable, Expired, Unauthenticated):
        shelf.away = kind
        (refusal,) = await releases.stage((_channel(digest),))
        assert (refusal.reason, refusal.final) == ("RELEASE_UNREACHABLE", False)
        with pytest.raises(Unavailable, match=f"can't fetch release {digest} now$"):
            async with releases.use("acme", digest):
                pass
    shelf.blobs[digest] = away
    assert await releases.stage((_channel(digest),)) == ()


async def test_a_mistake_with_one_release_refuses_that_one_for_now(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    good, bad = shelf.put(served, _scale(5)), shelf.put(served, _scale(6))
    away, releases = shelf.blobs.pop(bad), make()
    shelf.away = ValueError
    (refusal,) = await releases.stage((_channel(bad), _channel(good, bad, name="beta")))
    assert (refusal.digest, refusal.reason, refusal.final) == (bad, "INTERNAL", False)
    assert releases.resident() == {good}
    shelf.blobs[bad] = away
    assert await releases.stage((_channel(bad),)) == ()


async def test_a_disk_that_takes_and_gives_nothing_keeps_no_release_from_being_served(
    served: ServedModel, shelf: Shelf, tmp_path: Path
) -> None:
    (tmp_path / "blobs").write_text("no folder")
    digest = shelf.put(served, _scale(5))
    releases = ReleaseCache(served, shelf.fetch, ReleaseFiles(tmp_path / "blobs"), 2, 2**26)
    view = StateView().changed(Position(1, 1), [_channel(digest)])
    await releases.restore(view)
    assert releases.count == 0
    assert await releases.stage((_channel(digest),)) == ()
    async with releases.use("acme", digest) as overlay:
        assert overlay.digest == digest
    assert releases.fetched == 1


@pytest.mark.parametrize(
    "payload", [None, b"", b"\x05", b"\xff\xff\xff\xffcut"], ids=["another's", "none", "odd", "cut"]
)
async def test_a_file_that_holds_another_release_counts_as_missing(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache], tmp_path: Path, payload: bytes | None
) -> None:
    """Its checksum fits: the file was swapped, or isn't of a release."""
    digest, other, folder = shelf.put(served, _scale(5)), shelf.put(served, _scale(6)), tmp_path / "blobs"
    ReleaseFiles(folder).write(other, shelf.blobs[other])
    SnapshotFile(folder / digest).write(SnapshotFile(folder / other).read().payload if payload is None else payload)
    releases = make()
    await releases.restore(StateView().changed(Position(1, 1), [_channel(digest)]))
    assert releases.fetched == 0, "at the start nobody is asked"
    async with releases.use("acme", digest) as overlay:
        assert overlay.digest == digest
    assert releases.fetched == 1
    assert ReleaseFiles(folder).read(digest) == shelf.blobs[digest], "it is right from now on"


async def test_what_channels_need_stays_and_of_the_rest_what_was_used_last(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    releases = make(capacity=2)
    digests = [shelf.put(served, _scale(token)) for token in range(8)]
    channel = _channel(digests[0], digests[1], digests[2])
    assert await releases.stage((channel,)) == ()
    releases.swapped(StateView().changed(Position(1, 1), [channel]))
    async with releases.use("acme", digests[3]):
        for digest in digests[4:]:
            async with releases.use("acme", digest):
                pass
        assert set(digests[:4]) <= releases.resident(), "a release in use was dropped"
    assert set(digests[:3]) <= releases.resident(), "the last three releases of a channel stay"
    assert releases.count == 5
    fetched = releases.fetched
    for digest in digests[:3]:
        async with releases.use("acme", digest):
            pass
    assert releases.fetched == fetched


async def test_a_tenant_that_needs_too_much_is_refused_and_keeps_what_fits(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    topic = shelf.put(served, (TopicEdit((7, 8), 2),))
    probe = make()
    async with probe.use("acme", topic) as overlay:
        size = overlay.nbytes
    releases = make(tenant_bytes=size + size // 2)
    others = [shelf.put(served, (TopicEdit((7, n), 2),)) for n in (9, 10)]
    channel = _channel(topic, *others)
    assert await releases.stage((channel,)) == ()
    releases.swapped(StateView().changed(Position(1, 1), [channel]))
    (refusal,) = await releases.stage((_channel(others[0], name="beta"),))
    assert refusal.reason == "TENANT_TOO_LARGE"
    assert str(size + size // 2) in refusal.message


async def test_channels_that_come_together_are_bounded_as_those_that_come_one_by_one(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    """A replica that starts gets all of a tenant's at once."""
    digests = [shelf.put(served, (TopicEdit((7, n), 2),)) for n in (8, 9, 10)]
    probe = make()
    async with probe.use("acme", digests[0]) as overlay:
        size = overlay.nbytes
    releases = make(capacity=1, tenant_bytes=2 * size)
    channels = [_channel(digest, name=f"c{n}") for n, digest in enumerate(digests)]
    (refusal,) = await releases.stage(tuple(channels))
    assert refusal.reason == "TENANT_TOO_LARGE"
    accepted = [c for c in channels if c.serving[0].digest != refusal.digest]
    releases.swapped(StateView().changed(Position(1, 1), accepted))
    assert await releases.stage(tuple(accepted)) == (), "what holds isn't counted twice"


async def test_a_view_of_many_tenants_is_looked_through_once(make: Callable[..., ReleaseCache]) -> None:
    class Counted(dict[tuple[str, str], ChannelState]):
        looked = 0

        def values(self) -> Any:
            self.looked += 1
            return super().values()

        def items(self) -> Any:
            self.looked += 1
            return super().items()

    channels = Counted({(f"t{n}", "live"): replace(_channel("a"), tenant=f"t{n}") for n in range(50)})
    make().swapped(StateView(Position(1, 1), channels=channels))
    assert channels.looked == 1  # for each tenant anew, 4,000 tenants took the loop 0.7 s whenever a channel moved


async def test_a_tenants_requests_keep_no_more_than_its_bytes(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    """However many releases it names: a few bytes of a patch become a row for each of thousands of cells."""
    topics = [shelf.put(served, (TopicEdit((7, n), 2),)) for n in range(8, 16)]
    other = shelf.put(served, _scale(5))
    probe = make()
    async with probe.use("acme", topics[0]) as overlay:
        size = overlay.nbytes
    releases = make(capacity=100, tenant_bytes=3 * size)
    for tenant, digests in (("globex", [other]), ("acme", topics)):
        for digest in digests:
            async with releases.use(tenant, digest) as overlay:
                assert overlay.digest == digest
    assert releases.resident() == {other, *topics[-3:]}


async def test_several_requests_for_a_new_release_share_the_work(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    releases, digest = make(), shelf.put(served, _scale(5))

    async def one() -> str:
        async with releases.use("acme", digest) as overlay:
            return overlay.digest

    assert set(await asyncio.gather(*(one() for _ in range(20)))) == {digest}
    assert releases.fetched == 1


async def test_a_release_that_cant_be_had_when_all_who_asked_have_left_is_no_error(
    shelf: Shelf, make: Callable[..., ReleaseCache], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = asyncio.Event()

    async def fetch(tenant: str, digest: str) -> list[bytes]:
        await left.wait()
        raise Unavailable("TRANSPORT", "no answer")

    monkeypatch.setattr(shelf, "fetch", fetch)
    releases = make()

    async def ask() -> None:
        async with releases.use("acme", "ab" * 32):
            pass

    before = asyncio.all_tasks()
    asked = asyncio.create_task(ask())
    while not releases.fetched:
        await asyncio.sleep(0.001)
    asked.cancel()
    await asyncio.wait([asked])
    left.set()
    await asyncio.wait(asyncio.all_tasks() - before)
    del asked  # with it, what it waited for
    gc.collect()
    assert not caplog.records


async def test_on_disk_only_what_channels_need_outlasts_a_tidying(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    kept, other = shelf.put(served, _scale(5)), shelf.put(served, _scale(6))
    channel, releases = _channel(kept), make()
    await releases.stage((channel, _channel(other, name="beta")))
    releases.swapped(StateView().changed(Position(1, 1), [channel]))
    await releases.tidy()
    shelf.blobs.clear()
    again = make()
    assert await again.stage((channel,)) == ()
    (refusal,) = await again.stage((_channel(other),))
    assert refusal.reason == "RELEASE_UNREACHABLE"


async def test_a_tidying_leaves_what_a_view_needs_that_is_about_to_hold(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache]
) -> None:
    channel, releases = _channel(shelf.put(served, _scale(5))), make()
    assert await releases.stage((channel,)) == ()
    await releases.tidy()
    releases.swapped(StateView().changed(Position(1, 1), [channel]))
    shelf.blobs.clear()
    again = make()
    await again.restore(StateView().changed(Position(1, 1), [channel]))
    assert again.resident() == releases.resident()


async def test_what_cannot_be_removed_ends_no_tidying(make: Callable[..., ReleaseCache], tmp_path: Path) -> None:
    (tmp_path / "blobs" / "lost+found").mkdir(parents=True)
    await make().tidy()
    assert (tmp_path / "blobs" / "lost+found").exists()


async def test_drafts_wait_for_each_other_and_no_release_for_them(
    served: ServedModel, shelf: Shelf, make: Callable[..., ReleaseCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what nobody waits for any more is not begun."""
    releases, begun, go_on = make(), list[str](), threading.Event()
    base, other = shelf.put(served, _scale(5)), shelf.put(served, _scale(6))
    compile = releases._compile_release

    def slowly(release: ReleaseContent) -> Any:
        begun.append(release.digest)
        if release.draft:
            assert go_on.wait(30)
        return compile(release)

    monkeypatch.setattr(releases, "_compile_release", slowly)
    drafts = [RevisionContent(served.manifest.fingerprint, _scale(7 + n)) for n in range(3)]
    digests = [served_digest(base, draft.digest) for draft in drafts]

    async def tried(tenant: str, number: int) -> str:
        async with releases.use(tenant, base, draft=drafts[number]) as overlay:
            return overlay.digest

    first = asyncio.create_task(tried("acme", 0))
    while digests[0] not in begun:
        await asyncio.sleep(0.01)
    second = asyncio.create_task(tried("acme", 1))
    async with releases.use("other", other) as overlay:  # meanwhile
        assert overlay.digest == other
    for task in (first, second):
        task.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    again, third = asyncio.create_task(tried("acme", 0)), asyncio.create_task(tried("other", 2))
    await asyncio.sleep(0.05)
    assert begun == [digests[0], other], "the one that runs can't be stopped, and no other runs beside it"
    go_on.set()
    assert await asyncio.gather(again, third) == [digests[0], digests[2]]
    assert digests[1] not in begun
