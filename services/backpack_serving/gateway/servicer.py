"""InferenceService for clients: authenticates, pins, forwards to a replica, and passes its answer on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import structlog
from backpack_lm.manifest import Manifest
from backpack_lm.patch import served_digest
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc as grpc_v1

from backpack_serving import rpc
from backpack_serving.auth.identity import Identities
from backpack_serving.auth.keys import Principal, Role
from backpack_serving.errors import (
    RELEASE_UNREACHABLE,
    TOPICS_NOT_READY,
    Expired,
    Internal,
    InvalidRequest,
    Unavailable,
)
from backpack_serving.gateway.canary_stats import CanaryStats
from backpack_serving.gateway.release_judge import JUDGED_TOKENS, ReleaseJudge
from backpack_serving.gateway.releases import ReleaseResolver
from backpack_serving.gateway.routing import Router, Target
from backpack_serving.gateway.usage import RequestUsage, UsageMeter
from backpack_serving.gateway.wire import write_load, write_pin
from backpack_serving.observability import tracing
from backpack_serving.references import LIVE, Pin, Position
from backpack_serving.wire import inference as wire
from backpack_serving.wire.compare import MOST_RELEASES, check_draft_count, read_choices, read_comparison
from backpack_serving.wire.drafts import read_draft
from backpack_serving.wire.references import read_position
from backpack_serving.wire.search import MOST_PROMPTS, read_search, read_search_page
from backpack_serving.wire.words import USE_TOKENS, read_map, read_use_count

log = structlog.get_logger(__name__)

LONG_TEXT = 4096
"""Characters that are encoded on the event loop, in about a millisecond. Longer texts are encoded in a thread: with
GPT-2's tokenizer a text may have 131,072 characters, which take 50 ms even if the text is refused afterwards.
"""

LONGEST = 86_400.0
"""Longest deadline of a call to a replica, in seconds. Go and Java allow 292 years, which overflows in gRPC's Python
and counts as already past.
"""

SEARCHED_TOKENS, LISTED_TOKENS, COMPARED_TOKENS = 32, 16, 256
"""What a page of a search costs beside the prompts that are read for it, a word's senses, and their neighbours: each
about as many tokens of a prompt as take that time."""

R = TypeVar(
    "R",
    pb.GenerateResponse,
    pb.ScoreResponse,
    pb.ExplainResponse,
    pb.CompareResponse,
    pb.ListSensesResponse,
    pb.JudgeResponse,
    pb.FindSensesResponse,
    pb.MapSenseResponse,
    pb.ListUsesResponse,
)


class GatewayServicer(grpc_v1.InferenceServiceServicer):
    """Serves one model. `service_key` authenticates the gateway to replicas."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        identities: Identities,
        releases: ReleaseResolver,
        meters: UsageMeter,
        router: Router,
        canary_stats: CanaryStats,
        judge: ReleaseJudge,
        service_key: str,
        log_prompts: bool,
    ) -> None:
        self._manifest, self._tokenizer = manifest, tokenizer
        self._shape = replace(manifest.shape, spell=tokenizer.piece)
        self._identities, self._releases, self._meters = identities, releases, meters
        self._router, self._canary_stats, self._service_key = router, canary_stats, service_key
        self._judge, self._log_prompts = judge, log_prompts

    async def Generate(self, request: pb.GenerateRequest, context: rpc.Context) -> pb.GenerateResponse:
        who = await self._authenticate(context)
        with self._meter(who) as meter:
            pin = await self._pin(who, request)
            await self._encode_long("prompt", request.prompt)
            params = self._read_params(request)
            meter.charge(len(params.prompt), params.new, params.read_again)
            self._log_prompt(request.prompt)
            response = await self._unary(lambda stub: stub.Generate, request, context, pin, meter, params.tokens)
            meter.generated = response.usage.generated_tokens
            return response

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: rpc.Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        who = await self._authenticate(context)
        with self._meter(who) as meter:
            pin = await self._pin(who, request)
            await self._encode_long("prompt", request.prompt)
            params = self._read_params(request)
            wire.read_coalesce(request)
            meter.charge(len(params.prompt), params.new, params.read_again)
            self._log_prompt(request.prompt)
            tried: list[Target] = []
            while True:
                with self._router.lease(params.tokens, tried) as target:
                    meter.sending(len(tried))
                    tried.append(target)
                    call = target.stub.GenerateStream(request, **self._call_options_for(context, pin))
                    try:
                        with self._canary_stats.request(pin), rpc.errors():
                            await call.initial_metadata()
                            meter.accepted()
                            async for response in call:
                                if not meter.generated or response.HasField("served"):  # in each sample's first message
                                    _check_release(response.served, pin)
                                meter.add(len(response.tokens))
                                yield response
                        return
                    except Unavailable as error:
                        again = self._may_retry(tried, error)
                        if meter.generated:
                            raise Unavailable(
                                "REPLICA_LOST",
                                "the replica that ran this stream is gone; start again",
                                retry_after=0.1,
                            ) from None
                        if not again:
                            raise _public_error(error) from None
                    finally:
                        call.cancel()

    async def Score(self, request: pb.ScoreRequest, context: rpc.Context) -> pb.ScoreResponse:
        who = await self._authenticate(context)
        with self._meter(who) as meter:
            pin = await self._pin(who, request)
            await self._encode_long("text", request.text)
            ids = wire.read_prompt("text", request.text, self._tokenizer, self._manifest.config)
            request.text.tokens.ids[:] = ids
            wire.read_alternatives(request)
            meter.charge(len(ids))
            self._log_prompt(request.text)
            return await self._unary(lambda stub: stub.Score, request, context, pin, meter, len(ids))

    async def Explain(self, request: pb.ExplainRequest, context: rpc.Context) -> pb.ExplainResponse:
        who = await self._authenticate(context)
        with self._meter(who) as meter:
            pin = await self._pin(who, request)
            await self._encode_long("prompt", request.prompt)
            ids = wire.read_prompt("prompt", request.prompt, self._tokenizer, self._manifest.config)
            request.prompt.tokens.ids[:] = ids
            meter.charge(len(ids))
            self._log_prompt(request.prompt)
            return await self._unary(lambda stub: stub.Explain, request, context, pin, meter, len(ids))

    async def Compare(self, request: pb.CompareRequest, context: rpc.Context) -> pb.CompareResponse:
        who = await self._authenticate(context)
        with self._meter(who) as meter:
            check_draft_count(request)
            named = enumerate(request.releases[:MOST_RELEASES])
            drafts = [await self._read_draft(who, f"releases[{at}].draft", choice) for at, choice in named]
            choices = read_choices(request, drafts)
            await self._encode_long("prompt", request.prompt)
            query = read_comparison(request, self._tokenizer, self._manifest.config)
            found = await self._releases.pin(meter.tenant, choices, request.request_key, _min_position(request))
            pins = [replace(pin, draft=draft) for pin, draft in zip(found, drafts, strict=True)]
            request.prompt.tokens.ids[:] = query.ids
            self._log_prompt(request.prompt)
            del request.pins[:]
            request.pins.extend(map(write_pin, pins))
            tokens = query.tokens(len(pins))
            meter.charge(tokens)

            def check(response: pb.CompareResponse) -> None:
                for compared, pin in zip(response.releases, pins, strict=True):
                    _check_release(compared.served, pin)

            return await self._send(
                lambda stub: stub.Compare, request, self._call_options_for(context), meter, tokens, check
            )

    async def ListSenses(self, request: pb.ListSensesRequest, context: rpc.Context) -> pb.ListSensesResponse:
        who = await self._authenticate(context)
        with self._meter(who) as meter:
            pin = await self._pin(who, request)
            tokens = LISTED_TOKENS + COMPARED_TOKENS * (request.neighbours > 0)
            meter.charge(0, work=tokens)
            return await self._unary(lambda stub: stub.ListSenses, request, context, pin, meter, tokens)

    async def Judge(self, request: pb.JudgeRequest, context: rpc.Context) -> pb.JudgeResponse:
        who = await self._authenticate(context)
        who.require(Role.AUTHOR)
        with self._meter(who) as meter:
            pin = await self._pin(who, request)
            meter.charge(0, work=JUDGED_TOKENS)
            claimed = self._judge.claim(pin)
            found: pb.JudgeResponse
            try:
                found = await self._unary(lambda stub: stub.Judge, request, context, pin, meter, JUDGED_TOKENS)
            except BaseException:
                if claimed:
                    self._judge.give_up(pin, again=True)
                raise
            if claimed:
                await self._judge.report(pin, found)
            return found

    async def FindSenses(self, request: pb.FindSensesRequest, context: rpc.Context) -> pb.FindSensesResponse:
        who = await self._authenticate(context)
        with self._meter(who) as meter:
            pin = await self._pin(who, request)
            read_search_page(request)
            for at, prompt in enumerate(request.prompts[:MOST_PROMPTS]):
                await self._encode_long(f"prompts[{at}]", prompt)
            query = read_search(request, self._tokenizer, self._manifest.config)
            for prompt, ids in zip(request.prompts, query.prompts, strict=True):
                prompt.tokens.ids[:] = ids
            tokens = SEARCHED_TOKENS + query.tokens
            meter.charge(query.tokens, work=SEARCHED_TOKENS)
            self._log_prompt(*request.prompts)
            return await self._unary(lambda stub: stub.FindSenses, request, context, pin, meter, tokens)

    async def MapSense(self, request: pb.MapSenseRequest, context: rpc.Context) -> pb.MapSenseResponse:
        who = await self._authenticate(context)
        with self._meter(who) as meter:
            pin = await self._pin(who, request)
            read_map(request, self._tokenizer, self._manifest.config)
            meter.charge(0, work=LISTED_TOKENS)
            return await self._unary(lambda stub: stub.MapSense, request, context, pin, meter, LISTED_TOKENS)

    async def ListUses(self, request: pb.ListUsesRequest, context: rpc.Context) -> pb.ListUsesResponse:
        who = await self._authenticate(context)
        who.require(Role.AUTHOR)
        with self._meter(who) as meter:
            pin = await self._pin(who, request)
            wire.read_word("word", request.word, self._tokenizer, self._manifest.config)
            tokens = USE_TOKENS * read_use_count(request)
            meter.charge(0, work=tokens)
            return await self._unary(lambda stub: stub.ListUses, request, context, pin, meter, tokens)

    async def Tokenize(self, request: pb.TokenizeRequest, context: rpc.Context) -> pb.TokenizeResponse:
        with self._meter(await self._authenticate(context)):
            return await asyncio.to_thread(wire.tokenize, request, self._tokenizer, self._manifest.config)

    async def GetModel(self, request: pb.GetModelRequest, context: rpc.Context) -> pb.GetModelResponse:
        with self._meter(await self._authenticate(context)):
            return wire.write_model(self._manifest)

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: rpc.Context) -> pb.ListReplicasResponse:
        (await self._identities.who(context)).require(Role.ADMIN)
        return pb.ListReplicasResponse(replicas=[write_load(*seen) for seen in self._router.targets()])

    async def _authenticate(self, context: rpc.Context) -> Principal:
        principal = await self._identities.who(context)
        principal.require(Role.CALLER)
        return principal

    def _read_params(self, request: wire.Generation) -> wire.GenerationParams:
        """Validate the request and write the result (token ids, seed, limits) into it. Raises InvalidRequest."""
        model = self._manifest
        params = wire.read_generation(request, self._tokenizer, model.config, model.defaults)
        wire.normalize_request(request, params)
        return params

    async def _encode_long(self, field: str, prompt: pb.Prompt) -> None:
        """Encode a long text in a thread, so that streams don't wait for it. Raises InvalidRequest."""
        if len(prompt.text) > LONG_TEXT:
            tokenizer, config = self._tokenizer, self._manifest.config
            prompt.tokens.ids[:] = await asyncio.to_thread(wire.read_prompt, field, prompt, tokenizer, config)

    def _log_prompt(self, *prompts: pb.Prompt) -> None:
        """Add the prompts to this call's log line, if LOG_PROMPTS is set and there are any."""
        if self._log_prompts and prompts:
            texts = (self._tokenizer.decode(list(prompt.tokens.ids)) for prompt in prompts)
            structlog.contextvars.bind_contextvars(prompt="\n".join(texts))

    def _meter(self, principal: Principal) -> AbstractContextManager[RequestUsage]:
        return self._meters.request(principal.tenant)

    async def _pin(self, who: Principal, request: Any) -> Pin:
        """Choose the release that the request keeps up to its last token: the one that it names, or its channel's;
        with its draft, if it has one.
        """
        draft = await self._read_draft(who, "draft", request)
        return replace(await self._choose_release(who.tenant, request), draft=draft)

    async def _choose_release(self, tenant: str, request: Any) -> Pin:
        since = _min_position(request)
        if request.HasField("release"):
            if request.release < 0:
                raise InvalidRequest.at("release", "OUT_OF_RANGE", f"{request.release}; 0 (unpatched) or more")
            channel = [request.channel] if request.channel else []  # which has to exist
            return (await self._releases.pin(tenant, [request.release, *channel], since=since))[0]
        return await self._releases.channel(tenant, request.channel or LIVE, request.request_key, since)

    async def _read_draft(self, who: Principal, field: str, message: Any) -> str:
        """The digest of a message's draft; "" without one. Raises Forbidden for who may not author; InvalidRequest."""
        if not message.HasField("draft"):
            return ""
        who.require(Role.AUTHOR)
        return (await asyncio.to_thread(read_draft, field, message.draft, self._tokenizer, self._shape)).digest

    def _call_options_for(self, context: rpc.Context, pin: Pin | None = None) -> dict[str, Any]:
        """Metadata and deadline of a call to a replica: our key, request id, trace, and the pin.

        A comparison has its pins in the request instead.
        """
        metadata = (*rpc.with_key(self._service_key), *rpc.with_request_id(), *tracing.headers())
        with_pin = ((wire.PIN, write_pin(pin).SerializeToString()),) if pin else ()
        remaining = context.time_remaining()
        return {"metadata": (*metadata, *with_pin), "timeout": None if remaining is None else min(remaining, LONGEST)}

    async def _unary(
        self,
        method: Callable[[Any], Callable[..., Any]],
        request: Any,
        context: rpc.Context,
        pin: Pin,
        meter: RequestUsage,
        tokens: int,
    ) -> R:
        """Make a unary call to a replica under one release, with a second attempt as `_send` does."""

        def check(response: Any) -> None:
            _check_release(response.served, pin)

        call_options, count = self._call_options_for(context, pin), partial(self._canary_stats.request, pin)
        return await self._send(method, request, call_options, meter, tokens, check, count)

    async def _send(
        self,
        method: Callable[[Any], Callable[..., Any]],
        request: Any,
        call_options: dict[str, Any],
        meter: RequestUsage,
        tokens: int,
        check: Callable[[R], None],
        count: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> R:
        """Call a replica, and a second one if the first is unavailable.

        The client has received nothing yet, and the seed is in the request, so both attempts give the same answer.
        """
        tried: list[Target] = []
        while True:
            with self._router.lease(tokens, tried) as target:
                meter.sending(len(tried))
                tried.append(target)
                call = method(target.stub)(request, **call_options)
                try:
                    with count():
                        with rpc.errors():
                            response: R = await call
                        check(response)
                    return response
                except (asyncio.CancelledError, Expired):
                    meter.abandoned()
                    raise
                except Unavailable as error:
                    if not self._may_retry(tried, error):
                        raise _public_error(error) from None
                finally:
                    call.cancel()

    def _may_retry(self, tried: list[Target], error: Unavailable) -> bool:
        """Whether to try another replica after the last one was unavailable."""
        log.warning("a replica is unavailable", address=tried[-1].replica.address, reason=error.message)
        if error.reason == RELEASE_UNREACHABLE:  # the replica lives; it only can't fetch this release
            return len(tried) == 1 and self._router.size > 1
        if error.reason == TOPICS_NOT_READY:  # the call has used its time up
            return False
        self._router.lost(tried[-1])
        return len(tried) == 1


def _public_error(error: Unavailable) -> Unavailable:
    """The error for the client. It hides the replica's address and the network's message."""
    if error.reason != "TRANSPORT":
        return error
    return Unavailable("NO_REPLICA", "the replicas that were asked are gone; try again shortly", retry_after=1.0)


def _min_position(request: Any) -> Position | None:
    """The minimum store position of a request, if it has one."""
    return read_position(request.min_revision) if request.HasField("min_revision") else None


def _check_release(served: pb.Served, pin: Pin) -> None:
    """Raise Internal unless the replica used the pinned release; it reports the digest from the slot itself."""
    if served.release_digest != (pinned := served_digest(pin.digest, pin.draft)):
        raise Internal("WRONG_RELEASE", f"pinned {pinned}, answered with {served.release_digest}")
