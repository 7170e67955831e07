"""InferenceService on a replica: the same class wherever it runs, in one process with everything or under Ray."""

from __future__ import annotations

import asyncio
import hmac
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import structlog
from backpack_lm.overlay import Overlay
from backpack_lm.patch import PatchError
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc as grpc_v1

from backpack_serving import rpc, tracing
from backpack_serving.engine.engine import QueueFull, TooManyRows
from backpack_serving.engine.loop import EngineLoop, EngineStopped
from backpack_serving.engine.sequence import Finish, Output, Request
from backpack_serving.errors import (
    Exhausted,
    Internal,
    InvalidRequest,
    PreconditionFailed,
    ServiceError,
    Unauthenticated,
    Unavailable,
)
from backpack_serving.inference.served import ServedModel
from backpack_serving.inference.text import TextStream
from backpack_serving.inference.versions import Versions
from backpack_serving.metrics import ReplicaMetrics
from backpack_serving.wire import inference as wire

log = structlog.get_logger(__name__)

FINISH = {Finish.STOP: pb.FINISH_REASON_STOP, Finish.LENGTH: pb.FINISH_REASON_LENGTH}


class InferenceServicer(grpc_v1.InferenceServiceServicer):
    """Generates and explains under the release that the gateway pinned."""

    def __init__(
        self,
        served: ServedModel,
        engine: EngineLoop,
        versions: Versions,
        service_key: str,
        metrics: ReplicaMetrics,
    ) -> None:
        self._served, self._engine, self._versions = served, engine, versions
        self._service_key, self._metrics = service_key, metrics
        self._reading = asyncio.Lock()  # one forward pass beside the engine at a time

    # ---- generation

    async def Generate(self, request: pb.GenerateRequest, context: rpc.Context) -> pb.GenerateResponse:
        response = pb.GenerateResponse(more_samples=[pb.Sample() for _ in range(request.sampling.samples - 1)])
        samples: list[pb.GenerateResponse | pb.Sample] = [response, *response.more_samples]
        async with aclosing(self._generate(request, context, coalesce=math.inf)) as parts:
            async for part in parts:
                sample = samples[part.sample]
                sample.text += part.text
                sample.tokens.extend(part.tokens)
                sample.finish_reason = part.finish_reason
                if part.HasField("served"):
                    response.served.CopyFrom(part.served)
                if part.HasField("usage"):
                    response.usage.CopyFrom(part.usage)
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
        """The parts of a generation: of each sample the first token at once, then those of `coalesce` seconds."""
        async with self._release(context) as (pin, overlay):
            order = wire.read_generation(request, self._served.tokenizer, self._served.manifest.config)
            self._metrics.prompts.inc()
            self._metrics.tokens.labels("prompt").inc(len(order.prompt))
            samples = [self._sample(order, pin, overlay, coalesce, number) for number in range(order.samples)]
            made, unfinished = 0, order.samples
            try:
                with tracing.span("engine", prompt_tokens=len(order.prompt), samples=order.samples):
                    async with aclosing(_merge(samples)) as parts:
                        async for part in parts:
                            if not made:
                                tracing.event("first token")
                            made += len(part.tokens)
                            unfinished -= part.finish_reason != pb.FINISH_REASON_UNSPECIFIED
                            if not unfinished:
                                part.usage.prompt_tokens, part.usage.generated_tokens = len(order.prompt), made
                            yield part
            except QueueFull as error:
                raise Exhausted("QUEUE_FULL", f"{error}; try again shortly", retry_after=1.0) from None
            except TooManyRows as error:
                raise PreconditionFailed("RELEASE_TOO_LARGE", str(error)) from None
            except EngineStopped as error:
                raise Unavailable("ENGINE_STOPPED", str(error)) from None

    async def _sample(
        self, order: wire.Order, pin: pb.Pin, overlay: Overlay, coalesce: float, number: int
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """The parts of one sample, `served` in the first and `finish_reason` in the last."""
        sampling = order.sample(number)
        text = TextStream(self._served.tokenizer, sampling.stop)
        job = Request(uuid.uuid4().hex, pin.tenant, order.prompt, sampling, overlay, order.priority)
        first, finish = True, None
        async with aclosing(_gather(self._engine.generate(job), coalesce)) as batches:
            async for outputs in batches:
                part = pb.GenerateStreamResponse(sample=number)
                self._metrics.tokens.labels("generated").inc(len(outputs))
                for output in outputs:
                    if output.digest != pin.release_digest:
                        raise Internal("WRONG_RELEASE", f"computed with {output.digest}; nothing was sent")
                    part.tokens.append(self._token(output))
                    if not self._ends_text(output):
                        part.text += text.add([output.token])
                    if text.stopped or output.finish:
                        finish = Finish.STOP if text.stopped else output.finish
                        break
                if first:
                    part.served.CopyFrom(wire.served(pin, outputs[0].digest, self._served.manifest))
                    first = False
                if finish:
                    part.text += text.flush()
                    part.finish_reason = FINISH[Finish.STOP if text.stopped else finish]
                yield part
                if finish:
                    return

    def _ends_text(self, output: Output) -> bool:
        return output.token == self._served.manifest.config.eos_token_id and output.finish is Finish.STOP

    def _token(self, output: Output) -> pb.Token:
        logs = output.log_probability
        if logs is not None and not math.isfinite(logs.chosen):
            raise Internal("NON_FINITE", "the release makes the model predict no numbers")
        if logs is None:
            return wire.write_token(output.token, self._served.tokenizer)
        return wire.write_token(output.token, self._served.tokenizer, logs.chosen, logs.alternatives)

    # ---- reading the model

    async def Score(self, request: pb.ScoreRequest, context: rpc.Context) -> pb.ScoreResponse:
        async with self._release(context) as (pin, overlay):
            tokenizer = self._served.tokenizer
            ids = wire.read_prompt("text", request.text, tokenizer, self._served.manifest.config)
            if len(ids) < 2:
                raise InvalidRequest.at("text", "TOO_SHORT", "one token; a score needs at least two")
            async with self._reading:
                logs = await asyncio.to_thread(self._served.score, ids, overlay)
            return pb.ScoreResponse(
                tokens=[wire.write_token(i, tokenizer, p) for i, p in zip(ids, [None, *logs], strict=True)],
                log_probability=math.fsum(logs),
                perplexity=math.exp(-math.fsum(logs) / len(logs)),
                served=wire.served(pin, overlay.digest, self._served.manifest),
            )

    async def Explain(self, request: pb.ExplainRequest, context: rpc.Context) -> pb.ExplainResponse:
        async with self._release(context) as (pin, overlay):
            tokenizer, config = self._served.tokenizer, self._served.manifest.config
            ids = wire.read_prompt("prompt", request.prompt, tokenizer, config)
            limit = wire.read_limit(request.limit, default=20, largest=1000)
            target = None
            if request.HasField("target"):
                target = wire.read_word("target", request.target, tokenizer, config)
            async with self._reading:
                found = await asyncio.to_thread(self._served.explain, ids, overlay, target)
            flat = found.contributions.flatten()
            order = flat.abs().argsort(descending=True)
            listed = order[:limit].tolist()
            return pb.ExplainResponse(
                target=wire.write_token(found.target, tokenizer, found.log_probability),
                logit=found.logit,
                contributions=[
                    pb.Contribution(
                        position=at // config.num_senses,
                        token=wire.write_token(ids[at // config.num_senses], tokenizer),
                        sense=at % config.num_senses,
                        weight=float(found.weights.flatten()[at]),
                        multiplier=float(found.multipliers.flatten()[at]),
                        contribution=float(flat[at]),
                    )
                    for at in listed
                ],
                unlisted=float(flat[order[limit:]].sum()),
                served=wire.served(pin, overlay.digest, self._served.manifest),
            )

    async def ListSenses(self, request: pb.ListSensesRequest, context: rpc.Context) -> pb.ListSensesResponse:
        async with self._release(context) as (pin, overlay):
            tokenizer, config = self._served.tokenizer, self._served.manifest.config
            token = wire.read_word("word", request.word, tokenizer, config)
            limit = min(wire.read_limit(request.limit, default=10, largest=100), config.tokens)
            near = min(wire.read_limit(request.neighbours, 0, 100, "neighbours"), config.tokens - 1)
            async with self._reading:
                found = await asyncio.to_thread(self._served.senses, token, overlay, limit, near)

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
                served=wire.served(pin, overlay.digest, self._served.manifest),
            )

    async def Tokenize(self, request: pb.TokenizeRequest, context: rpc.Context) -> pb.TokenizeResponse:
        tokenizer = self._served.tokenizer
        return pb.TokenizeResponse(tokens=[wire.write_token(i, tokenizer) for i in tokenizer.encode(request.text)])

    async def GetModel(self, request: pb.GetModelRequest, context: rpc.Context) -> pb.GetModelResponse:
        return wire.write_model(self._served.manifest)

    # ---- the release

    @asynccontextmanager
    async def _release(self, context: rpc.Context) -> AsyncIterator[tuple[pb.Pin, Overlay]]:
        """The pinned release, compiled. An error if it can't be had: never another release, never none."""
        if not hmac.compare_digest((rpc.bearer(context) or "").encode(), self._service_key.encode()):
            raise Unauthenticated("NOT_A_GATEWAY", "replicas take calls from gateways only; call the gateway")
        pin = wire.read_pin(context)
        structlog.contextvars.bind_contextvars(tenant=pin.tenant)
        await context.send_initial_metadata(())  # the gateway knows by this that the request is here
        async with AsyncExitStack() as stack:
            try:
                with self._metrics.release_seconds.time():
                    overlay = await stack.enter_async_context(self._versions.use(pin.tenant, pin.release_digest))
            except (ServiceError, PatchError) as error:
                log.warning("release refused", tenant=pin.tenant, digest=pin.release_digest, error=str(error))
                if isinstance(error, PatchError):
                    raise _unservable(error) from None
                raise
            yield pin, overlay


def _unservable(error: PatchError) -> ServiceError:
    """A release that was stored but can't be applied here is no mistake of the caller's request."""
    violation = error.violations[0]
    return PreconditionFailed(violation.reason, f"the release can't be served: {error}")


async def _merge(
    streams: Sequence[AsyncGenerator[pb.GenerateStreamResponse, None]],
) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
    """What several streams yield, as it comes. One that raises ends all; leaving early closes all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for part in stream:
                yield part
        return
    coming: dict[asyncio.Future[pb.GenerateStreamResponse], AsyncGenerator[pb.GenerateStreamResponse, None]]
    coming = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                stream = coming.pop(future)
                try:
                    part = future.result()
                except StopAsyncIteration:
                    continue
                coming[asyncio.ensure_future(anext(stream))] = stream
                yield part
    finally:
        for future in coming:
            future.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _gather(
    tokens: AsyncGenerator[list[Output], None], seconds: float
) -> AsyncGenerator[list[Output], None]:
    """The first batch at once, then whatever comes within `seconds` as one; the last one without waiting."""
    waiting: list[Output] = []
    first, due = True, math.inf
    following: asyncio.Future[list[Output]] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(tokens))
            timeout = None if due == math.inf else max(0.0, due - time.monotonic())
            done, _ = await asyncio.wait({following}, timeout=timeout)
            if done:
                try:
                    waiting += following.result()
                except StopAsyncIteration:
                    break
                finally:
                    following = None
            elif waiting:
                yield waiting
                waiting, due = [], math.inf
                continue
            if first or waiting[-1].finish or seconds == 0:
                yield waiting
                waiting, first, due = [], False, math.inf
            elif due == math.inf:
                due = time.monotonic() + seconds
        assert not waiting, "the last output says that it is the last"
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await tokens.aclose()
