"""Prompts to parts of texts, by calls of the gateway."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from backpack_lm.manifest import Manifest
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc

from backpack_serving import rpc, tasks
from backpack_serving.errors import Conflict, InvalidRequest, PreconditionFailed
from backpack_serving.http.caller import Metadata
from backpack_serving.http.openai.fields import Completion, Prompt, Sampled
from backpack_serving.wire.edit_json import parse_edit_json

AT_ONCE = 8
"""Prompts of one request that are sent to the gateway at once."""

T = TypeVar("T")


@dataclass(slots=True)
class ChoicePart:
    """What became known of one text. `choice` is its place among all of the request; `prompt` marks an echo.

    `served` is in the first part of each text, `finish` in its last, `usage` in the last of each prompt. `ranked` are
    the prompt's tokens with log-probabilities, if they are asked for.
    """

    choice: int
    text: str
    tokens: Sequence[pb.Token]
    prompt: bool = False
    finish: int = pb.FINISH_REASON_UNSPECIFIED
    served: pb.Served | None = None
    usage: pb.Usage = field(default_factory=pb.Usage)
    ranked: Sequence[pb.Token] = ()


Parts = AsyncGenerator[ChoicePart, None]


class Generator:
    """Generates for one request, as its caller."""

    def __init__(
        self, stub: inference_pb2_grpc.InferenceServiceStub, manifest: Manifest, tokenizer: Tokenizer, request: Sampled,
        metadata: Metadata,
    ) -> None:  # fmt: skip
        self._stub: Any = stub
        self._manifest, self._tokenizer, self._request, self._metadata = manifest, tokenizer, request, metadata
        # Under a canary, all calls of a request shall fall into the same half.
        self._key = request.request_key or request.user or secrets.token_hex(8)
        self._echo = isinstance(request, Completion) and bool(request.echo)

    def parts(self, prompts: Sequence[Prompt]) -> Parts:
        """The parts of all texts of all prompts, as they come. Raises ServiceError."""
        return _merge_prompts([self._of_prompt(number, prompt) for number, prompt in enumerate(prompts)], AT_ONCE)

    async def _of_prompt(self, number: int, prompt: Prompt) -> Parts:
        first, samples = number * self._request.samples, self._request.samples
        if not self._echo:
            async with aclosing(self._generated(first, prompt)) as parts:
                async for part in parts:
                    yield part
            return
        ids = await asyncio.to_thread(self._tokenizer.encode_prompt, prompt) if isinstance(prompt, str) else prompt
        unshown = len(self._tokenizer.bos_ids) if isinstance(prompt, str) else 0
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(ids)
        scored = await self._scored(ids)
        echoed = [ChoicePart(first + n, text, scored.tokens[unshown:], prompt=True) for n in range(samples)]
        if self._request.most_tokens() == 0:
            for part in echoed:
                part.served, part.finish = scored.served, pb.FINISH_REASON_LENGTH
            echoed[-1].usage.prompt_tokens = len(ids)
            for part in echoed:
                yield part
            return
        async with aclosing(self._generated(first, ids)) as parts:
            async for part in parts:
                if part.served:
                    if scored.HasField("served") and part.served.release_digest != scored.served.release_digest:
                        text = (
                            "the channel's release changed between the prompt's score and its continuation; try again"
                        )
                        raise Conflict("RELEASE_CHANGED", text, retry_after=0.1)
                    echo = echoed[part.choice - first]
                    echo.served, part.served = part.served, None
                    yield echo
                yield part

    async def _scored(self, ids: list[int]) -> pb.ScoreResponse:
        """The prompt's tokens, with log-probabilities if they are asked for."""
        wanted = self._request.alternatives()
        if self._request.most_tokens() and (wanted is None or len(ids) < 2):  # nothing stands before a single token
            tokens = [pb.Token(id=token) for token in ids]
            return pb.ScoreResponse(tokens=tokens)
        request = pb.ScoreRequest(text=_prompt(ids), alternatives=wanted or 0, **self._pinning())
        with rpc.errors():
            scored: pb.ScoreResponse = await self._stub.Score(request, metadata=self._metadata)
        self._check_model(scored.served)
        return scored

    async def _generated(self, first: int, prompt: Prompt) -> Parts:
        fields = {
            "prompt": _prompt(prompt),
            "sampling": self._sampling(prompt),
            "priority": self._request.priority or 0,
            "explain": pb.ExplainOptions(limit=self._request.explain) if self._request.explain else None,
            **self._pinning(),
        }
        if not self._request.stream:
            with rpc.errors():
                answer = await self._stub.Generate(pb.GenerateRequest(**fields), metadata=self._metadata)
            self._check_model(answer.served)
            for n, sample in enumerate((answer, *answer.more_samples)):
                part = ChoicePart(
                    first + n, sample.text, sample.tokens, finish=sample.finish_reason, served=answer.served
                )
                part.ranked = answer.prompt
                if n == len(answer.more_samples):
                    part.usage = answer.usage
                yield part
            return
        with rpc.errors():
            call = self._stub.GenerateStream(pb.GenerateStreamRequest(**fields), metadata=self._metadata)
            try:
                async for message in call:
                    part = ChoicePart(
                        first + message.sample, message.text, message.tokens, finish=message.finish_reason
                    )
                    part.usage = message.usage
                    if message.HasField("served"):
                        self._check_model(message.served)
                        part.served = message.served
                    yield part
            finally:
                call.cancel()

    def _pinning(self) -> dict[str, Any]:
        """What decides about the release."""
        position = self._request.position
        return {
            "channel": self._request.channel,
            "release": self._request.release,
            "request_key": self._key,
            "min_revision": pb.Position(**position) if position else None,
            "draft": None if self._request.draft is None else _read_draft_json(self._request.draft),
        }

    def _sampling(self, prompt: Prompt) -> pb.Sampling:
        request, most = self._request, self._request.most_tokens()
        if most is None:  # of a chat, which is token ids already
            most = max(1, self._manifest.config.n_positions - len(prompt))
        temperature = request.temperature
        if temperature is None and request.top_k is not None:
            temperature = 1.0  # no message says of a top_k of 0 that it is given
        return pb.Sampling(
            max_tokens=most,
            temperature=temperature,
            top_k=request.top_k or 0,
            top_p=request.top_p,
            seed=None if request.seed is None else request.seed % 2**64,
            stop=request.stop,
            log_probabilities=request.alternatives(),
            ignore_end_of_text=bool(request.ignore_end_of_text),
            samples=request.samples,
            logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            min_tokens=request.min_tokens or 0,
            bad_words=request.bad_words,
            prompt_log_probabilities=request.prompt_logprobs,
            **request.structure,
        )

    def _check_model(self, served: pb.Served) -> None:
        """Raise PreconditionFailed for an answer of another model: our tokenizer would write another text."""
        if served.model_fingerprint != self._manifest.fingerprint:
            text = (
                f"the gateway serves the model {served.model_fingerprint[:12]}, this server has the tokenizer of "
                f"{self._manifest.fingerprint[:12]}; restart it with the gateway's model"
            )
            raise PreconditionFailed("WRONG_MODEL", text)


def _read_draft_json(values: Sequence[dict[str, Any]]) -> pb.Draft:
    """The edits of a request. Raises InvalidRequest, naming the first that is none."""
    draft = pb.Draft()
    for at, value in enumerate(values):
        try:
            draft.edits.append(parse_edit_json(value))
        except ValueError as error:
            raise InvalidRequest.at(f"draft[{at}]", "INVALID", f"it is no edit: {error}") from None
    return draft


def _prompt(prompt: Prompt) -> pb.Prompt:
    return pb.Prompt(text=prompt) if isinstance(prompt, str) else pb.Prompt(tokens=pb.TokenIds(ids=prompt))


async def _merge_prompts(streams: Sequence[AsyncGenerator[T, None]], at_once: int) -> AsyncGenerator[T, None]:
    """What several streams yield, as it comes, of so many at once. One that raises ends all; so does leaving early."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield item
        return
    queue: asyncio.Queue[T] = asyncio.Queue(1)
    gate = asyncio.Semaphore(at_once)

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        async with gate, aclosing(stream):
            async for item in stream:
                await queue.put(item)

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    all_pumped = asyncio.gather(*pumps)
    try:
        async for item in _drain_queue(queue, all_pumped):
            yield item
    finally:
        await tasks.end(*pumps)
        if all_pumped.done() and not all_pumped.cancelled():
            all_pumped.exception()  # it was looked at: nobody is warned that it wasn't


async def _drain_queue(queue: asyncio.Queue[T], end: asyncio.Future[Any]) -> AsyncIterator[T]:
    """What is put into a queue until the future is done. Raises what it raises."""
    while True:
        getting = asyncio.ensure_future(queue.get())
        try:
            await asyncio.wait({getting, end}, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                end.result()
                if queue.empty():
                    return
                continue
            yield getting.result()
        finally:
            getting.cancel()
