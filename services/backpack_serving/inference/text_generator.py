"""Generations as a client receives them: the engine's tokens with their text, stop strings and explanations."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, MutableSequence, Sequence
from contextlib import aclosing

from backpack_lm.overlay import Overlay
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.engine.engine import QueueFull, TooManyRows, TooManyTokens
from backpack_serving.engine.loop import EngineLoop, EngineStopped, NonFiniteLogits, NoTokenAllowed, ReplicaLost
from backpack_serving.engine.sequence import Finish, GenerationRequest, Grammar, Output
from backpack_serving.errors import Exhausted, Internal, InvalidRequest, PreconditionFailed, Unavailable
from backpack_serving.inference import wire as answers
from backpack_serving.inference.detokenizer import IncrementalDetokenizer
from backpack_serving.inference.grammars import GrammarCompiler
from backpack_serving.inference.model_reader import ModelReader
from backpack_serving.inference.served_model import Ranked, ServedModel
from backpack_serving.observability import tracing
from backpack_serving.observability.metrics import ReplicaMetrics
from backpack_serving.wire import inference as wire

FINISH = {Finish.STOP: pb.FINISH_REASON_STOP, Finish.LENGTH: pb.FINISH_REASON_LENGTH}

Parts = AsyncGenerator[pb.GenerateStreamResponse, None]


class TextGenerator:
    """Generates under the release that a request was pinned to."""

    def __init__(self, served: ServedModel, engine: EngineLoop, reader: ModelReader, metrics: ReplicaMetrics) -> None:
        self._served, self._engine, self._reader = served, engine, reader
        manifest = served.manifest
        self._grammars = GrammarCompiler(served.tokenizer, manifest.config.tokens, manifest.end_tokens)
        self._prompts = metrics.prompts
        self._read, self._generated = metrics.tokens.labels("prompt"), metrics.tokens.labels("generated")

    async def generate(self, params: wire.GenerationParams, pin: pb.Pin, overlay: Overlay, coalesce: float) -> Parts:
        """The parts of a generation: of each sample the first token at once, then those of `coalesce` seconds.

        Raises Exhausted if the queue is full, PreconditionFailed for a release or a request that is too large, Internal
        for a release that makes the model predict no finite numbers, InvalidRequest for a grammar that can't be
        compiled or that no token goes on in, Unavailable if the engine has stopped.
        """
        structure = params.sampling.structure
        grammar = await self._grammars.compiled(pin.tenant, structure) if structure else None
        self._prompts.inc()
        self._read.inc(len(params.prompt))
        prompt = await self._read_prompt(pin.tenant, params, overlay)
        samples = [self._sample(params, pin, overlay, coalesce, number, grammar) for number in range(params.samples)]
        generated, unfinished = 0, params.samples
        try:
            with tracing.span("engine", prompt_tokens=len(params.prompt), samples=params.samples):
                async with aclosing(_merge(samples)) as parts:
                    async for part in parts:
                        if not generated:
                            tracing.event("first token")
                            part.prompt.extend(prompt)
                        generated += len(part.tokens)
                        unfinished -= part.finish_reason != pb.FINISH_REASON_UNSPECIFIED
                        if not unfinished:
                            part.usage.prompt_tokens, part.usage.generated_tokens = len(params.prompt), generated
                        yield part
        except QueueFull as error:
            raise Exhausted("QUEUE_FULL", f"{error}; try again shortly", retry_after=1.0) from None
        except TooManyRows as error:
            raise PreconditionFailed("RELEASE_TOO_LARGE", str(error)) from None
        except TooManyTokens as error:
            raise PreconditionFailed("REQUEST_TOO_LARGE", str(error)) from None
        except NonFiniteLogits as error:
            raise Internal("NON_FINITE", str(error)) from None
        except NoTokenAllowed as error:
            assert structure, "nothing else leaves no token"
            raise InvalidRequest.at(f"sampling.{structure.form}", "NO_TOKEN", f"it leaves no token: {error}") from None
        except ReplicaLost as error:
            raise Unavailable("REPLICA_LOST", str(error), retry_after=1.0) from None
        except EngineStopped as error:
            raise Unavailable("ENGINE_STOPPED", str(error)) from None

    async def _read_prompt(self, tenant: str, params: wire.GenerationParams, overlay: Overlay) -> list[pb.Token]:
        """The prompt's tokens as a score has them, if their log-probabilities are asked for.

        They come of a pass of their own: of a prefix that is reused the engine computes no logits.
        """
        if params.alternatives is None:
            return []
        ids, top = params.prompt, min(params.alternatives, self._served.manifest.config.tokens)
        ranked = await self._reader.rank(tenant, ids, overlay, top) if len(ids) > 1 else Ranked([], [])
        return answers.write_ranked(ids, ranked, self._served.tokenizer)

    async def _sample(
        self,
        params: wire.GenerationParams,
        pin: pb.Pin,
        overlay: Overlay,
        coalesce: float,
        number: int,
        grammar: Grammar | None,
    ) -> Parts:
        """The parts of one sample, `served` in the first and `finish_reason` in the last."""
        sampling = params.sample(number)
        text, ids = IncrementalDetokenizer(self._served.tokenizer, sampling.stop), list(params.prompt)
        request = GenerationRequest(
            uuid.uuid4().hex, pin.tenant, params.prompt, sampling, overlay, params.priority, grammar
        )
        first, finish = True, None
        async with aclosing(self._engine.generate(request, coalesce)) as batches:
            async for outputs in batches:
                part = pb.GenerateStreamResponse(sample=number)
                self._generated.inc(len(outputs))
                for output in outputs:
                    if output.digest != overlay.digest:
                        raise Internal("WRONG_RELEASE", f"computed with {output.digest}; nothing was sent")
                    part.tokens.append(self._write_token(output))
                    ids.append(output.token)
                    if not self._ends_text(output):
                        part.text += text.add([output.token])
                    if text.stopped or output.finish:
                        finish = Finish.STOP if text.stopped else output.finish
                        break
                if params.explain is not None:
                    await self._explain(pin.tenant, part.tokens, ids, overlay, params.explain)
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
        """Explain `tokens`, the newest of `ids`. Tokens that come meanwhile are explained in the next part."""
        found = await self._reader.explain_text(tenant, ids, overlay, len(ids) - len(tokens))
        for token, terms in zip(tokens, found, strict=True):
            listed, unlisted = terms.largest(limit)
            token.explanation.logit, token.explanation.unlisted = terms.logit, unlisted
            token.explanation.bias = terms.bias
            token.explanation.contributions.extend(answers.write_contributions(listed, ids, self._served.tokenizer))

    def _ends_text(self, output: Output) -> bool:
        return output.token in self._served.manifest.end_tokens and output.finish is Finish.STOP

    def _write_token(self, output: Output) -> pb.Token:
        logs = output.log_probability
        if logs is None:
            return wire.write_token(output.token, self._served.tokenizer)
        return wire.write_token(output.token, self._served.tokenizer, logs.chosen, logs.alternatives)


async def _merge(streams: Sequence[Parts]) -> Parts:
    """What several streams yield, as it comes. One that raises ends all; leaving early closes all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for part in stream:
                yield part
        return
    pending = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                stream = pending.pop(future)
                try:
                    part = future.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(stream))] = stream
                yield part
    finally:
        for future in pending:
            future.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
