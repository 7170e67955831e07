"""P7: a request has one release from admission to its last token. P8: and never another tenant's patches."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import pytest_asyncio
import torch
from backpack_lm.overlay import Overlay
from backpack_lm.patch import ReleaseContent, RevisionContent
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_proto.v1 import sync_pb2 as spb
from backpack_serving.engine.sampler import choose
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.sampling import SamplingParams

from tests.e2e.conftest import Metadata, System, copy, running, topic

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The story of the king and the"
WORDS = ("ship", "nurse", "sea", "doctor", "house", "river")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: Any) -> AsyncIterator[System]:
    async with running(tmp_path_factory.mktemp("state"), slots=8, queue=64) as system:
        yield system


async def _overlays(system: System, key: Metadata, served: ServedModel) -> dict[str, Overlay]:
    """Every release of a tenant, compiled from the bytes in the store, by digest."""
    listed = await system.releases.ListReleases(ipb.ListReleasesRequest(page_size=100), metadata=key)
    found = {}
    for release in listed.releases:
        request = spb.FetchReleaseRequest(tenant=release.name.split("/")[1], digest=release.digest)
        pieces = [p.data async for p in system.sync.FetchRelease(request, metadata=system.replica)]
        found[release.digest] = Overlay.compile(
            ReleaseContent(tuple(map(RevisionContent.from_bytes, pieces))), served.table
        )
    return found


async def _activations_while_streaming(
    system: System, served: ServedModel, streams: int, releases: int
) -> tuple[int, int, int]:
    """(streams, releases that served them, activations and rollbacks meanwhile). So many streams at a time, until
    so many releases served some: a busy machine moves channels more slowly."""
    key = await system.tenant(copy("king", "ship"))
    for word in WORDS[1:4]:
        await system.release(key, copy("king", word), topic(word, strength=2))
    overlays = await _overlays(system, key, served)
    moves, done = 0, asyncio.Event()
    loop, threads = asyncio.get_running_loop(), ThreadPoolExecutor(1)

    async def move() -> None:
        nonlocal moves
        draw = random.Random(1)
        while not done.is_set():
            if draw.random() < 0.4:
                live = await system.releases.GetChannel(ipb.GetChannelRequest(name="channels/live"), metadata=key)
                request = ipb.RollbackRequest(channel="channels/live", etag=live.channel.etag)
                await system.releases.Rollback(request, metadata=key)
            else:
                await system.activate(key, draw.randint(0, 4))
            moves += 1
            await asyncio.sleep(0.01)

    async def one(seed: int) -> str:
        await asyncio.sleep(random.Random(seed).random() * streams * 0.05)
        parts = await system.stream(key, PROMPT, max_tokens=16, seed=seed, temperature=0.9, ignore_end_of_text=True)
        digest = parts[0].served.release_digest
        sampling = SamplingParams(max_tokens=16, temperature=0.9, seed=seed, ignore_end_of_text=True)
        tokens = [t.id for part in parts for t in part.tokens]
        ids = served.tokenizer.encode(PROMPT)
        oracle = loop.run_in_executor(threads, _unstopped, served, overlays[digest], ids, sampling)
        expected = await oracle
        assert tokens == expected, f"a stream under {digest[:12]} isn't what that release means"
        return digest

    digests: list[str] = []
    moving = asyncio.create_task(move())
    try:
        while len(set(digests)) < releases and len(digests) < 10 * streams:
            seeds = range(len(digests), len(digests) + streams)
            digests += await asyncio.gather(*(one(seed) for seed in seeds))
    finally:
        done.set()
        await moving
    return len(digests), len(set(digests)), moves


def _unstopped(served: ServedModel, overlay: Overlay, ids: list[int], sampling: SamplingParams) -> list[int]:
    made: list[int] = []
    vocabulary = served.manifest.config.tokens
    for token in served.model.generate(
        ids, overlay, lambda logits: choose(logits[:vocabulary], sampling, len(ids) + len(made))
    ):
        made.append(token)
        if len(made) == sampling.max_tokens:
            break
    return made


async def test_p7_tokens_are_the_pinned_releases_whatever_is_activated_meanwhile(
    system: System, served: ServedModel
) -> None:
    streams, releases, moves = await _activations_while_streaming(system, served, 24, 3)
    assert (streams >= 24, releases > 2, moves > 10) == (True, True, True), (streams, releases, moves)


@pytest.mark.slow
async def test_p7_tokens_are_the_pinned_releases_whatever_is_activated_meanwhile_longer(
    system: System, served: ServedModel
) -> None:
    streams, releases, moves = await _activations_while_streaming(system, served, 400, 4)
    assert (streams >= 400, releases > 3, moves > 200) == (True, True, True), (streams, releases, moves)


# ---- tripwires


async def _tripwires(system: System, served: ServedModel, requests: int) -> int:
    """Tenants whose patch makes one signature word follow `king`, in random mixed batches, against solo runs."""
    signatures = _signatures(served, len(WORDS))
    keys = {token: await system.tenant(_signature(served, token)) for token in signatures}
    solo = {token: await _signed(system, key) for token, key in keys.items()}
    for token, tokens in solo.items():
        assert tokens[0] == token, f"the patch doesn't bring about {served.tokenizer.piece(token)!r}"
        assert not (set(signatures) - {token}) & set(tokens)
    draw = random.Random(7)
    checked = 0
    while checked < requests:
        batch = [draw.choice(signatures) for _ in range(draw.randint(2, 12))]
        answers = await asyncio.gather(*(_late(system, keys[token], draw) for token in batch))
        for token, tokens in zip(batch, answers, strict=True):
            assert tokens == solo[token], f"the tenant of {served.tokenizer.piece(token)!r} got something else"
            checked += 1
    return checked


def _signatures(served: ServedModel, count: int) -> list[int]:
    """Tokens that a vector along their own embedding speaks for more than for any other, by the widest margins."""
    embedding = served.table.embedding[: served.manifest.config.tokens]
    first, second = (embedding @ embedding.T).topk(2).values.T
    itself = (embedding @ embedding.T).argmax(1) == torch.arange(len(embedding))
    margin = ((first - second) / embedding.norm(dim=1)).masked_fill(~itself, 0.0)
    return [int(token) for token in margin.topk(count).indices]


def _signature(served: ServedModel, token: int) -> ipb.Edit:
    """All senses of `king` speak for one word, as loudly as a patch may."""
    shape = served.manifest.shape
    direction = served.table.embedding[token]
    vector = direction / direction.norm() * min(shape.sense_rms) * 7.9
    data = vector.float().numpy().tobytes()
    packed = ipb.Vector(data=data, dtype=ipb.DATA_TYPE_FLOAT32, shape=[shape.width])
    return ipb.Edit(set=ipb.SetEdit(cells=[ipb.Cells(word=pb.Word(text="king"))], vector=packed))


async def _signed(system: System, key: Metadata) -> list[int]:
    parts = await system.stream(key, "Long live the king", max_tokens=6, temperature=0.0, ignore_end_of_text=True)
    return [t.id for part in parts for t in part.tokens]


async def _late(system: System, key: Metadata, draw: random.Random) -> list[int]:
    await asyncio.sleep(draw.random() * 0.05)
    return await _signed(system, key)


async def test_p8_a_tripwire_never_goes_off_for_another_tenant(system: System, served: ServedModel) -> None:
    assert await _tripwires(system, served, 120) >= 120


@pytest.mark.slow
async def test_p8_a_tripwire_never_goes_off_for_another_tenant_longer(system: System, served: ServedModel) -> None:
    assert await _tripwires(system, served, 3000) >= 3000
