"""The clients, against a system that serves, and against a server that refuses as it is told."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc
from backpack_serving import rpc
from backpack_serving.client import (
    AsyncClient,
    AsyncOperator,
    AsyncSteering,
    Client,
    Exhausted,
    Expired,
    Explained,
    Explanation,
    Generation,
    InvalidRequest,
    NotFound,
    Operator,
    Position,
    PreconditionFailed,
    Sampling,
    Served,
    ServiceError,
    Steering,
    Unauthenticated,
    Unavailable,
)

from tests.e2e.conftest import copy, running

PROMPT = "The story of the king and the"
SEEDED = Sampling(max_tokens=12, temperature=0.7, seed=3, log_probabilities=2)
TWICE = replace(SEEDED, samples=2)
ENDLESS = Sampling(480, ignore_end_of_text=True)


def test_importing_it_loads_neither_torch_nor_ray() -> None:
    code = "import sys, backpack_serving.client; sys.exit(bool({'torch', 'ray', 'sqlalchemy'} & set(sys.modules)))"
    path = ":".join(sys.path)
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=False).returncode == 0


async def test_both_clients_get_the_same_answers(tmp_path: Path) -> None:
    async with running(tmp_path, slots=4) as system:
        key = (await system.tenant(copy("king", "ship")))[0][1].removeprefix("Bearer ")
        served, answers = await asyncio.to_thread(_ask, system.gateway, key)
        async with AsyncClient(system.gateway, lambda: key) as client:
            parts = [part async for part in client.stream(PROMPT, SEEDED, coalesce=0.0)]
            whole = await client.generate(PROMPT, SEEDED)
            assert [part.served for part in parts][1:] == [None] * (len(parts) - 1)
            assert (parts[0].served, parts[-1].finish, parts[-1].generated_tokens) == (served, "length", 12)
            assert "".join(part.text for part in parts) == whole.text == answers["stream"] == answers["generate"]
            assert len(whole.tokens) == 12
            assert all(len(t.alternatives) == 2 and (t.log_probability or 0) < 0 for t in whole.tokens)
            assert [t.id for t in await client.tokenize(PROMPT)] == answers["ids"]
            assert await client.model() == answers["model"]
            again = await client.score(answers["ids"])
            assert again.log_probability == answers["score"].log_probability
            explained = await client.explain(PROMPT, "nurse", 5)
            assert explained == answers["explain"]
            assert sum(c.contribution for c in explained.contributions) + explained.unlisted == pytest.approx(
                explained.logit
            )
            assert await client.senses("king", 3) == answers["senses"]
            assert await client.find_senses("king", "queen", effect="both", limit=4) == answers["find"]
            assert len(answers["find"].senses) == 4
            assert all(sense.edited for sense in answers["senses"].senses)
            await _samples_explained(client, answers)
            await _compared(client, answers)
            await _not_before_a_write(client, served)


async def _samples_explained(client: AsyncClient, answers: dict[str, Any]) -> None:
    """Two samples, mixed in a stream and together in one answer; each token with what made it likely."""
    parts = [part async for part in client.stream(PROMPT, TWICE, explain=3, priority=5)]
    whole = await client.generate(PROMPT, TWICE, explain=3, priority=-5)
    assert _unexplained(whole) == _unexplained(answers["samples"])
    for sample, again in zip(whole.samples, answers["samples"].samples, strict=True):
        for token, same in zip(sample.tokens, again.tokens, strict=True):
            _same_terms(token.explanation, same.explanation)
    assert (whole.text, whole.tokens, whole.finish) == (
        whole.samples[0].text,
        whole.samples[0].tokens,
        whole.samples[0].finish,
    )
    assert whole.samples[0].text == answers["generate"]
    assert whole.samples[0].text != whole.samples[1].text
    for number, sample in enumerate(whole.samples):
        mine = [part for part in parts if part.sample == number]
        assert "".join(part.text for part in mine) == sample.text
        assert (mine[0].served, mine[-1].finish) == (whole.served, sample.finish)
        assert [token.id for part in mine for token in part.tokens] == [token.id for token in sample.tokens]
        prompt = answers["ids"]
        for at, token in enumerate(sample.tokens):
            why = token.explanation
            assert why is not None
            assert len(why.contributions) == 3
            assert sum(c.contribution for c in why.contributions) + why.unlisted == pytest.approx(why.logit)
            ids = [*prompt, *(made.id for made in sample.tokens[:at])]
            assert all(c.token.id == ids[c.position] and 0 <= c.sense < 16 for c in why.contributions)
    assert (parts[-1].prompt_tokens, parts[-1].generated_tokens) == (whole.prompt_tokens, whole.generated_tokens)
    asked = await client.explain(PROMPT, whole.tokens[0].id, 3)
    _same_terms(whole.tokens[0].explanation, asked)


def _same_terms(one: Explanation | None, two: Explanation | Explained | None) -> None:
    """The same terms, but for the last bits: those depend on how many tokens are explained together."""
    assert one is not None
    assert two is not None
    for mine, theirs in zip(one.contributions, two.contributions, strict=True):
        assert (mine.position, mine.token, mine.sense) == (theirs.position, theirs.token, theirs.sense)
        assert mine.contribution == pytest.approx(theirs.contribution, rel=1e-5, abs=1e-5)


def _unexplained(made: Generation) -> Generation:
    """Without the explanations: how many tokens are explained together, which time decides, rounds them."""
    samples = (
        replace(sample, tokens=tuple(replace(token, explanation=None) for token in sample.tokens))
        for sample in made.samples
    )
    return replace(made, samples=tuple(samples))


async def _compared(client: AsyncClient, answers: dict[str, Any]) -> None:
    """Under the release and without it: what single calls say."""
    predictions = await client.compare(PROMPT, [1, 0], top=4, targets=["ship", answers["ids"][0]])
    assert predictions == answers["compare"]
    steered, plain = predictions
    assert [p.served.release for p in predictions] == [1, 0]
    assert [token.text for token in plain.targets] == [" ship", "The"]
    logs = [token.log_probability or 0 for token in steered.top]
    assert (len(logs), logs) == (4, sorted(logs, reverse=True))
    ship = await client.explain(PROMPT, "ship")
    assert steered.targets[0].log_probability == pytest.approx(ship.target.log_probability, abs=1e-4)
    assert (steered.targets[0].log_probability or 0) > (plain.targets[0].log_probability or 0) + 0.5

    scores = await client.compare_scores(PROMPT, ["live", 0])
    assert scores == answers["compare_scores"]
    alone = await client.score(PROMPT)
    assert (scores[0].served.release, scores[0].served.digest) == (1, alone.served.digest)
    assert [t.id for t in scores[0].tokens] == [t.id for t in alone.tokens]
    assert scores[0].tokens[0].log_probability is None
    assert [t.log_probability for t in scores[0].tokens[1:]] == pytest.approx(
        [t.log_probability for t in alone.tokens[1:]], abs=1e-4
    )
    assert scores[0].perplexity == pytest.approx(alone.perplexity, rel=1e-4)
    assert [p.served.release for p in await client.compare(PROMPT)] == [0, 1], "unpatched and live, if none is named"


async def _not_before_a_write(client: AsyncClient, served: Served) -> None:
    assert (await client.score(PROMPT, since=served.at)).served.at >= served.at
    assert served.staleness < 30
    later = Position(served.at.epoch, served.at.revision + 1000)
    with pytest.raises((PreconditionFailed, Unavailable), match=f"asked for {later}") as refused:
        await client.compare(PROMPT, [0], since=later)
    assert refused.value.reason in ("NOT_WRITTEN", "BEHIND")  # if no news came while it waited, on a busy machine


def _ask(address: str, key: str) -> tuple[Any, dict[str, Any]]:
    with Client(address, key) as client:
        parts = list(client.stream(PROMPT, SEEDED))
        ids = [token.id for token in client.tokenize(PROMPT)]
        for call, kind, reason in (
            (lambda: client.generate("", SEEDED), InvalidRequest, "EMPTY"),
            (lambda: client.score([5]), InvalidRequest, "TOO_SHORT"),
            (lambda: client.generate([-1]), InvalidRequest, "OUT_OF_RANGE"),
            (lambda: client.generate(PROMPT, Sampling(seed=2**64)), InvalidRequest, "OUT_OF_RANGE"),
            (lambda: client.generate(PROMPT, Sampling(samples=17)), InvalidRequest, "OUT_OF_RANGE"),
            (lambda: list(client.stream(PROMPT, explain=65)), InvalidRequest, "OUT_OF_RANGE"),
            (lambda: list(client.stream(PROMPT, priority=101)), InvalidRequest, "OUT_OF_RANGE"),
            (lambda: client.compare(PROMPT, []), InvalidRequest, "OUT_OF_RANGE"),
            (lambda: client.compare(PROMPT, [0, 99]), NotFound, "NO_SUCH_RELEASE"),
            (lambda: client.compare_scores([5]), InvalidRequest, "TOO_SHORT"),
            (lambda: client.generate(PROMPT, ENDLESS, timeout=0.05), Expired, ""),
            (lambda: list(Client(address, "bp_x").stream(PROMPT)), Unauthenticated, "MALFORMED_KEY"),
            (lambda: Client(address).model(), Unauthenticated, "NO_CREDENTIAL"),
        ):
            with pytest.raises(kind) as refused:
                call()
            assert reason in refused.value.reason
        return parts[0].served, {
            "stream": "".join(part.text for part in parts),
            "generate": client.generate(ids, SEEDED).text,
            "ids": ids,
            "model": client.model(),
            "score": client.score(PROMPT),
            "explain": client.explain(PROMPT, "nurse", 5),
            "senses": client.senses("king", 3),
            "find": client.find_senses("king", "queen", effect="both", limit=4),
            "samples": client.generate(PROMPT, TWICE, explain=3),
            "compare": client.compare(PROMPT, [1, 0], top=4, targets=["ship", ids[0]]),
            "compare_scores": client.compare_scores(PROMPT, ["live", 0]),
        }


class Script(inference_pb2_grpc.InferenceServiceServicer):
    """Answers as it is told: an error is raised, a text is sent, None is for ever. `left`: who doesn't wait."""

    def __init__(self) -> None:
        self.calls: list[list[str | ServiceError | None]] = []
        self.seconds: list[float] = []
        self.keys: list[str | None] = []
        self.left = asyncio.Event()

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateStreamResponse]:
        self._note(context)
        for said in self.calls.pop(0):
            if isinstance(said, ServiceError):
                raise said
            try:
                yield pb.GenerateStreamResponse(text=said or "")
                await asyncio.sleep(0 if said else 600)
            except (asyncio.CancelledError, GeneratorExit):  # the latter while the server still writes
                self.left.set()
                raise

    async def Generate(self, request: Any, context: Any) -> pb.GenerateResponse:
        self._note(context)
        said = self.calls.pop(0)[0]
        if isinstance(said, ServiceError):
            raise said
        return pb.GenerateResponse(text=said or "", finish_reason=pb.FINISH_REASON_LENGTH)

    def _note(self, context: Any) -> None:
        """What each call came with: seconds that it has, and its key."""
        self.seconds.append(context.time_remaining())
        self.keys.append(rpc.bearer(context))


def _away() -> Unavailable:
    return Unavailable("NO_REPLICA", "try again", retry_after=0.01)


def _full() -> Exhausted:
    return Exhausted("REQUESTS_LIMIT", "try again later", retry_after=30.0)


@asynccontextmanager
async def _scripted() -> AsyncIterator[tuple[Script, str]]:
    script = Script()
    service = rpc.Service(
        "backpack.v1.InferenceService", inference_pb2_grpc.add_InferenceServiceServicer_to_server, script
    )
    server = await rpc.start([service], "127.0.0.1:0")
    yield script, server.address
    await server.stop()


async def _ask_by(form: str, kind: str, address: str, **how: Any) -> str:
    if form == "blocking":
        return await asyncio.to_thread(_blocking, address, kind, how)
    async with AsyncClient(address, **how) as client:
        if kind == "generate":
            return (await client.generate("x")).text
        return "".join([part.text async for part in client.stream("x")])


@pytest.mark.parametrize("kind", ["stream", "generate"])
@pytest.mark.parametrize("form", ["async", "blocking"])
async def test_what_has_not_begun_is_tried_again(kind: str, form: str) -> None:
    async with _scripted() as (script, address):
        ask = partial(_ask_by, form, kind, address)
        script.calls = [[_away()], [_away()], ["fine"]]
        assert await ask() == "fine"
        script.calls = [[_away()], [_away()], ["too late"]]
        with pytest.raises(Unavailable):
            await ask(attempts=2)
        assert len(script.calls) == 1
        script.calls = [[_full()], ["not asked for"]]
        with pytest.raises(Exhausted) as refused:
            await ask()
        assert (refused.value.retry_after, len(script.calls)) == (30.0, 1)
        if kind == "stream":
            script.calls = [["half", _away()], ["not asked for"]]
            with pytest.raises(Unavailable):
                await ask()
            assert len(script.calls) == 1, "half a text can't be taken back"


@pytest.mark.parametrize("kind", ["stream", "generate"])
@pytest.mark.parametrize("form", ["async", "blocking"])
async def test_all_attempts_have_the_time_of_one_call(kind: str, form: str) -> None:
    async with _scripted() as (script, address):
        script.calls = [[Unavailable("STALE", "later", retry_after=1.0)], ["fine"]]
        assert await _ask_by(form, kind, address, timeout=10.0) == "fine"
        first, second = script.seconds
        assert second < first - 0.5, "to within the 3 % that gRPC rounds up"
        script.calls = [[Unavailable("STALE", "later", retry_after=60.0)], ["not asked for"]]
        with pytest.raises(Unavailable) as refused:  # now: there is no time for another
            await asyncio.wait_for(_ask_by(form, kind, address, timeout=30.0), 20)
        assert (refused.value.retry_after, len(script.calls)) == (60.0, 1)


@pytest.mark.parametrize("kind", ["stream", "generate"])
@pytest.mark.parametrize("form", ["async", "blocking"])
async def test_a_key_may_end_its_line_and_one_that_cant_be_sent_is_refused(kind: str, form: str) -> None:
    async with _scripted() as (script, address):
        script.calls = [["fine"], ["not asked for"]]
        assert await _ask_by(form, kind, address, key="bp_key\n") == "fine"
        assert script.keys == ["bp_key"]
        for key in ("bp_clé", "bp_key\nbp_key", "bp_\0"):
            with pytest.raises(Unauthenticated, match="one line of plain ASCII") as refused:
                await _ask_by(form, kind, address, key=key)
            assert refused.value.reason == "MALFORMED_KEY"
            assert key not in str(refused.value)
        assert len(script.calls) == 1


def test_no_attempt_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="attempts=0; 1"):
        Client("127.0.0.1:1", attempts=0)


@pytest.mark.parametrize("form", ["async", "blocking"])
async def test_leaving_a_stream_early_ends_it(form: str) -> None:
    async with _scripted() as (script, address):
        script.calls = [["begun", None]]
        if form == "blocking":
            await asyncio.to_thread(_first, address)
        else:
            async with AsyncClient(address) as client, aclosing(client.stream("x")) as parts:
                assert (await anext(parts)).text == "begun"
                await parts.aclose()
                await asyncio.wait_for(script.left.wait(), 60)
        await asyncio.wait_for(script.left.wait(), 60)


def _first(address: str) -> None:
    client = Client(address)
    for part in client.stream("x"):
        assert part.text == "begun"
        break


def test_blocking_clients_can_all_that_the_others_can() -> None:
    for blocks, loops in ((Client, AsyncClient), (Steering, AsyncSteering), (Operator, AsyncOperator)):
        can, could = ({n for n in dir(kind) if n[0] != "_"} for kind in (blocks, loops))
        assert can - {"ASYNC"} == could
        for name in could - {"close"}:
            assert inspect.signature(getattr(blocks, name)) == inspect.signature(getattr(loops, name))
            assert getattr(blocks, name).__doc__


def _blocking(address: str, kind: str, how: dict[str, Any]) -> str:
    with Client(address, **how) as client:
        return client.generate("x").text if kind == "generate" else "".join(p.text for p in client.stream("x"))
