"""What is asked for about text, as messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from backpack_lm.generation import WHOLE
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.client.results import Token
from backpack_serving.errors import InvalidRequest
from backpack_serving.references import Position

R = TypeVar("R")

Prompt = str | Sequence[int]
"""A text, or the ids of its tokens."""

Word = str | int | Token
"""A word of one token, without the space before it; or a token's id; or a token of an answer."""

Release = int | str
"""A release: its number (0 is the model unpatched), or a channel, which means the release that it is at."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to go on from a prompt.

    `temperature` 0 is greedy; `top_k` 0 is all tokens. If neither of these nor `top_p` is given, the model's
    defaults hold (`client.model().defaults`); if one is, the others leave the whole vocabulary, at temperature 1.

    The same `seed` gives the same text. `stop` are texts to end before. `log_probabilities` asks for those of
    every token, and of so many likeliest others (at most 20). `samples` texts are made (at most 16), the prompt is
    read once; sample n is what `seed` + n gives alone.
    """

    max_tokens: int = 64
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    log_probabilities: int | None = None
    ignore_end_of_text: bool = False
    samples: int = 1

    def message(self) -> pb.Sampling:
        temperature = self.temperature
        if temperature is None and self.top_k is not None:
            temperature = WHOLE.temperature  # no message says of a top_k of 0 that it is given
        return pb.Sampling(
            max_tokens=self.max_tokens,
            temperature=temperature,
            top_k=self.top_k or 0,
            top_p=self.top_p,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else self.stop,
            log_probabilities=self.log_probabilities,
            ignore_end_of_text=self.ignore_end_of_text,
            samples=self.samples,
        )


@dataclass(frozen=True, slots=True)
class Pinning:
    """Which release a request gets: a channel's, under a canary by the key, not before a write is known.

    For a comparison, which names its releases, `channel` is None.
    """

    channel: str | None
    request_key: str
    since: Position | None

    def of(self, request: R) -> R:
        """The request, with what it is pinned by."""
        message: Any = request
        if self.channel is not None:
            message.channel = self.channel
        message.request_key = self.request_key
        if self.since is not None:
            message.min_revision.epoch, message.min_revision.revision = self.since.epoch, self.since.revision
        return request


@contextmanager
def fitting() -> Iterator[None]:
    """What no message can hold is refused as a server would refuse it."""
    try:
        yield
    except (ValueError, OverflowError) as error:  # protobuf's, of numbers beyond the range of their field
        raise InvalidRequest("OUT_OF_RANGE", f"no request can hold this: {error}") from None


@fitting()
def generate(
    given: Prompt, sampling: Sampling, priority: int, explain: int | None, pinned: Pinning
) -> pb.GenerateRequest:
    request = pb.GenerateRequest(prompt=prompt(given), sampling=sampling.message(), priority=priority)
    return pinned.of(_with_explanations(request, explain))


@fitting()
def stream(
    given: Prompt,
    sampling: Sampling,
    priority: int,
    explain: int | None,
    coalesce: float | None,
    pinned: Pinning,
) -> pb.GenerateStreamRequest:
    request = pb.GenerateStreamRequest(prompt=prompt(given), sampling=sampling.message(), priority=priority)
    if coalesce is not None:
        request.coalesce.FromNanoseconds(int(coalesce * 1e9))
    return pinned.of(_with_explanations(request, explain))


@fitting()
def score(given: Prompt, pinned: Pinning) -> pb.ScoreRequest:
    return pinned.of(pb.ScoreRequest(text=prompt(given)))


@fitting()
def explain(given: Prompt, target: Word | None, limit: int, pinned: Pinning) -> pb.ExplainRequest:
    request = pb.ExplainRequest(prompt=prompt(given), limit=limit)
    if target is not None:
        request.target.CopyFrom(word(target))
    return pinned.of(request)


@fitting()
def senses(given: Word, limit: int, neighbours: int, pinned: Pinning) -> pb.ListSensesRequest:
    return pinned.of(pb.ListSensesRequest(word=word(given), limit=limit, neighbours=neighbours))


@fitting()
def compare(
    given: Prompt, releases: Sequence[Release], top: int, targets: Sequence[Word], pinned: Pinning
) -> pb.CompareRequest:
    mode = pb.COMPARE_MODE_NEXT_TOKEN
    request = pb.CompareRequest(prompt=prompt(given), mode=mode, top=top, targets=map(word, targets))
    return _compare_request(request, releases, pinned)


@fitting()
def compare_scores(given: Prompt, releases: Sequence[Release], pinned: Pinning) -> pb.CompareRequest:
    request = pb.CompareRequest(prompt=prompt(given), mode=pb.COMPARE_MODE_SCORE)
    return _compare_request(request, releases, pinned)


@fitting()
def tokenize(text: str) -> pb.TokenizeRequest:
    return pb.TokenizeRequest(text=text)


def prompt(given: Prompt) -> pb.Prompt:
    if isinstance(given, str):
        return pb.Prompt(text=given)
    return pb.Prompt(tokens=pb.TokenIds(ids=given))


def word(given: Word) -> pb.Word:
    if isinstance(given, Token):
        return pb.Word(text=given.text, token=given.id)
    return pb.Word(text=given) if isinstance(given, str) else pb.Word(token=given)


def _with_explanations(request: R, limit: int | None) -> R:
    message: Any = request
    if limit is not None:
        message.explain.limit = limit
    return request


def _compare_request(request: pb.CompareRequest, releases: Sequence[Release], pinned: Pinning) -> pb.CompareRequest:
    for release in releases:
        if isinstance(release, str):
            request.releases.add(channel=release)
        else:
            request.releases.add(number=release)
    return pinned.of(request)
