"""The client for asyncio: the same calls as the blocking one's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any

from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc

from backpack_serving import rpc
from backpack_serving.client import requests, results
from backpack_serving.client.requests import Caller, Prompt, Sampling
from backpack_serving.errors import ServiceError
from backpack_serving.tls import Tls


class AsyncClient:
    """Calls the gateway at host:port (or `dns:///name:port`, over all of whose addresses calls are spread).

    `key` is an API key, a token, or a function that gives one. `timeout` is in seconds, for a whole call; None:
    none. `attempts` is how often generation is tried as long as nothing of it has come.
    Make it in the event loop that uses it.
    """

    def __init__(
        self,
        address: str,
        key: str | Callable[[], str] = "",
        *,
        tls: Tls | None = None,
        timeout: float | None = 60.0,
        attempts: int = 4,
    ) -> None:
        self._channel = rpc.channel(address, tls)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._caller = Caller(key, timeout, attempts)

    async def stream(
        self,
        prompt: Prompt,
        sampling: Sampling = Sampling(),  # frozen
        *,
        channel: str = "",
        request_key: str = "",
        coalesce: float | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[results.Part]:
        """Text after a prompt, as it is made. `coalesce` is for how many seconds tokens are gathered.

        Leaving the iterator early ends the generation.
        """
        request = requests.stream(prompt, sampling, channel, request_key, coalesce)
        for attempt in range(self._caller.attempts):
            call, begun = self._stub.GenerateStream(request, **self._caller.how(timeout)), False
            try:
                with rpc.errors():
                    async for message in call:
                        begun = True
                        yield results.Part.of(message)
                return
            except ServiceError as error:
                if begun:
                    raise
                await asyncio.sleep(self._caller.pause(error, attempt))
            finally:
                call.cancel()

    async def generate(
        self,
        prompt: Prompt,
        sampling: Sampling = Sampling(),
        *,
        channel: str = "",
        request_key: str = "",
        timeout: float | None = None,
    ) -> results.Generation:
        """Text after a prompt, in one piece."""
        request = requests.generate(prompt, sampling, channel, request_key)
        for attempt in range(self._caller.attempts):
            try:
                return results.Generation.of(await self._call(self._stub.Generate, request, timeout))
            except ServiceError as error:
                await asyncio.sleep(self._caller.pause(error, attempt))
        raise AssertionError("pause raises after the last attempt")

    async def score(self, text: Prompt, *, channel: str = "", timeout: float | None = None) -> results.Score:
        """How likely each token of a text is."""
        return results.Score.of(await self._call(self._stub.Score, requests.score(text, channel), timeout))

    async def explain(
        self,
        prompt: Prompt,
        target: str | int | None = None,
        limit: int = 20,
        *,
        channel: str = "",
        timeout: float | None = None,
    ) -> results.Explanation:
        """Why a word (or token) follows a prompt, the likeliest one if none is given: the largest terms."""
        request = requests.explain(prompt, target, limit, channel)
        return results.Explanation.of(await self._call(self._stub.Explain, request, timeout))

    async def senses(
        self, word: str | int, limit: int = 10, *, channel: str = "", timeout: float | None = None
    ) -> results.Senses:
        """What each sense of a word (or token) predicts."""
        request = requests.senses(word, limit, channel)
        return results.Senses.of(await self._call(self._stub.ListSenses, request, timeout))

    async def tokenize(self, text: str, *, timeout: float | None = None) -> tuple[results.Token, ...]:
        """The tokens of a text."""
        return results.tokens(
            (await self._call(self._stub.Tokenize, pb.TokenizeRequest(text=text), timeout)).tokens
        )

    async def model(self, *, timeout: float | None = None) -> results.Model:
        """The model that is served."""
        return results.Model.of(await self._call(self._stub.GetModel, pb.GetModelRequest(), timeout))

    async def close(self) -> None:
        await self._channel.close()

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        with rpc.errors():
            return await method(request, **self._caller.how(timeout))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
