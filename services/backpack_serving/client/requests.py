"""What a client asks for, as messages, and how often it asks again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving import rpc
from backpack_serving.errors import ServiceError, Unavailable

Prompt = str | Sequence[int]
"""A text, or the ids of its tokens."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to go on from a prompt.

    `temperature` 0 is greedy; `top_k` 0 is all tokens. The same `seed` gives the same text. `stop` are texts to
    end before. `log_probabilities` asks for those of every token, and of so many likeliest others (at most 20).
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    log_probabilities: int | None = None
    ignore_end_of_text: bool = False

    def message(self) -> pb.Sampling:
        return pb.Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stop,
            log_probabilities=self.log_probabilities,
            ignore_end_of_text=self.ignore_end_of_text,
        )


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, for how long, and how often: what all calls of a client have in common.

    `key` is an API key, a token, or what gives one when asked: tokens expire. Empty where a client certificate
    says who calls.
    """

    key: str | Callable[[], str] = ""
    timeout: float | None = 60.0
    attempts: int = 4

    def how(self, timeout: float | None) -> dict[str, Any]:
        key = self.key if isinstance(self.key, str) else self.key()
        return {"metadata": rpc.with_key(key), "timeout": self.timeout if timeout is None else timeout}

    def pause(self, error: ServiceError, attempt: int) -> float:
        """Seconds to wait before the attempt after this one, counted from 0. Raises the error if there is none."""
        if not isinstance(error, Unavailable) or attempt + 1 >= self.attempts:
            raise error
        return (error.retry_after or 0.0) + random.uniform(0, 0.1 * 2**attempt)


def prompt(given: Prompt) -> pb.Prompt:
    if isinstance(given, str):
        return pb.Prompt(text=given)
    return pb.Prompt(tokens=pb.TokenIds(ids=given))


def generate(given: Prompt, sampling: Sampling, channel: str, request_key: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=prompt(given), sampling=sampling.message(), channel=channel, request_key=request_key
    )


def stream(
    given: Prompt, sampling: Sampling, channel: str, request_key: str, coalesce: float | None
) -> pb.GenerateStreamRequest:
    request = pb.GenerateStreamRequest(
        prompt=prompt(given), sampling=sampling.message(), channel=channel, request_key=request_key
    )
    if coalesce is not None:
        request.coalesce.FromNanoseconds(int(coalesce * 1e9))
    return request


def score(given: Prompt, channel: str) -> pb.ScoreRequest:
    return pb.ScoreRequest(text=prompt(given), channel=channel)


def explain(given: Prompt, target: str | int | None, limit: int, channel: str) -> pb.ExplainRequest:
    request = pb.ExplainRequest(prompt=prompt(given), limit=limit, channel=channel)
    if target is not None:
        request.target.CopyFrom(word(target))
    return request


def senses(given: str | int, limit: int, channel: str) -> pb.ListSensesRequest:
    return pb.ListSensesRequest(word=word(given), limit=limit, channel=channel)


def word(given: str | int) -> pb.Word:
    """A word by its text, or a token by its id."""
    return pb.Word(text=given) if isinstance(given, str) else pb.Word(token=given)
