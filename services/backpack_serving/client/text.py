"""Text: generation, and what a model makes of texts under releases."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import cached_property

from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1.inference_pb2_grpc import InferenceServiceStub

from backpack_serving.client import requests, results
from backpack_serving.client.channels import ReplicaLoad
from backpack_serving.client.connection import PAGE, Connected, new_id
from backpack_serving.client.requests import Edits, Effect, Order, Pinning, Prompt, Release, Sampling, Word
from backpack_serving.client.words import SenseMap, WordUses
from backpack_serving.errors import InvalidRequest, ServiceError
from backpack_serving.references import Position

MOST_FOUND = 10_000
"""Senses that one search lists."""


class AsyncClient(Connected):
    """Text from a gateway, for asyncio. Make it in the event loop that uses it."""

    @cached_property
    def _gateway(self) -> InferenceServiceStub:
        return InferenceServiceStub(self._transport.channel)

    async def stream(
        self,
        prompt: Prompt,
        sampling: Sampling = Sampling(),  # frozen
        *,
        explain: int | None = None,
        priority: int = 0,
        coalesce: float | None = None,
        channel: str = "",
        release: int | None = None,
        draft: Edits | None = None,
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[results.Part, None]:
        """Text after a prompt, as it is made; a part says which sample it is of.

        With `explain`, each token comes with that many contributions to its logit (1 to 64; 0: 8), and the stream
        waits for them. `coalesce` is for how many seconds tokens are gathered. Leaving the iterator early ends the
        generation, of all samples.
        """
        request = requests.stream(
            prompt, sampling, priority, explain, coalesce, Pinning(channel, request_key, since, release, draft)
        )
        attempts, begun = self._new_attempts(timeout), False
        while True:
            try:
                with self._asking():
                    call_options = self._call_options(attempts.until)
                    async with aclosing(
                        self._transport.stream(self._gateway.GenerateStream, request, **call_options)
                    ) as parts:
                        async for message in parts:
                            begun = True
                            yield results.Part.of(message)
                return
            except ServiceError as error:
                if begun:
                    raise
                await attempts.another(error)

    async def generate(
        self,
        prompt: Prompt,
        sampling: Sampling = Sampling(),
        *,
        explain: int | None = None,
        priority: int = 0,
        channel: str = "",
        release: int | None = None,
        draft: Edits | None = None,
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> results.Generation:
        """Text after a prompt, in one piece: as many samples as `sampling` says.

        With `explain`, each token comes with that many contributions to its logit (1 to 64; 0: 8; of all tokens
        together at most 40,000).
        """
        request = requests.generate(
            prompt, sampling, priority, explain, Pinning(channel, request_key, since, release, draft)
        )
        return results.Generation.of(await self._call(self._gateway.Generate, request, timeout))

    async def score(
        self,
        text: Prompt,
        *,
        channel: str = "",
        release: int | None = None,
        draft: Edits | None = None,
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> results.Score:
        """How likely each token of a text (of two or more) is."""
        request = requests.score(text, Pinning(channel, request_key, since, release, draft))
        return results.Score.of(await self._call(self._gateway.Score, request, timeout))

    async def explain(
        self,
        prompt: Prompt,
        target: Word | None = None,
        limit: int = 20,
        *,
        channel: str = "",
        release: int | None = None,
        draft: Edits | None = None,
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> results.Explained:
        """Why a word follows a prompt, the likeliest token if none is given: the largest terms, 1 to 1000."""
        request = requests.explain(prompt, target, limit, Pinning(channel, request_key, since, release, draft))
        return results.Explained.answer(await self._call(self._gateway.Explain, request, timeout))

    async def compare(
        self,
        prompt: Prompt,
        releases: Sequence[Release] = (0, "live"),
        *,
        top: int = 10,
        targets: Sequence[Word] = (),
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> tuple[results.Prediction, ...]:
        """The token after a prompt under 1 to 256 releases, in their order; the trunk runs once for all of them.

        `top` is how many of the likeliest tokens are given, 1 to 100; `targets` are up to 64 words to add.
        """
        pinned = Pinning(None, request_key, since)
        request = requests.compare(prompt, releases, top, targets, pinned)
        return results.Prediction.compared(await self._call(self._gateway.Compare, request, timeout))

    async def compare_scores(
        self,
        text: Prompt,
        releases: Sequence[Release] = (0, "live"),
        *,
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> tuple[results.Score, ...]:
        """How likely a text is under 1 to 256 releases, in their order; the trunk runs once for all of them."""
        request = requests.compare_scores(text, releases, Pinning(None, request_key, since))
        return results.Score.compared(await self._call(self._gateway.Compare, request, timeout))

    async def judge(
        self,
        limit: int = 10,
        *,
        channel: str = "",
        release: int | None = None,
        draft: Edits | None = None,
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> results.Judgement:
        """What a release does to text that it should leave alone; `limit` words that move most, 1 to 100.

        Needs the role author, too. Raises PreconditionFailed (NO_HELD_OUT_TEXT) if the model has no such text.
        """
        request = requests.judge(limit, Pinning(channel, request_key, since, release, draft))
        return results.Judgement.of(await self._call(self._gateway.Judge, request, timeout))

    async def senses(
        self,
        word: Word,
        limit: int = 10,
        neighbours: int = 0,
        *,
        channel: str = "",
        release: int | None = None,
        draft: Edits | None = None,
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> results.Senses:
        """What each sense of a word predicts: tokens at each end, and neighbours; at most 100 of each."""
        request = requests.senses(word, limit, neighbours, Pinning(channel, request_key, since, release, draft))
        return results.Senses.of(await self._call(self._gateway.ListSenses, request, timeout))

    async def find_senses(
        self,
        words: Word | Sequence[Word],
        against: Word | Sequence[Word] | None = None,
        *,
        effect: Effect = "raise",
        order: Order = "score",
        prompts: str | Sequence[Prompt] = (),
        limit: int = 20,
        channel: str = "",
        release: int | None = None,
        draft: Edits | None = None,
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> results.FoundSenses:
        """Which senses, of all words, raise or lower the logits of `words` most, less those of `against`: None is all
        words, because what raises every logit alike changes no probability; () is none.

        By score, or by what they add in up to 16 prompts; up to 64 words and a `limit` of 10,000 senses, which come
        page by page: `timeout` is for each. Raises Conflict, RELEASE_CHANGED, if the channel moved in between.
        """
        if not isinstance(limit, int) or not 1 <= limit <= MOST_FOUND:
            raise InvalidRequest.at("limit", "OUT_OF_RANGE", f"{limit!r}; 1 to {MOST_FOUND}")
        pinned = Pinning(channel, request_key or new_id(), since, release, draft)  # of a canary, one half for all pages
        request = requests.find_senses(words, against, effect, order, prompts, pinned)
        pages: list[pb.FindSensesResponse] = []
        while not pages or (request.page_token and limit):
            request.page_size = min(PAGE, limit)
            pages.append(await self._call(self._gateway.FindSenses, request, timeout))
            request.page_token, limit = pages[-1].next_page_token, limit - len(pages[-1].senses)
        return results.FoundSenses.of(pages)

    async def map_sense(
        self,
        sense: int,
        words: Sequence[Word],
        toward: Word | Sequence[Word] = (),
        against: Word | Sequence[Word] = (),
        limit: int = 8,
        *,
        channel: str = "",
        release: int | None = None,
        draft: Edits | None = None,
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> SenseMap:
        """Where one sense of 3 to 256 words lies: along the two directions of most variance; or, with words to lie
        `toward`, up to 64, by what it adds to their logits less those of `against`, () is all words. `limit` tokens, 1
        to 100, say what each end of an axis speaks for.
        """
        request = requests.map_sense(
            sense, words, toward, against, limit, Pinning(channel, request_key, since, release, draft)
        )
        return SenseMap.of(await self._call(self._gateway.MapSense, request, timeout))

    async def uses(
        self,
        word: Word,
        limit: int = 8,
        *,
        channel: str = "",
        release: int | None = None,
        draft: Edits | None = None,
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> WordUses:
        """Where a word is used in the model's held-out text, and what each of its senses said there; at most 32 uses.

        Needs the role author, too. Raises PreconditionFailed (NO_HELD_OUT_TEXT) if the model has no such text.
        """
        request = requests.uses(word, limit, Pinning(channel, request_key, since, release, draft))
        return WordUses.of(await self._call(self._gateway.ListUses, request, timeout))

    async def tokenize(self, text: str, *, timeout: float | None = None) -> tuple[results.Token, ...]:
        """The tokens of a text."""
        answer = await self._call(self._gateway.Tokenize, requests.tokenize(text), timeout)
        return results.tokens(answer.tokens)

    async def model(self, *, timeout: float | None = None) -> results.Model:
        """The model that is served."""
        return results.Model.of(await self._call(self._gateway.GetModel, pb.GetModelRequest(), timeout))

    async def replicas(self, *, timeout: float | None = None) -> tuple[ReplicaLoad, ...]:
        """The replicas that the gateway knows of, and how loaded they are. Needs the admin's key."""
        answer = await self._call(self._gateway.ListReplicas, pb.ListReplicasRequest(), timeout)
        return tuple(map(ReplicaLoad.of, answer.replicas))
