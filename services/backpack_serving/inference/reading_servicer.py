"""InferenceService on a replica, what reads the model: forward passes beside the engine, one at a time."""

from __future__ import annotations

import asyncio
import hmac
import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar

import structlog
from backpack_lm.attribution import Term
from backpack_lm.compare import Distribution
from backpack_lm.overlay import Overlay
from backpack_lm.patch import PatchError
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc as grpc_v1

from backpack_serving import rpc, tasks
from backpack_serving.errors import Internal, InvalidRequest, PreconditionFailed, ServiceError, Unavailable
from backpack_serving.inference import wire as answers
from backpack_serving.inference.fair_lock import FairLock
from backpack_serving.inference.release_cache import ReleaseCache
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.observability.metrics import ReplicaMetrics
from backpack_serving.wire import inference as wire
from backpack_serving.wire.compare import read_question

log = structlog.get_logger(__name__)

T = TypeVar("T")

TOGETHER = 16
"""Releases of a comparison that are held compiled at once, and read before anybody else may read."""


class ReadingMethods(grpc_v1.InferenceServiceServicer):
    """Scores, explains and compares under the releases that the gateway pinned."""

    def __init__(self, served: ServedModel, versions: ReleaseCache, service_key: str, metrics: ReplicaMetrics) -> None:
        self._served, self._versions = served, versions
        self._service_key, self._metrics = service_key, metrics
        self._turns = FairLock()  # one forward pass beside the engine at a time

    async def Score(self, request: pb.ScoreRequest, context: rpc.Context) -> pb.ScoreResponse:
        async with self._pinned_release(context) as (pin, overlay):
            tokenizer = self._served.tokenizer
            ids = wire.read_prompt("text", request.text, tokenizer, self._served.manifest.config)
            if len(ids) < 2:
                raise InvalidRequest.at("text", "TOO_SHORT", "one token; a score needs at least two")
            logs = await self._in_turn(pin.tenant, self._served.score, ids, overlay)
            _check_finite(logs)
            return pb.ScoreResponse(
                tokens=[wire.write_token(i, tokenizer, p) for i, p in zip(ids, [None, *logs], strict=True)],
                log_probability=math.fsum(logs),
                perplexity=answers.perplexity(logs),
                served=answers.served(pin, overlay.digest, self._served.manifest),
            )

    async def Explain(self, request: pb.ExplainRequest, context: rpc.Context) -> pb.ExplainResponse:
        async with self._pinned_release(context) as (pin, overlay):
            tokenizer, config = self._served.tokenizer, self._served.manifest.config
            ids = wire.read_prompt("prompt", request.prompt, tokenizer, config)
            limit = wire.read_limit(request.limit, default=20, largest=1000)
            target = None
            if request.HasField("target"):
                target = wire.read_word("target", request.target, tokenizer, config)
            found = await self._in_turn(pin.tenant, self._served.explain, ids, overlay, target)
            _check_finite([found.logit, found.log_probability])
            terms, unlisted = found.largest(limit)
            return pb.ExplainResponse(
                target=wire.write_token(found.target, tokenizer, found.log_probability),
                logit=found.logit,
                contributions=self._contributions(terms, ids),
                unlisted=unlisted,
                served=answers.served(pin, overlay.digest, self._served.manifest),
            )

    def _contributions(self, terms: Sequence[Term], ids: Sequence[int]) -> list[pb.Contribution]:
        return [
            pb.Contribution(
                position=term.position,
                token=wire.write_token(ids[term.position], self._served.tokenizer),
                sense=term.sense,
                weight=term.weight,
                multiplier=term.multiplier,
                contribution=term.contribution,
            )
            for term in terms
        ]

    async def Compare(self, request: pb.CompareRequest, context: rpc.Context) -> pb.CompareResponse:
        self._check_gateway(context)
        pins = answers.read_pins(request)
        structlog.contextvars.bind_contextvars(tenant=pins[0].tenant)
        tokenizer, manifest = self._served.tokenizer, self._served.manifest
        question = read_question(request, tokenizer, manifest.config)
        await context.send_initial_metadata(())
        text = await self._in_turn(pins[0].tenant, self._served.compare, question)
        distinct = list({pin.release_digest: pin for pin in pins}.values())
        results: dict[str, pb.ComparedRelease] = {}
        for at in range(0, len(distinct), TOGETHER):
            async with self._overlays(distinct[at : at + TOGETHER], context) as overlays:
                found = await self._in_turn(pins[0].tenant, text.read, overlays)
                for overlay, read in zip(overlays, found, strict=True):
                    results[overlay.digest] = _write_compared(read, tokenizer)
        response = pb.CompareResponse(tokens=[wire.write_token(i, tokenizer) for i in question.ids])
        for pin in pins:
            compared = response.releases.add()
            compared.CopyFrom(results[pin.release_digest])
            compared.served.CopyFrom(answers.served(pin, pin.release_digest, manifest))
        return response

    async def ListSenses(self, request: pb.ListSensesRequest, context: rpc.Context) -> pb.ListSensesResponse:
        async with self._pinned_release(context) as (pin, overlay):
            tokenizer, config = self._served.tokenizer, self._served.manifest.config
            token = wire.read_word("word", request.word, tokenizer, config)
            limit = min(wire.read_limit(request.limit, default=10, largest=100), config.tokens)
            near = min(wire.read_limit(request.neighbours, 0, 100, "neighbours"), config.tokens - 1)
            found = await self._in_turn(pin.tenant, self._served.senses, token, overlay, limit, near)

            def scored(some: Sequence[tuple[int, float]]) -> list[pb.ScoredToken]:
                return [pb.ScoredToken(token=wire.write_token(y, tokenizer), score=value) for y, value in some]

            return pb.ListSensesResponse(
                token=wire.write_token(token, tokenizer),
                senses=[
                    pb.Sense(
                        sense=number,
                        norm=sense.norm,
                        edited=sense.edited,
                        positive=scored(sense.positive),
                        negative=scored(sense.negative),
                        neighbours=scored(sense.neighbours),
                    )
                    for number, sense in enumerate(found)
                ],
                served=answers.served(pin, overlay.digest, self._served.manifest),
            )

    async def Tokenize(self, request: pb.TokenizeRequest, context: rpc.Context) -> pb.TokenizeResponse:
        self._check_gateway(context)
        config = self._served.manifest.config
        return await asyncio.to_thread(wire.tokenize, request, self._served.tokenizer, config)

    async def GetModel(self, request: pb.GetModelRequest, context: rpc.Context) -> pb.GetModelResponse:
        self._check_gateway(context)
        return wire.write_model(self._served.manifest)

    async def _in_turn(self, tenant: str, work: Callable[..., T], *arguments: object) -> T:
        """Have the model read something, in a thread. Nobody else's turn comes before that is over, though whoever
        asked has left: a thread can't be stopped, and several would take the engine's cores."""
        async with self._turns.acquire(tenant):
            return await tasks.finish(asyncio.to_thread(work, *arguments))

    # ---- the release

    @asynccontextmanager
    async def _pinned_release(self, context: rpc.Context) -> AsyncIterator[tuple[pb.Pin, Overlay]]:
        """The pinned release, compiled. An error if it can't be had: never another release, never none."""
        self._check_gateway(context)
        pin = answers.read_pin(context)
        structlog.contextvars.bind_contextvars(tenant=pin.tenant)
        await context.send_initial_metadata(())  # the gateway knows by this that the request is here
        async with self._overlays([pin], context) as overlays:
            yield pin, overlays[0]

    @asynccontextmanager
    async def _overlays(self, pins: Sequence[pb.Pin], context: rpc.Context) -> AsyncIterator[list[Overlay]]:
        """All of these releases, compiled; an error if one of them can't be had."""
        left = context.time_remaining()
        patience = None if left is None else max(0.0, left - min(0.5, left / 10))  # so that a refusal still arrives
        async with AsyncExitStack() as stack:

            async def get(pin: pb.Pin) -> Overlay | ServiceError | PatchError:
                try:
                    using = self._versions.use(pin.tenant, pin.release_digest, patience)
                    return await stack.enter_async_context(using)
                except (ServiceError, PatchError) as error:
                    log.warning("release refused", tenant=pin.tenant, digest=pin.release_digest, error=str(error))
                    return error

            with self._metrics.release_seconds.time():
                # One alone without a task: if it is compiled, the engine has its request before all else.
                found = await asyncio.gather(*map(get, pins)) if len(pins) > 1 else [await get(pins[0])]
            overlays: list[Overlay] = []
            for pin, one in zip(pins, found, strict=True):
                if isinstance(one, PatchError):
                    raise _unservable(one, pin)
                if isinstance(one, ServiceError):
                    raise one
                overlays.append(one)
            yield overlays

    def _check_gateway(self, context: rpc.Context) -> None:
        if not hmac.compare_digest((rpc.bearer(context) or "").encode(), self._service_key.encode()):
            # While the service's key is replaced, a gateway shall try another replica, and a client again.
            message = "replicas take calls from gateways only; call the gateway"
            raise Unavailable("NOT_A_GATEWAY", message, retry_after=1.0)


def _write_compared(read: list[float] | Distribution, tokenizer: Tokenizer) -> pb.ComparedRelease:
    """What was read under one release. Raises Internal if it isn't numbers."""
    if isinstance(read, list):
        _check_finite(read)
        return pb.ComparedRelease(score=answers.write_score(read))
    _check_finite(value for _, value in (*read.top, *read.targets))
    return pb.ComparedRelease(next=answers.write_next(read.top, read.targets, tokenizer))


def _check_finite(logs: Iterable[float]) -> None:
    if not all(map(math.isfinite, logs)):
        raise Internal("NON_FINITE", "the release makes the model predict no numbers")


def _unservable(error: PatchError, pin: pb.Pin) -> ServiceError:
    """A release that was stored but can't be applied here is no mistake of the caller's request."""
    return PreconditionFailed(error.violations[0].reason, f"release {pin.release} can't be served: {error}")
