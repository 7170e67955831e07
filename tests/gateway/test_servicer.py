"""What a gateway charges and counts, in front of a replica that answers as it is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from backpack_lm import word_uses
from backpack_lm.installed import folder_of
from backpack_lm.manifest import Manifest
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import directory_pb2, inference_pb2_grpc
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving import rpc
from backpack_serving.auth.keys import Principal, Role
from backpack_serving.client import AsyncClient, Sampling
from backpack_serving.errors import Exhausted, Internal, InvalidRequest, ServiceError, Unavailable
from backpack_serving.gateway.canary_stats import CanaryStats
from backpack_serving.gateway.limits import Limit, TenantLimits
from backpack_serving.gateway.routing import Router
from backpack_serving.gateway.servicer import COMPARED_TOKENS, LISTED_TOKENS, SEARCHED_TOKENS, GatewayServicer
from backpack_serving.gateway.usage import UsageMeter
from backpack_serving.observability.metrics import Metrics
from backpack_serving.references import Pin
from backpack_serving.wire.words import USE_TOKENS

from tests.rpc.test_strangers import DATA, LAST, answered, begin, frame

MANIFEST, TOKENIZER = Manifest.read(folder_of("micro")), Tokenizer.read(folder_of("micro") / "tokenizer.json")
PINNED = Pin("t", "live", 1, "ab" * 32, 1, 1)
SERVED = pb.Served(tenant="t", release=1, release_digest=PINNED.digest)
PROMPT = [1, 2, 3, 4, 5, 6, 7]
MINUTE = 1000.0
"""Tokens that a tenant has."""

Ask = Callable[[AsyncClient], Awaitable[object]]


class Anybody:
    """Knows every caller, and pins every request."""

    async def who(self, context: rpc.Context) -> Principal:
        return Principal("t", "k", frozenset([Role.CALLER, Role.AUTHOR]))

    async def channel(self, *_: Any) -> Pin:
        return PINNED


class Replica(inference_pb2_grpc.InferenceServiceServicer):
    """Takes every request, and answers in a while, or refuses."""

    refusal: ServiceError | None = None
    takes = True
    seconds = 0.05
    asked = 0
    prompts: Sequence[Sequence[int]] = ()

    async def Score(self, request: pb.ScoreRequest, context: rpc.Context) -> pb.ScoreResponse:
        await self._work(context)
        return pb.ScoreResponse(served=SERVED)

    async def FindSenses(self, request: pb.FindSensesRequest, context: rpc.Context) -> pb.FindSensesResponse:
        await self._work(context)
        self.prompts = [list(prompt.tokens.ids) for prompt in request.prompts]
        return pb.FindSensesResponse(served=SERVED)

    async def ListSenses(self, request: pb.ListSensesRequest, context: rpc.Context) -> pb.ListSensesResponse:
        await self._work(context)
        return pb.ListSensesResponse(served=SERVED)

    async def MapSense(self, request: pb.MapSenseRequest, context: rpc.Context) -> pb.MapSenseResponse:
        await self._work(context)
        return pb.MapSenseResponse(served=SERVED)

    async def ListUses(self, request: pb.ListUsesRequest, context: rpc.Context) -> pb.ListUsesResponse:
        await self._work(context)
        return pb.ListUsesResponse(served=SERVED)

    async def Generate(self, request: pb.GenerateRequest, context: rpc.Context) -> pb.GenerateResponse:
        await self._work(context)
        usage = pb.Usage(generated_tokens=3)
        return pb.GenerateResponse(served=SERVED, usage=usage, finish_reason=pb.FINISH_REASON_STOP)

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: rpc.Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        await self._work(context)
        yield pb.GenerateStreamResponse(served=SERVED, tokens=[pb.Token()] * 3)
        if request.sampling.samples > 1:
            other = pb.Served(tenant="t", release=2, release_digest="cd" * 32)
            yield pb.GenerateStreamResponse(sample=1, served=other, tokens=[pb.Token()])

    async def _work(self, context: rpc.Context) -> None:
        self.asked += 1
        if self.takes:
            await context.send_initial_metadata(())
        await asyncio.sleep(self.seconds)
        if self.refusal:
            raise self.refusal


@dataclass
class Running:
    gateway: str
    replica: Replica
    stop_replica: Callable[[], Awaitable[None]]
    metrics: Metrics
    left: Callable[[], float]
    drain: Callable[[], Awaitable[None]]

    def told(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"backpack_{name}", labels) or 0.0


@asynccontextmanager
async def _running(listed: int = 1, also: str | None = None) -> AsyncIterator[Running]:
    """A gateway, and a replica that the directory lists so many times, and once at another address."""
    name, register = "backpack.v1.InferenceService", inference_pb2_grpc.add_InferenceServiceServicer_to_server
    replica, metrics, anybody = Replica(), Metrics(), Anybody()
    behind = await rpc.start([rpc.Service(name, register, replica)], "127.0.0.1:0")
    fingerprint = MANIFEST.fingerprint
    # A clock that stands: who is lost stays lost, and nothing is refilled.
    router = Router(fingerprint, clock=lambda: 0.0)
    limits = TenantLimits(Limit(tokens_per_minute=MINUTE), clock=lambda: 0.0)
    addresses = [behind.address] * listed + ([] if also is None else [also])
    how = {"model_fingerprint": fingerprint, "slots": 1}
    router.update([directory_pb2.Replica(id=f"r{n}", address=at, **how) for n, at in enumerate(addresses)])
    meters = UsageMeter(limits, metrics.gateway(lambda: 1, lambda: 0.0))
    servicer: Any = GatewayServicer(
        MANIFEST,
        TOKENIZER,
        anybody,
        anybody,
        meters,
        router,
        CanaryStats(),
        anybody,
        "key",
        False,  # type: ignore[arg-type]
    )
    front = await rpc.start([rpc.Service(name, register, servicer)], "127.0.0.1:0", metrics.calls("gateway"))

    def left() -> float:
        """Tokens that the tenant has left."""
        with limits.request("t") as take:
            take(1)
            take(-1)
        tokens = limits._buckets["t"].tokens
        assert tokens is not None
        return tokens._level

    try:
        yield Running(front.address, replica, lambda: behind.stop(0), metrics, left, lambda: front.stop(0))
    finally:
        await front.stop(0)
        await behind.stop(0)


async def _score(client: AsyncClient) -> object:
    return await client.score(PROMPT)


async def _generate(client: AsyncClient) -> object:
    return await client.generate(PROMPT, Sampling(100))


async def _stream(client: AsyncClient) -> object:
    return [part async for part in client.stream(PROMPT, Sampling(100))]


@pytest.mark.parametrize("ask", [_score, _generate, _stream])
@pytest.mark.parametrize(
    "refusal",
    [None, Exhausted("QUEUE_FULL", "later"), Unavailable("DRAINING", "elsewhere"), Internal("NON_FINITE", "?")],
    ids=["gone", "full", "draining", "failed"],
)
async def test_what_is_refused_costs_nothing(ask: Ask, refusal: ServiceError | None) -> None:
    async with _running() as system, AsyncClient(system.gateway, attempts=1) as client:
        system.replica.refusal = refusal
        if refusal is None:
            await system.stop_replica()
        with pytest.raises(ServiceError):
            await ask(client)
        assert system.left() == MINUTE
        for kind in ("prompt", "generated"):
            assert system.told("tokens_total", tenant="t", kind=kind) == 0
        assert system.told("handoff_seconds_count") == 0, "no replica has it"


@pytest.mark.parametrize("ask", [_score, _generate, _stream])
async def test_what_the_gateways_own_drain_ends_costs_nothing(ask: Ask) -> None:
    async with _running() as system, AsyncClient(system.gateway, attempts=1) as client:
        system.replica.seconds = 30
        asking = asyncio.create_task(ask(client))
        while not system.replica.asked:
            await asyncio.sleep(0.01)
        await system.drain()
        with pytest.raises(Unavailable):
            await asking
        assert system.left() == MINUTE
        assert system.told("tokens_total", tenant="t", kind="prompt") == 0


@pytest.mark.parametrize("ask", [_score, _generate, _stream])
async def test_a_replica_that_is_unavailable_is_asked_once(ask: Ask) -> None:
    """gRPC's own retries would ask it three times more, for most of a second, before another one is tried."""
    async with _running() as system, AsyncClient(system.gateway, attempts=1) as client:
        system.replica.refusal, system.replica.takes = Unavailable("NOT_A_GATEWAY", "elsewhere"), False
        with pytest.raises(Unavailable, match="no replica"):
            await ask(client)
        assert system.replica.asked == 1


@pytest.mark.parametrize("ask", [_score, _generate, _stream])
async def test_where_replicas_were_that_are_gone_is_not_told(ask: Ask) -> None:
    async with _running(listed=2) as system, AsyncClient(system.gateway, attempts=1) as client:
        await system.stop_replica()
        with pytest.raises(Unavailable, match="try again shortly") as refused:
            await ask(client)
        assert (refused.value.reason, refused.value.retry_after) == ("NO_REPLICA", 1.0)


@pytest.mark.parametrize("ask", [_score, _generate, _stream])
async def test_what_is_no_address_is_as_a_replica_that_is_gone(ask: Ask) -> None:
    async with _running(also="") as system, AsyncClient(system.gateway, attempts=1) as client:
        for _ in range(10):  # each is one of the two, as long as neither is known to be lost
            await ask(client)


@pytest.mark.parametrize(("ask", "made"), [(_score, 0), (_generate, 3), (_stream, 3)])
async def test_what_is_answered_costs_its_prompt_and_what_was_made(ask: Ask, made: int) -> None:
    async with _running() as system, AsyncClient(system.gateway) as client:
        await ask(client)
        assert system.left() == MINUTE - len(PROMPT) - made
        assert system.told("tokens_total", tenant="t", kind="prompt") == len(PROMPT)
        assert system.told("tokens_total", tenant="t", kind="generated") == made
        # Of an answer in one piece gRPC doesn't tell when the replica took the request.
        assert system.told("handoff_seconds_count") == (ask is _stream)


async def test_a_prompt_whose_log_probabilities_are_asked_for_costs_twice() -> None:
    async with _running() as system, AsyncClient(system.gateway) as client:
        sampling = Sampling(100, prompt_log_probabilities=0)
        await client.generate(PROMPT, sampling)
        assert system.left() == MINUTE - 2 * len(PROMPT) - 3
        assert [part async for part in client.stream(PROMPT, sampling)]
        assert system.left() == MINUTE - 2 * (2 * len(PROMPT) + 3)


async def test_no_stream_waits_while_a_long_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "longest", 4000)  # then the context holds, perhaps, two million bytes
    text, loops, encode = "king " * 200_000, threading.current_thread(), TOKENIZER.encode
    turns = 0
    during: list[int] = []  # turns of the event loop, while each text was read

    def watched(read: str) -> list[int]:
        assert threading.current_thread() is not loops, "every stream waits for the event loop's thread"
        before = turns
        ids = encode(read)
        during.append(turns - before)
        return ids

    monkeypatch.setattr(TOKENIZER, "encode", watched)
    async with _running() as system, AsyncClient(system.gateway, attempts=1) as client:
        for ask in (client.generate, client.score, client.explain):
            asking = asyncio.ensure_future(ask(text))  # type: ignore[operator]
            while not asking.done():
                await asyncio.sleep(0)
                turns += 1
            with pytest.raises(InvalidRequest, match="200001 tokens; the context holds 512"):
                await asking
    assert len(during) == 3
    assert min(during) > 1, "it holds Python's lock"


async def test_every_sample_of_a_stream_must_be_of_the_pinned_release() -> None:
    async with _running() as system, AsyncClient(system.gateway) as client:
        parts = client.stream(PROMPT, Sampling(100, samples=2))
        assert (await anext(parts)).served is not None
        with pytest.raises(ServiceError, match=f"answered with {'cd' * 32}") as refused:
            await anext(parts)
        assert (refused.value.code, refused.value.reason) == ("INTERNAL", "WRONG_RELEASE")


async def test_a_deadline_that_means_none_reaches_a_replica_as_one_that_can_be_counted() -> None:
    """Go and Java send the largest that they have, 292 years; added to now, gRPC took it for the past."""
    prompt = pb.Prompt(tokens=pb.TokenIds(ids=PROMPT))
    message = pb.GenerateRequest(prompt=prompt, sampling=pb.Sampling(max_tokens=1)).SerializeToString()
    path = "/backpack.v1.InferenceService/Generate"
    call = begin(1, path, **{"grpc-timeout": "2562047H"})
    call += frame(DATA, LAST, 1, b"\0" + len(message).to_bytes(4, "big") + message)
    async with _running() as running:
        assert await asyncio.to_thread(answered, running.gateway, call)


async def test_a_search_costs_its_scan_and_its_prompts_and_a_words_senses_their_own() -> None:
    async with _running() as system, AsyncClient(system.gateway, attempts=1) as client:
        await client.find_senses(PROMPT[0])
        left = MINUTE - SEARCHED_TOKENS
        assert system.left() == left
        text = " understanding" * 400  # so long that it is encoded in a thread
        await client.find_senses(PROMPT[0], prompts=[PROMPT, text])
        ids = TOKENIZER.encode_prompt(text)
        assert system.replica.prompts == [PROMPT, ids], "as the gateway has read them"
        left -= SEARCHED_TOKENS + len(PROMPT) + len(ids)
        assert system.left() == left
        await client.senses(PROMPT[0])
        assert system.left() == left - LISTED_TOKENS
        await client.senses(PROMPT[0], neighbours=3)
        left -= 2 * LISTED_TOKENS + COMPARED_TOKENS
        assert system.left() == left
        await client.map_sense(0, [1, 2, 3])
        await client.uses(PROMPT[0], limit=3)
        assert system.left() == left - LISTED_TOKENS - 3 * USE_TOKENS


def test_a_use_costs_as_many_tokens_as_are_read_for_it() -> None:
    assert USE_TOKENS == word_uses.BEFORE + 1 + word_uses.AFTER


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (pb.FindSensesRequest(), "EMPTY"),
        (pb.FindSensesRequest(words=[pb.Word(token=99_999)]), "UNKNOWN_TOKEN"),
        (pb.FindSensesRequest(words=[pb.Word(token=1)], page_token="!"), "BAD_PAGE_TOKEN"),
        (pb.FindSensesRequest(words=[pb.Word(token=1)], prompts=[pb.Prompt(text="a")] * 17), "TOO_MANY"),
        (pb.MapSenseRequest(words=[pb.Word(token=1)]), "TOO_FEW"),
        (pb.ListUsesRequest(word=pb.Word(token=1), limit=33), "OUT_OF_RANGE"),
        (pb.ListUsesRequest(word=pb.Word(token=99_999)), "UNKNOWN_TOKEN"),
        (pb.ListUsesRequest(), "EMPTY"),
    ],
)
async def test_a_bad_search_reaches_no_replica(request_: Any, reason: str) -> None:
    async with _running() as system:
        channel = rpc.channel(system.gateway)
        with pytest.raises(InvalidRequest) as refused, rpc.errors():
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await getattr(stub, type(request_).__name__.removesuffix("Request"))(request_)
        assert (refused.value.reason, system.replica.asked) == (reason, 0)
        await channel.close()
