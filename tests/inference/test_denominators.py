"""What waits for the denominators of topic scores while they are computed, and what doesn't."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from backpack_lm import checkpoint, denominators
from backpack_lm.config import BackpackConfig
from backpack_lm.installed import folder_of
from backpack_lm.model import Backpack
from backpack_lm.patch import TopicEdit
from backpack_lm.tokenizer import Tokenizer
from backpack_serving.errors import Unavailable
from backpack_serving.inference import release_cache as module
from backpack_serving.inference.release_cache import ReleaseCache
from backpack_serving.inference.release_files import ReleaseFiles
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.sync.state import StateView
from structlog.testing import capture_logs

from tests.inference.test_release_cache import Shelf, _channel, _scale

TOPIC = (TopicEdit((7, 8), 2),)


@pytest.fixture
def unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServedModel:
    """A tiny model that comes without denominators, and an empty cache for them."""
    monkeypatch.setattr(denominators, "folder", lambda name: tmp_path)
    tokenizer = folder_of("micro") / checkpoint.TOKENIZER
    torch.manual_seed(0)
    config = BackpackConfig.gpt2(Tokenizer.read(tokenizer).vocab_size, 16, 8, n_layer=1, n_head=1, num_senses=1)
    checkpoint.save(Backpack(config), tokenizer, tmp_path / "model")
    return ServedModel.read(tmp_path / "model")


@pytest.fixture
def other(unmeasured: ServedModel, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Another process that computes them, for ever; called, it ends."""
    with ExitStack() as ending:
        assert unmeasured.table.kept_as
        file = ending.enter_context((tmp_path / unmeasured.table.kept_as).open("a+b"))
        fcntl.flock(file, fcntl.LOCK_EX)
        yield ending.close


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def releases(unmeasured: ServedModel, shelf: Shelf, tmp_path: Path) -> Iterator[ReleaseCache]:
    made = ReleaseCache(unmeasured, shelf.fetch, ReleaseFiles(tmp_path / "blobs"), 8, 2**26)
    yield made
    made.stop()


async def test_a_request_waits_as_long_as_it_may_and_is_then_told_to_come_again(
    unmeasured: ServedModel, shelf: Shelf, releases: ReleaseCache, other: Callable[[], None]
) -> None:
    digest = shelf.put(unmeasured, TOPIC)
    with pytest.raises(Unavailable) as refused:
        async with releases.use("acme", digest, patience=0.1):
            raise AssertionError("served without denominators")
    assert (refused.value.reason, refused.value.retry_after) == ("TOPICS_NOT_READY", 1.0)
    patient = asyncio.create_task(_use(releases, digest))
    other()
    assert await patient == digest
    async with releases.use("acme", digest, patience=0.0) as overlay:  # they are there
        assert overlay.topics


async def test_releases_without_topics_do_not_wait(
    unmeasured: ServedModel, shelf: Shelf, releases: ReleaseCache, other: Callable[[], None]
) -> None:
    """More of them wait than may be made at a time."""
    waiting = [
        asyncio.create_task(_use(releases, shelf.put(unmeasured, (TopicEdit((n, n + 1), 2),)))) for n in range(5, 15)
    ]
    plain = shelf.put(unmeasured, _scale(5))
    async with releases.use("acme", plain) as overlay:
        assert overlay.digest == plain
    assert not any(task.done() for task in waiting)
    other()
    assert len(set(await asyncio.gather(*waiting))) == 10


async def test_a_channel_is_refused_for_now_and_the_others_go_on(
    unmeasured: ServedModel,
    shelf: Shelf,
    releases: ReleaseCache,
    other: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STAGING_PATIENCE", 0.1)
    topic, plain = (
        _channel(shelf.put(unmeasured, edits), name=name) for name, edits in (("t", TOPIC), ("p", _scale(5)))
    )
    (refusal,) = await releases.stage((topic, plain))
    assert (refusal.channel, refusal.reason, refusal.final) == ("t", "TOPICS_NOT_READY", False)
    other()
    async with releases.use("acme", topic.serving[0].digest):
        assert await releases.stage((topic,)) == ()


async def test_what_is_on_disk_is_restored_without_waiting_for_denominators(
    unmeasured: ServedModel,
    shelf: Shelf,
    releases: ReleaseCache,
    other: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A replica opens its stream after that: it would be out of touch for two seconds a release."""
    monkeypatch.setattr(module, "STAGING_PATIENCE", 3600.0)
    topics = [shelf.put(unmeasured, (TopicEdit((n, n + 1), 2),)) for n in range(5, 10)]
    plain, files = shelf.put(unmeasured, _scale(5)), ReleaseFiles(tmp_path / "blobs")
    for digest in (*topics, plain):
        files.write(digest, shelf.blobs[digest])
    channels = [_channel(digest, topics[-1], name=f"c{n}") for n, digest in enumerate((*topics, plain))]
    view = StateView(channels={channel.key: channel for channel in channels})
    releases.swapped(view)
    await asyncio.wait_for(releases.restore(view), 30)
    assert releases.resident() == {plain}
    other()
    for digest in topics:
        await _use(releases, digest)
    assert (releases.resident(), releases.fetched) == ({*topics, plain}, 0)


async def test_who_comes_while_denominators_are_computed_is_refused_at_once(
    unmeasured: ServedModel,
    shelf: Shelf,
    releases: ReleaseCache,
    other: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And a channel at a release without topics doesn't wait for those that it was at before."""
    monkeypatch.setattr(module, "STAGING_PATIENCE", 3600.0)
    topics = [shelf.put(unmeasured, (TopicEdit((n, n + 1), 2),)) for n in range(5, 10)]
    plain = _channel(shelf.put(unmeasured, _scale(5)), *topics, name="plain")
    assert await asyncio.wait_for(releases.stage((plain,)), 30) == ()
    for digest in topics:
        (refusal,) = await asyncio.wait_for(releases.stage((_channel(digest),)), 30)
        assert (refusal.reason, refusal.final) == ("TOPICS_NOT_READY", False)
    other()
    await _use(releases, topics[0])
    assert await releases.stage((_channel(topics[0]),)) == ()


async def test_a_stop_while_denominators_are_computed_is_no_mistake(
    unmeasured: ServedModel, shelf: Shelf, releases: ReleaseCache, other: Callable[[], None]
) -> None:
    waiting = asyncio.create_task(_use(releases, shelf.put(unmeasured, TOPIC)))
    await _use(releases, shelf.put(unmeasured, _scale(5)))
    with capture_logs() as logs:
        releases.stop()
        with pytest.raises(Unavailable, match="this replica stops") as refused:
            await waiting
    assert refused.value.reason == "TOPICS_NOT_READY"
    assert not [line for line in logs if line["log_level"] == "error"]


async def test_those_that_a_model_comes_with_are_used(
    unmeasured: ServedModel, shelf: Shelf, tmp_path: Path, other: Callable[[], None]
) -> None:
    checkpoint.save(unmeasured.model, folder_of("micro") / checkpoint.TOKENIZER, tmp_path / "shipped", topics=False)
    other()
    checkpoint.save(unmeasured.model, folder_of("micro") / checkpoint.TOKENIZER, tmp_path / "shipped", topics=True)
    shipped = ServedModel.read(tmp_path / "shipped")
    assert shipped.table.measured
    torch.testing.assert_close(shipped.table.peaks, unmeasured.table.peaks)


async def _use(releases: ReleaseCache, digest: str) -> str:
    async with releases.use("acme", digest) as overlay:
        return overlay.digest
