"""InferenceService on a replica: the same class wherever it runs, in one process with everything or under Ray."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, MutableSequence, Sequence
from contextlib import aclosing

from backpack_lm.overlay import Overlay
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving import rpc
from backpack_serving.engine.engine import QueueFull, TooManyRows
from backpack_serving.engine.loop import EngineLoop, EngineStopped, NonFiniteLogits
from backpack_serving.engine.sequence import Finish, GenerationRequest, Output
from backpack_serving.errors import (
    Exhausted,
    Internal,
    PreconditionFailed,
    Unavailable,
)
from backpack_serving.inference import wire as answers
from backpack_serving.inference.detokenizer import IncrementalDetokenizer
from backpack_serving.inference.reading_servicer import ReadingMethods
from backpack_serving.inference.release_cache import ReleaseCache
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.observability import tracing
from backpack_serving.observability.metrics import ReplicaMetrics
from backpack_serving.wire import inference as wire

FINISH = {Finish.STOP: pb.FINISH_REASON_STOP, Finish.LENGTH: pb.FINISH_REASON_LENGTH}


class InferenceServicer(ReadingMethods):
    """Generates, and what its base does, under the release that the gateway pinned."""

    def __init__(
        self,
        served: ServedModel,
        engine: EngineLoop,
        versions: ReleaseCache,
        service_key: str,
        metrics: ReplicaMetrics,
    ) -> None:
        super().__init__(served, versions, service_key, metrics)
        self._engine = engine
        self._generated = metrics.tokens.labels("generated")

    async def Generate(self, request: pb.GenerateRequest, context: rpc.Context) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        samples: list[pb.GenerateResponse | pb.Sample] = [response]
        # A stop string is found when the text comes: until the end, the engine would make tokens for nothing.
        coalesce = wire.COALESCE if request.sampling.stop else math.inf
        async with aclosing(self._generate(request, context, coalesce)) as parts:
            async for part in parts:
                while part.sample >= len(samples):  # not as many as were asked for: nobody has checked that
                    samples.append(response.more_samples.add())
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
        async with self._pinned_release(context) as (pin, overlay):
            model = self._served.manifest
            order = wire.read_generation(request, self._served.tokenizer, model.config, model.defaults)
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
            except NonFiniteLogits as error:
                raise Internal("NON_FINITE", str(error)) from None
            except EngineStopped as error:
                raise Unavailable("ENGINE_STOPPED", str(error)) from None

    async def _sample(
        self, order: wire.GenerationParams, pin: pb.Pin, overlay: Overlay, coalesce: float, number: int
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """The parts of one sample, `served` in the first and `finish_reason` in the last."""
        sampling = order.sample(number)
        text, ids = IncrementalDetokenizer(self._served.tokenizer, sampling.stop), list(order.prompt)
        job = GenerationRequest(uuid.uuid4().hex, pin.tenant, order.prompt, sampling, overlay, order.priority)
        first, finish = True, None
        async with aclosing(self._engine.generate(job, coalesce)) as batches:
            async for outputs in batches:
                part = pb.GenerateStreamResponse(sample=number)
                self._generated.inc(len(outputs))
                for output in outputs:
                    if output.digest != pin.release_digest:
                        raise Internal("WRONG_RELEASE", f"computed with {output.digest}; nothing was sent")
                    part.tokens.append(self._token(output))
                    ids.append(output.token)
                    if not self._ends_text(output):
                        part.text += text.add([output.token])
                    if text.stopped or output.finish:
                        finish = Finish.STOP if text.stopped else output.finish
                        break
                if order.explain is not None:
                    await self._explain(pin.tenant, part.tokens, ids, overlay, order.explain)
                if first:
                    part.served.CopyFrom(answers.served(pin, outputs[0].digest, self._served.manifest))
                    first = False
                if finish:
                    part.text += text.flush()
                    part.finish_reason = FINISH[Finish.STOP if text.stopped else finish]
                yield part
                if finish:
                    return

    async def _explain(
        self, tenant: str, tokens: MutableSequence[pb.Token], ids: list[int], overlay: Overlay, limit: int
    ) -> None:
        """Add to the newest tokens of ids what made each likely. Tokens that come meanwhile are explained next."""
        found = await self._in_turn(tenant, self._served.explain_text, ids, overlay, len(ids) - len(tokens))
        for token, terms in zip(tokens, found, strict=True):
            listed, unlisted = terms.largest(limit)
            token.explanation.logit, token.explanation.unlisted = terms.logit, unlisted
            token.explanation.contributions.extend(self._contributions(listed, ids))

    def _ends_text(self, output: Output) -> bool:
        return output.token == self._served.manifest.config.eos_token_id and output.finish is Finish.STOP

    def _token(self, output: Output) -> pb.Token:
        logs = output.log_probability
        if logs is None:
            return wire.write_token(output.token, self._served.tokenizer)
        return wire.write_token(output.token, self._served.tokenizer, logs.chosen, logs.alternatives)


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
