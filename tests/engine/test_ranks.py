"""Ranks that share a model give the tokens of one that has it all, or none."""

from __future__ import annotations

import asyncio
import math
import os
import pickle
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache
from io import BytesIO, TextIOWrapper
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest
import typer
from backpack_lm.checkpoint import save
from backpack_lm.installed import folder_of
from backpack_lm.kernels import Precision
from backpack_lm.manifest import TOKENIZER
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.sharding import Shard
from backpack_serving.cli.client import exits
from backpack_serving.engine.collectives import Collectives
from backpack_serving.engine.executor import Executor, RankLost
from backpack_serving.engine.loop import EngineLoop, EngineStopped, ReplicaLost
from backpack_serving.engine.ranks import HANDSHAKE, Link, RankProcess, SeveralRanks
from backpack_serving.engine.runner import Runner
from backpack_serving.engine.sequence import GenerationRequest, Output
from backpack_serving.inference import rank, ranks
from backpack_serving.inference.rank import RankZeroUnreachable
from backpack_serving.inference.ranks import Invitation, LocalRank, LocalRanks
from backpack_serving.inference.replica import _first_token
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.sampling import SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.conftest import EDITS, compiled, outputs_of
from tests.engine.ranks import GPT2, LLAMA, ROOM, SLOTS, Ranked, engine_over, plan_for, process_of, started
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
                    os.kill(process_of(executor).pid, how)
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
    os.kill(process_of(executor).pid, signal.SIGSTOP)
    since = time.monotonic()
    while loop.healthy:
        assert time.monotonic() - since < 2
        await asyncio.sleep(0.01)
    await loop.stop()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = tmp_path_factory.mktemp("alone") / "model"
    save(random_model(GPT2, 0), folder_of("micro") / TOKENIZER, folder)
    return ServedModel.read(folder, Precision.FLOAT32, ROOM)


class _Watched(LocalRanks):
    """Starts ranks as a replica does, and has seen their processes."""

    def __init__(self) -> None:
        self.started: list[LocalRank] = []

    def start(self, invitation: Invitation) -> LocalRank:
        self.started.append(super().start(invitation))
        return self.started[-1]


@pytest.mark.parametrize("when", ["before it comes", "before ranks meet"])
def test_a_rank_that_dies_at_the_start_is_noticed_at_once_and_one_line(
    alone: ServedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    launcher, join, killed_at = _Watched(), Collectives.join, 0.0

    def kill() -> None:
        nonlocal killed_at
        launcher.started[0].kill()
        killed_at = time.monotonic()

    def join_without(*arguments: Any) -> Collectives:
        kill()
        return join(*arguments)

    def start_dead(invitation: Invitation) -> LocalRank:
        process = _Watched.start(launcher, invitation)
        kill()
        return process

    if when == "before it comes":
        monkeypatch.setattr(launcher, "start", start_dead)
    else:
        monkeypatch.setattr(Collectives, "join", join_without)
    with pytest.raises(typer.Exit) as ended, exits():
        ranks.start(plan_for(alone, 2), alone, launcher)
    assert time.monotonic() - killed_at < 2
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "error: rank 1 ended with status -9 before it was ready\n"


async def test_a_rank_that_dies_before_the_first_token_is_a_lost_rank(alone: ServedModel) -> None:
    executor = ranks.start(plan_for(alone, 2), alone, LocalRanks())
    process_of(executor).kill()
    loop = EngineLoop(engine_over(executor))
    with pytest.raises(RankLost, match=r"rank 1 ended with status -9, before the first token$"):
        await _first_token(loop, alone.table)
    with pytest.raises(EngineStopped):
        await anext(loop.generate(GenerationRequest("r", "t", (1,), GREEDY, _overlays(alone)["none"])))


class _InThisProcess:
    """A rank as a thread of this process, as if on another node."""

    host = ranks.LOOPBACK

    def start(self, invitation: Invitation) -> RankProcess:
        self._thread = ThreadPoolExecutor(1)
        self._status = self._thread.submit(rank.run, invitation, self.host, 0, other_node=True)
        return self

    def ended(self) -> str:
        with suppress(TimeoutError):
            return f"ended with status {self._status.result(0.05)}"
        return ""

    def end(self) -> None:
        self._thread.shutdown()


def test_a_rank_on_another_node_reads_its_own_files(
    alone: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where there is no table yet
    executor = ranks.start(replace(plan_for(alone, 2), table=Path("/elsewhere")), alone, _InThisProcess())
    requests = [
        GenerationRequest(f"r{n}", "t", prompt(n, 9), GREEDY, o) for n, o in enumerate(_overlays(alone).values())
    ]
    assert outputs_of(engine_over(executor), requests) == _alone(alone, requests)
    executor.close()
    assert list(tmp_path.glob("backpack/tables/*"))


def test_a_rank_that_has_another_model_says_so(alone: ServedModel) -> None:
    found, wanted = alone.manifest.fingerprint, "0" * 64
    with pytest.raises(RankLost) as refused:
        ranks.start(replace(plan_for(alone, 2), fingerprint=wanted), alone, _InThisProcess())
    assert str(refused.value) == (
        f"rank 1 can't serve: {alone.folder} on 127.0.0.1 is another model than on the node of rank 0: its fingerprint "
        f"is {found[:12]}…, not 000000000000…; give every node the same folder"
    )


class _Besieged(_InThisProcess):
    """Others find the address of rank 0 before its rank does."""

    told = b""

    def start(self, invitation: Invitation) -> RankProcess:
        stay = self._stay_mute
        for connect in (stay, self._send_pickle, self._prove_another_secret, stay, self._mirror, self._leave):
            connection = socket.create_connection((invitation.host, invitation.port))
            Thread(target=connect, args=(connection,), daemon=True).start()
        time.sleep(0.1)
        return super().start(invitation)

    def _send_pickle(self, connection: socket.socket) -> None:
        with connection, suppress(ConnectionError):
            connection.sendall(_Trap.message())
            self.told = b"".join(iter(lambda: connection.recv(2**16), b""))

    def _prove_another_secret(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, EOFError):
            Link(connection).authenticate(b"?" * 32, ranks.OTHERS, ranks.RANK_0)

    def _mirror(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while data := connection.recv(32):
                connection.sendall(data)

    def _leave(self, connection: socket.socket) -> None:
        connection.close()

    def _stay_mute(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while connection.recv(32):
                pass


class _Trap:
    """It springs where a message of it is read."""

    sprung = False

    @classmethod
    def message(cls) -> bytes:
        data = pickle.dumps(cls())
        return b"?" * 64 + len(data).to_bytes(8, "little") + data

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (_Trap, "sprung", True)


def test_strangers_are_turned_away_and_nothing_of_theirs_is_unpickled(
    alone: ServedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher, since = _Besieged(), time.monotonic()
    executor = ranks.start(plan_for(alone, 2), alone, launcher)
    assert time.monotonic() - since < HANDSHAKE, "waited for who stays mute"
    executor.check()
    executor.close()
    assert len(launcher.told) <= 32 + 32, "a nonce and a proof"
    assert not _Trap.sprung


def test_a_rank_reads_nothing_of_who_is_not_rank_0(alone: ServedModel) -> None:
    with socket.create_server((ranks.LOOPBACK, 0)) as listener, ThreadPoolExecutor(1) as thread:
        invitation = Invitation(*listener.getsockname(), Shard(1, 2), b"!" * 32)
        status = thread.submit(rank.run, invitation, ranks.LOOPBACK, 0)
        connection, _ = listener.accept()
        connection.sendall(_Trap.message())
        with pytest.raises(RankZeroUnreachable, match=r"^rank 1 can't reach rank 0 at 127.0.0.1:\d+: who is at the"):
            status.result(10)
        connection.close()
    assert not _Trap.sprung
    assert "!" not in repr(invitation), "the secret isn't for a log"


def test_a_rank_that_cannot_connect_says_where_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((ranks.LOOPBACK, 0)) as listener:
        invitation = Invitation(*listener.getsockname(), Shard(1, 2), b"!" * 32)
    monkeypatch.setattr(rank.signal, "signal", lambda *_: None)  # this process goes on
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(pickle.dumps(invitation))))
    with pytest.raises(SystemExit) as ended:
        rank.main()
    where = f"{invitation.host}:{invitation.port}"
    assert ended.value.code == f"rank 1 can't reach rank 0 at {where}: [Errno 111] Connection refused"


class _OneComes(_InThisProcess):
    """Rank 1 comes, others end before they do, while strangers keep connecting."""

    def start(self, invitation: Invitation) -> RankProcess:
        if invitation.shard.rank == 1:
            return super().start(invitation)
        Thread(target=self._knock, args=(invitation.host, invitation.port), daemon=True).start()
        return LocalRank(["sleep", "0.3"])

    def _knock(self, *address: Any) -> None:
        with suppress(OSError):
            while True:
                socket.create_connection(address).close()
                time.sleep(0.01)


def test_a_rank_that_ends_among_strangers_is_noticed_and_the_others_end(alone: ServedModel) -> None:
    since = time.monotonic()
    with pytest.raises(RankLost, match=r"^rank [23] ended with status 0 before it was ready$"):
        ranks.start(plan_for(alone, 4), alone, _OneComes())  # which waits until rank 1 has ended
    assert time.monotonic() - since < 2


def test_a_missing_device_is_named_with_both_ways_to_choose_ranks(alone: ServedModel) -> None:
    with pytest.raises(ValueError, match=r"each of the 2 ranks \(`ranks`, under Ray `tensor_parallel`\) .* number 99$"):
        replace(plan_for(alone, 2), device="cuda").device_of(99)


def test_a_link_notices_that_the_other_machine_is_gone(ranked: Ranked) -> None:
    end = ranked["gpt2"][1]._peers[0].link._socket
    assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    wanted = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 5000}
    assert {name: end.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in wanted} == wanted


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
