"""The client for code without an event loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc

from backpack_serving import rpc
from backpack_serving.client import requests, results
from backpack_serving.client.requests import Caller, Pinning, Prompt, Release, Sampling, Word
from backpack_serving.errors import ServiceError
from backpack_serving.sync.known import Position
from backpack_serving.tls import Tls


class Client:
    """Calls the gateway at host:port (or `dns:///name:port`, over all of whose addresses calls are spread).

    `key` is an API key, a token, or a function that gives one. `timeout` is in seconds, for a whole call; None:
    none. `attempts` is how often generation is tried as long as nothing of it has come.
    Safe to use from many threads.
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
        self._channel = rpc.sync_channel(address, tls)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._caller = Caller(key, timeout, attempts)

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling = Sampling(),  # frozen
        *,
        explain: int | None = None,
        priority: int = 0,
        coalesce: float | None = None,
        channel: str = "",
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> Iterator[results.Part]:
        """Text after a prompt, as it is made; a part says which sample it is of.

        With `explain`, each token comes with that many contributions to its logit (1 to 64; 0: 8), and the stream
        waits for them. `coalesce` is for how many seconds tokens are gathered. Leaving the iterator early ends the
        generation, of all samples.
        """
        request = requests.stream(
            prompt, sampling, priority, explain, coalesce, Pinning(channel, request_key, since)
        )
        for attempt in range(self._caller.attempts):
            call, begun = self._stub.GenerateStream(request, **self._caller.how(timeout)), False
            try:
                with rpc.errors():
                    for message in call:
                        begun = True
                        yield results.Part.of(message)
                return
            except ServiceError as error:
                if begun:
                    raise
                time.sleep(self._caller.pause(error, attempt))
            finally:
                call.cancel()

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling = Sampling(),
        *,
        explain: int | None = None,
        priority: int = 0,
        channel: str = "",
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> results.Generation:
        """Text after a prompt, in one piece: as many samples as `sampling` says.

        With `explain`, each token comes with that many contributions to its logit (1 to 64; 0: 8; of all tokens
        together at most 40,000).
        """
        request = requests.generate(prompt, sampling, priority, explain, Pinning(channel, request_key, since))
        for attempt in range(self._caller.attempts):
            try:
                return results.Generation.of(self._call(self._stub.Generate, request, timeout))
            except ServiceError as error:
                time.sleep(self._caller.pause(error, attempt))
        raise AssertionError("pause raises after the last attempt")

    def score(
        self,
        text: Prompt,
        *,
        channel: str = "",
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> results.Score:
        """How likely each token of a text (of two or more) is."""
        request = requests.score(text, Pinning(channel, request_key, since))
        return results.Score.of(self._call(self._stub.Score, request, timeout))

    def explain(
        self,
        prompt: Prompt,
        target: Word | None = None,
        limit: int = 20,
        *,
        channel: str = "",
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> results.Explained:
        """Why a word follows a prompt, the likeliest token if none is given: the largest terms, 1 to 1000."""
        request = requests.explain(prompt, target, limit, Pinning(channel, request_key, since))
        return results.Explained.answer(self._call(self._stub.Explain, request, timeout))

    def compare(
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
        return results.Prediction.compared(self._call(self._stub.Compare, request, timeout))

    def compare_scores(
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
        return results.Score.compared(self._call(self._stub.Compare, request, timeout))

    def senses(
        self,
        word: Word,
        limit: int = 10,
        neighbours: int = 0,
        *,
        channel: str = "",
        request_key: str = "",
        since: Position | None = None,
        timeout: float | None = None,
    ) -> results.Senses:
        """What each sense of a word predicts: tokens at each end, and neighbours; at most 100 of each."""
        request = requests.senses(word, limit, neighbours, Pinning(channel, request_key, since))
        return results.Senses.of(self._call(self._stub.ListSenses, request, timeout))

    def tokenize(self, text: str, *, timeout: float | None = None) -> tuple[results.Token, ...]:
        """The tokens of a text."""
        answer = self._call(self._stub.Tokenize, requests.tokenize(text), timeout)
        return results.tokens(answer.tokens)

    def model(self, *, timeout: float | None = None) -> results.Model:
        """The model that is served."""
        return results.Model.of(self._call(self._stub.GetModel, pb.GetModelRequest(), timeout))

    def close(self) -> None:
        self._channel.close()

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        with rpc.errors():
            return method(request, **self._caller.how(timeout))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
