"""InferenceService on a replica: the same class wherever it runs, in one process with everything or under Ray."""

from __future__ import annotations

import asyncio
import hmac
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import structlog
from backpack_lm.overlay import Overlay
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc as grpc_v1

from backpack_serving import rpc
from backpack_serving.engine.loop import EngineLoop
from backpack_serving.errors import InvalidRequest, Unavailable
from backpack_serving.inference import wire as answers
from backpack_serving.inference.model_reader import ModelReader
from backpack_serving.inference.pinned_releases import Pinned, PinnedReleases
from backpack_serving.inference.release_cache import ReleaseCache
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.inference.text_generator import TextGenerator
from backpack_serving.observability.metrics import ReplicaMetrics
from backpack_serving.wire import inference as wire
from backpack_serving.wire.compare import read_comparison
from backpack_serving.wire.search import read_search, read_search_page
from backpack_serving.wire.words import read_map, read_use_count


class InferenceServicer(grpc_v1.InferenceServiceServicer):
    """Each method validates, makes one call under the release that the gateway pinned, and translates the result."""

    def __init__(
        self,
        served: ServedModel,
        engine: EngineLoop,
        releases: ReleaseCache,
        service_key: str,
        metrics: ReplicaMetrics,
    ) -> None:
        self._service_key = service_key
        self._manifest, self._config, self._tokenizer = served.manifest, served.manifest.config, served.tokenizer
        self._shape = served.shape
        self._releases = PinnedReleases(releases, metrics)
        self._reader = ModelReader(served)
        self._generator = TextGenerator(served, engine, self._reader, metrics)

    async def Generate(self, request: pb.GenerateRequest, context: rpc.Context) -> pb.GenerateResponse:
        # A stop string is found when the text comes: until the end, the engine would make tokens for nothing.
        coalesce = wire.COALESCE if request.sampling.stop else math.inf
        response = pb.GenerateResponse()
        async with aclosing(self._generate(request, context, coalesce)) as parts:
            async for part in parts:
                answers.add_part(response, part)
        return response

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: rpc.Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        coalesce = wire.read_coalesce(request)
        async with aclosing(self._generate(request, context, coalesce)) as parts:
            async for part in parts:
                yield part

    async def _generate(
        self, request: wire.Generation, context: rpc.Context, coalesce: float
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        async with self._pinned_release(context, request) as (pin, overlay):
            params = wire.read_generation(request, self._tokenizer, self._config, self._manifest.defaults)
            async with aclosing(self._generator.generate(params, pin, overlay, coalesce)) as parts:
                async for part in parts:
                    yield part

    async def Score(self, request: pb.ScoreRequest, context: rpc.Context) -> pb.ScoreResponse:
        async with self._pinned_release(context, request) as (pin, overlay):
            ids = wire.read_prompt("text", request.text, self._tokenizer, self._config)
            if len(ids) < 2:
                raise InvalidRequest.at("text", "TOO_SHORT", "one token; a score needs at least two")
            top = min(wire.read_alternatives(request), self._config.tokens)
            ranked = await self._reader.rank(pin.tenant, ids, overlay, top)
            return pb.ScoreResponse(
                tokens=answers.write_ranked(ids, ranked, self._tokenizer),
                log_probability=math.fsum(ranked.logs),
                perplexity=answers.perplexity(ranked.logs),
                served=answers.served(pin, overlay.digest, self._manifest),
            )

    async def Explain(self, request: pb.ExplainRequest, context: rpc.Context) -> pb.ExplainResponse:
        async with self._pinned_release(context, request) as (pin, overlay):
            ids = wire.read_prompt("prompt", request.prompt, self._tokenizer, self._config)
            limit = wire.read_limit(request.limit, default=20, largest=1000)
            target = None
            if request.HasField("target"):
                target = wire.read_word("target", request.target, self._tokenizer, self._config)
            found = await self._reader.explain(pin.tenant, ids, overlay, target)
            listed, unlisted = found.terms.largest(limit)
            return pb.ExplainResponse(
                target=wire.write_token(found.target, self._tokenizer, found.log_probability),
                logit=found.terms.logit,
                contributions=answers.write_contributions(listed, ids, self._tokenizer),
                unlisted=unlisted,
                bias=found.terms.bias,
                served=answers.served(pin, overlay.digest, self._manifest),
            )

    async def Compare(self, request: pb.CompareRequest, context: rpc.Context) -> pb.CompareResponse:
        self._check_gateway(context)
        pins = answers.read_pins(request)
        structlog.contextvars.bind_contextvars(tenant=pins[0].tenant)
        query = read_comparison(request, self._tokenizer, self._config)
        pinned = await self._with_drafts(pins, request.releases)
        await context.send_initial_metadata(())
        found = await self._reader.compare(
            query, pinned, lambda some: self._releases.use(some, context.time_remaining())
        )
        written = {digest: answers.write_compared(answer, self._tokenizer) for digest, answer in found.items()}
        response = pb.CompareResponse(tokens=[wire.write_token(i, self._tokenizer) for i in query.ids])
        for one in pinned:
            compared = response.releases.add()
            compared.CopyFrom(written[one.digest])
            compared.served.CopyFrom(answers.served(one.pin, one.digest, self._manifest))
        return response

    async def ListSenses(self, request: pb.ListSensesRequest, context: rpc.Context) -> pb.ListSensesResponse:
        async with self._pinned_release(context, request) as (pin, overlay):
            token = wire.read_word("word", request.word, self._tokenizer, self._config)
            limit = min(wire.read_limit(request.limit, default=10, largest=100), self._config.tokens)
            neighbours = min(wire.read_limit(request.neighbours, 0, 100, "neighbours"), self._config.tokens - 1)
            found = await self._reader.senses(pin.tenant, token, overlay, limit, neighbours)
            return pb.ListSensesResponse(
                token=wire.write_token(token, self._tokenizer),
                senses=answers.write_senses(found, self._tokenizer),
                served=answers.served(pin, overlay.digest, self._manifest),
            )

    async def Judge(self, request: pb.JudgeRequest, context: rpc.Context) -> pb.JudgeResponse:
        async with self._pinned_release(context, request) as (pin, overlay):
            limit = wire.read_limit(request.limit, default=10, largest=100)
            effects = await self._reader.judge(pin.tenant, overlay, limit)
            return pb.JudgeResponse(
                tokens=effects.tokens,
                perplexity_before=effects.before,
                perplexity_after=effects.after,
                moved=answers.write_moved(effects.moved, self._tokenizer),
                cells=len(overlay.rows),
                topics=len(overlay.topics),
                biased=len(overlay.bias.tokens) if overlay.bias else 0,
                served=answers.served(pin, overlay.digest, self._manifest),
            )

    async def FindSenses(self, request: pb.FindSensesRequest, context: rpc.Context) -> pb.FindSensesResponse:
        async with self._pinned_release(context, request) as (pin, overlay):
            query, page = read_search(request, self._tokenizer, self._config), read_search_page(request)
            page.check(query, overlay.digest)
            found = await self._reader.search(pin.tenant, query, page, overlay)
            return pb.FindSensesResponse(
                senses=answers.write_found(found, self._tokenizer),
                next_page_token=page.following(len(found), query, overlay.digest),
                words=[wire.write_token(token, self._tokenizer) for token in query.words],
                against=[wire.write_token(token, self._tokenizer) for token in query.against],
                served=answers.served(pin, overlay.digest, self._manifest),
            )

    async def MapSense(self, request: pb.MapSenseRequest, context: rpc.Context) -> pb.MapSenseResponse:
        async with self._pinned_release(context, request) as (pin, overlay):
            query = read_map(request, self._tokenizer, self._config)
            found = await self._reader.map_sense(pin.tenant, query, overlay)
            response = answers.write_map(query.words, found, self._tokenizer)
            response.served.CopyFrom(answers.served(pin, overlay.digest, self._manifest))
            return response

    async def ListUses(self, request: pb.ListUsesRequest, context: rpc.Context) -> pb.ListUsesResponse:
        async with self._pinned_release(context, request) as (pin, overlay):
            token = wire.read_word("word", request.word, self._tokenizer, self._config)
            found = await self._reader.uses(pin.tenant, token, overlay, read_use_count(request))
            return pb.ListUsesResponse(
                token=wire.write_token(token, self._tokenizer),
                uses=[answers.write_use(use, self._tokenizer) for use in found.uses],
                occurrences=found.occurrences,
                text_tokens=found.tokens,
                served=answers.served(pin, overlay.digest, self._manifest),
            )

    async def Tokenize(self, request: pb.TokenizeRequest, context: rpc.Context) -> pb.TokenizeResponse:
        self._check_gateway(context)
        return await asyncio.to_thread(wire.tokenize, request, self._tokenizer, self._config)

    async def GetModel(self, request: pb.GetModelRequest, context: rpc.Context) -> pb.GetModelResponse:
        self._check_gateway(context)
        return wire.write_model(self._manifest)

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: rpc.Context) -> pb.ListReplicasResponse:
        self._check_gateway(context)
        raise InvalidRequest("NOT_HERE", "a replica knows of no other one; ask a gateway")

    @asynccontextmanager
    async def _pinned_release(self, context: rpc.Context, request: Any) -> AsyncIterator[tuple[pb.Pin, Overlay]]:
        """The pinned release, compiled with the request's draft, while the block runs."""
        self._check_gateway(context)
        pin = answers.read_pin(context)
        structlog.contextvars.bind_contextvars(tenant=pin.tenant)
        await context.send_initial_metadata(())  # tells the gateway that the request has arrived
        pinned = await self._with_drafts([pin], [request])
        async with self._releases.use(pinned, context.time_remaining()) as overlays:
            yield pin, overlays[0]

    async def _with_drafts(self, pins: Sequence[pb.Pin], messages: Sequence[Any]) -> list[Pinned]:
        """Each pin with the draft of its message; without any, nothing is waited for."""
        if not any(pin.draft_digest for pin in pins):
            return list(map(Pinned, pins))
        drafts = await asyncio.to_thread(answers.read_drafts, pins, messages, self._tokenizer, self._shape)
        return list(map(Pinned, pins, drafts))

    def _check_gateway(self, context: rpc.Context) -> None:
        if not hmac.compare_digest((rpc.bearer(context) or "").encode(), self._service_key.encode()):
            # While the service's key is replaced, a gateway shall try another replica, and a client again.
            message = "replicas take calls from gateways only; call the gateway"
            raise Unavailable("NOT_A_GATEWAY", message, retry_after=1.0)
