"""Ranks that share a model give the tokens of one that has it all, or none."""

from __future__ import annotations

import asyncio
import math
import os
import pickle
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist
import typer
from backpack_lm.checkpoint import save
from backpack_lm.installed import folder_of
from backpack_lm.kernels import Precision
from backpack_lm.manifest import TOKENIZER
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.sharding import Shard
from backpack_serving.cli.client import exits
from backpack_serving.engine import collectives
from backpack_serving.engine.collectives import Collectives, PeerLost
from backpack_serving.engine.executor import Executor
from backpack_serving.engine.loop import EngineLoop, ReplicaLost
from backpack_serving.engine.ranks import Link, Peer, SeveralRanks
from backpack_serving.engine.runner import Runner
from backpack_serving.engine.sequence import GenerationRequest, Output
from backpack_serving.inference import ranks
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.sampling import SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.conftest import EDITS, compiled, outputs_of
from tests.engine.ranks import GPT2, LLAMA, ROOM, SLOTS, Ranked, engine_over, started
from tests.engine.test_oracle import GREEDY, prompt
from tests.models.trunk_shapes import random_model

Made = dict[str, list[Output]]
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranked]:
    models = {"gpt2": GPT2, "llama": LLAMA, "killed": GPT2, "stopped": LLAMA, "idle": GPT2}
    with started(tmp_path_factory.mktemp("ranks"), 2, **models) as found:
        yield found


@cache
def _compiled(table: SenseTable) -> dict[str, Overlay]:
    return {name: compiled(edits, table) for name, edits in EDITS.items()}


def _overlays(served: ServedModel) -> dict[str, Overlay]:
    return _compiled(served.table)


def _one(served: ServedModel) -> Runner:
    """All of a model in this process."""
    return Runner(served.model, served.table.with_room(ROOM), SLOTS)


def _mix(draw: Random, overlays: dict[str, Overlay]) -> list[GenerationRequest]:
    """Requests of every kind, many of which begin alike."""
    greedy, length = SamplingParams(temperature=0.0), draw.randint(1, 12)
    samplings = (
        replace(greedy, max_tokens=length, logit_bias=draw.choice([(), ((5, 3.0), (17, -math.inf))])),
        replace(greedy, max_tokens=length, repetition_penalty=1.3, log_probabilities=2),
        SamplingParams(max_tokens=length, temperature=0.9, seed=draw.randint(0, 99), top_p=0.9),
    )
    return [
        GenerationRequest(
            f"r{n}",
            draw.choice("ab"),
            prompt(draw.randint(0, 2), draw.randint(1, 30)),
            draw.choice(samplings),
            overlays[draw.choice(list(overlays))],
        )
        for n in range(draw.randint(1, 7))
    ]


def _made(executor: Executor, requests: list[GenerationRequest], draw: Random) -> tuple[Made, set[str]]:
    """What all requests get, who come at random steps, and who of them was aborted."""
    engine = engine_over(executor, draw.choice([1, 3, 16, 64]), draw.random() < 0.5)
    waiting, aborted = list(requests), set()
    made: Made = {request.id: [] for request in requests}
    while waiting or engine.busy:
        if waiting and draw.random() < 0.5:
            engine.add(waiting.pop())
        if draw.random() < 0.05:
            aborted.add(victim := draw.choice(requests).id)
            engine.abort(victim)
        for output in engine.step():
            made[output.request_id].append(output)
        engine.check_integrity()
    return made, aborted


def _check_equal(served: ServedModel, executor: SeveralRanks, seed: int) -> None:
    draw = Random(seed)
    requests = _mix(draw, _overlays(served))
    together, aborted = _made(executor, requests, draw)
    expected = _alone(served, requests)
    for request in requests:
        made, wanted = together[request.id], expected[request.id]
        if request.id not in aborted:
            assert len(made) == len(wanted)
        for one, other in zip(made, wanted, strict=False):
            assert replace(one, log_probability=None) == replace(other, log_probability=None)
            if other.log_probability:
                assert one.log_probability is not None
                assert one.log_probability.chosen == pytest.approx(other.log_probability.chosen, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_two_ranks_give_the_tokens_of_one(ranked: Ranked, name: str) -> None:
    @settings(max_examples=8, deadline=None)
    @given(seed=st.integers(0, 2**32))
    def holds(seed: int) -> None:
        _check_equal(*ranked[name], seed)

    holds()


@pytest.mark.slow
def test_four_ranks_give_the_tokens_of_one(tmp_path: Path) -> None:
    """Of the llama, two ranks have the same key/value head."""
    with started(tmp_path, 4, gpt2=GPT2, llama=LLAMA) as ranked:
        for name in ranked:
            for seed in range(100):
                _check_equal(*ranked[name], seed)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [(Precision.BFLOAT16, 0.25), (Precision.INT8, 0.5)])
def test_other_precisions_stay_near_one_rank(tmp_path: Path, precision: Precision, bound: float) -> None:
    """Log-probabilities of the first token, which both predict from the same text. In int8 these tiny parts end within
    blocks of 64, and are quantised otherwise than the whole."""
    sampling, most = SamplingParams(max_tokens=1, temperature=0.0, log_probabilities=5), 0.0
    with started(tmp_path, 2, precision, gpt2=GPT2, llama=LLAMA) as ranked:
        for served, executor in ranked.values():
            one = Runner(served.model, served.table.with_room(ROOM, served.storage.dtype), SLOTS)
            overlays = _overlays(served)
            requests = [GenerationRequest(n, "t", prompt(len(n), 20), sampling, o) for n, o in overlays.items()]
            made = [outputs_of(engine_over(each), requests) for each in (one, executor)]
            for request in requests:
                logs = [dict(each[request.id][0].log_probability.alternatives) for each in made]  # type: ignore[union-attr]
                shared = logs[0].keys() & logs[1].keys()
                assert len(shared) >= 3
                apart = max(abs(logs[0][token] - logs[1][token]) for token in shared)
                assert apart < bound, request.id
                most = max(most, apart)
                alone = outputs_of(engine_over(executor), [request])
                assert alone[request.id] == made[1][request.id], "other bits in company"
    assert most > 0, "float32?"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_requests_logits_are_the_same_bits_in_any_company(ranked: Ranked, name: str) -> None:
    served, executor = ranked[name]
    overlays = _overlays(served)
    sampling = SamplingParams(max_tokens=12, temperature=0.0, log_probabilities=3, ignore_end_of_text=True)

    def logs(request: GenerationRequest, others: list[GenerationRequest], step_tokens: int) -> list[object]:
        engine = engine_over(executor, step_tokens)
        for one in (*others, request):
            engine.add(one)
        made = []
        while engine.busy:
            made += [(o.token, o.log_probability) for o in engine.step() if o.request_id == request.id]
        return made

    for overlay in ("two topics, one constant, on edited rows", "a topic and biases, on edited rows"):
        request = GenerationRequest("x", "t", prompt(1, 20), sampling, overlays[overlay])
        others = [
            GenerationRequest(f"o{n}", "u", prompt(n, 7 + 2 * n), GREEDY, other)
            for n, other in enumerate(overlays.values())
        ]
        alone = logs(request, [], 64)
        assert alone == logs(request, others[:3], 64) == logs(request, others[3:9], 7)


def test_a_message_carries_what_a_rank_has_to_know_and_no_tensors(ranked: Ranked) -> None:
    """A decode step is a few hundred bytes; rows and topics go once, whoever is steered by them."""
    served, executor = ranked["gpt2"]
    engine = engine_over(executor)
    overlay = _overlays(served)["two topics, one constant, on edited rows"]
    sent: list[int] = []
    send = Link.send

    def counted(link: Link, message: object, seconds: float | None = None) -> None:
        sent.append(len(pickle.dumps(message)))
        send(link, message, seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "send", counted)
        for n in range(3):
            engine.add(GenerationRequest(f"r{n}", "t", prompt(n, 9), GREEDY, overlay))
        while engine.busy:
            engine.step()
    own = overlay.of_senses(range(2, 4))
    assert (
        own.rows.nbytes < sent[0] < own.rows.nbytes + own.index.nbytes + 2 * served.model.config.vocab_size * 2 + 5000
    )
    assert max(sent[3:-1]) < 600


def test_every_collective_is_counted(ranked: Ranked) -> None:
    served, executor = ranked["llama"]
    together, config = executor._rank.collectives, served.model.config
    before, calls, none = dict(together.bytes), dict(together.calls), _overlays(served)["none"]
    engine = engine_over(executor)
    for n in range(2):
        engine.add(GenerationRequest(f"r{n}", str(n), prompt(n, 5), replace(GREEDY, max_tokens=1), none))
    engine.step()
    moved = {name: count - before[name] for name, count in together.bytes.items()}
    d, tokens, sums = config.n_embd, 10, 2 * config.trunk.depth
    # Two sums for each layer, and that of the mix, from the one other rank; half of the vocabulary, filled up.
    assert moved == {"sum": 4 * d * (sums * tokens + 2), "logits": 4 * 2 * math.ceil(config.tokens / 2)}
    assert {name: count - calls[name] for name, count in together.calls.items()} == {"sum": sums + 1, "logits": 1}


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_rank_that_ends_or_hangs_ends_all_streams_in_two_seconds(ranked: Ranked, how: str) -> None:
    await _lose_a_rank(*ranked[how], SIGNALS[how], after=4)


@pytest.mark.slow
async def test_ranks_are_lost_at_any_step_of_fifty_replicas(tmp_path: Path) -> None:
    draw = Random(0)
    for batch in range(10):
        models = {"one": GPT2, "two": LLAMA, "three": GPT2, "four": LLAMA, "five": GPT2}
        with started(tmp_path / str(batch), 2, **models) as ranked:
            for served, executor in ranked.values():
                await _lose_a_rank(served, executor, draw.choice([*SIGNALS.values()]), after=draw.randint(1, 100))


async def _lose_a_rank(served: ServedModel, executor: SeveralRanks, how: signal.Signals, after: int) -> None:
    """Send a rank a signal once six streams have got so many tokens: all end, with no token that is wrong."""
    overlays = list(_overlays(served).values())
    sampling = SamplingParams(max_tokens=30, temperature=0.0, ignore_end_of_text=True)
    requests = [GenerationRequest(f"r{n}", "t", prompt(n, 8 + n), sampling, overlays[n]) for n in range(6)]
    made: dict[str, list[int]] = {request.id: [] for request in requests}
    finished, lost_at = set(), 0.0
    loop = EngineLoop(engine_over(executor))

    async def read(request: GenerationRequest) -> None:
        nonlocal lost_at
        try:
            async for outputs in loop.generate(request):
                made[request.id] += [output.token for output in outputs]
                if not lost_at and sum(map(len, made.values())) >= after:
                    os.kill(executor._peers[0].process.pid, how)
                    lost_at = time.monotonic()
            finished.add(request.id)
        except ReplicaLost as error:
            assert "lost a part of the model" in str(error)

    async with asyncio.timeout(30):
        await asyncio.gather(*map(read, requests))
        assert 0 < time.monotonic() - lost_at < 2
        with pytest.raises(ReplicaLost):
            await anext(loop.generate(requests[0]))
    assert not loop.healthy
    expected = _alone(served, requests)
    for request in requests:
        tokens, whole = made[request.id], [output.token for output in expected[request.id]]
        assert tokens == (whole if request.id in finished else whole[: len(tokens)]), "a wrong token"
    assert len(finished) < len(requests)
    await loop.stop()


async def test_a_rank_that_hangs_while_there_is_nothing_to_do_is_noticed(ranked: Ranked) -> None:
    _, executor = ranked["idle"]
    loop = EngineLoop(engine_over(executor))
    await asyncio.sleep(0.6)  # it was asked, and has answered
    assert loop.healthy
    os.kill(executor._peers[0].process.pid, signal.SIGSTOP)
    since = time.monotonic()
    while loop.healthy:
        assert time.monotonic() - since < 2
        await asyncio.sleep(0.01)
    await loop.stop()


def test_a_rank_that_dies_while_ranks_meet_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(random_model(GPT2, 0), folder_of("micro") / TOKENIZER, tmp_path / "model")
    served = ServedModel.read(tmp_path / "model", Precision.FLOAT32, ROOM)
    assert served.table_file is not None
    plan = ranks.RankPlan(2, served.folder, served.table_file, served.storage.dtype, "cpu", 1, SLOTS, ROOM)
    peers: list[Peer] = []
    start_peer, join = ranks._started, Collectives.join

    def started_peer(shard: Shard) -> Peer:
        peers.append(start_peer(shard))
        return peers[-1]

    def joined_without(store: Path, rank: int, count: int, device: torch.device) -> Collectives:
        peers[0].process.kill()
        return join(store, rank, count, device)

    monkeypatch.setattr(ranks, "_started", started_peer)
    monkeypatch.setattr(Collectives, "join", joined_without)
    monkeypatch.setattr(collectives, "MEETING", 0.5)
    with pytest.raises(typer.Exit) as ended, exits():
        ranks.start(plan, served)
    assert ended.value.exit_code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: rank 1 ended with status -9 before it was ready: ")
    assert said.count("\n") == 1


def test_joining_ends_with_a_collective_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL meets in the first collective: it needs the store, and more time than a step's collective has."""
    monkeypatch.setattr(collectives, "HUNG", 0.3)
    store, late = tmp_path / "store", 0.6

    def join_late() -> float:
        """Rank 1, which is in the group at once and in the first collective later."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=5)
        group = dist.ProcessGroupGloo(dist.FileStore(str(store), 2), 1, 2, options)  # type: ignore[attr-defined]
        time.sleep(late)
        for _ in range(2):
            group.allgather([[torch.empty(1), torch.empty(1)]], [torch.ones(1)]).wait()
        return time.monotonic()

    with ThreadPoolExecutor(1) as other:
        since, their_end = time.monotonic(), other.submit(join_late)
        together = Collectives.join(store, 0, 2, torch.device("cpu"))
        assert time.monotonic() - since >= late
        store.unlink(missing_ok=True)
        assert together.sum(torch.full((1,), 2.0)).tolist() == [3.0]
        assert their_end.result(10)
        with pytest.raises(PeerLost):
            together.sum(torch.ones(1))  # which waits for as long as a step's does


def _alone(served: ServedModel, requests: list[GenerationRequest]) -> Made:
    """What requests get of a model that is all in this process."""
    engine = engine_over(_one(served))
    for request in requests:
        engine.add(request)
    made: Made = {request.id: [] for request in requests}
    while engine.busy:
        for output in engine.step():
            made[output.request_id].append(output)
    return made
