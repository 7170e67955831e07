"""Requests about text, as messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from backpack_lm.generation import UNTRUNCATED
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.client.arguments import build, fill, invalid_argument, within
from backpack_serving.client.results import Token
from backpack_serving.errors import InvalidRequest
from backpack_serving.references import Position

R = TypeVar("R")

Prompt = str | Sequence[int]
"""A text, or the ids of its tokens."""

Word = str | int | Token
"""A word of one token, without the space before it; or a token's id; or a token of an answer."""


@runtime_checkable
class AnEdit(Protocol):
    """One of the edits of this package."""

    def message(self) -> pb.Edit: ...


Edits = Sequence[AnEdit | pb.Edit]
"""Edits, or messages of the API, which apply in this order."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Edits to compare with releases without storing them, over a release: its number, or the channel that is at it."""

    edits: Edits
    release: int | str = "live"


Release = int | str | Draft
"""A release: its number (0 is the model unpatched), or a channel, which means the release that it is at; or a draft
over one.
"""

Effect = Literal["raise", "lower", "both"]
"""What senses are found: those that raise the words' logits, those that lower them, or both, by magnitude."""

Order = Literal["score", "use"]
"""Of senses that are found: by score, or by score times how often the word is used."""

_EFFECTS = {"raise": pb.SENSE_EFFECT_RAISE, "lower": pb.SENSE_EFFECT_LOWER, "both": pb.SENSE_EFFECT_BOTH}
_ORDERS = {"score": pb.SENSE_ORDER_SCORE, "use": pb.SENSE_ORDER_USE}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to go on from a prompt.

    `temperature` 0 is greedy; `top_k` 0 is all tokens. If neither of these nor `top_p`, `min_p` or
    `repetition_penalty` is given, the model's defaults hold (`client.model().defaults`); if one is, the others leave
    the whole vocabulary, at temperature 1, without a penalty.

    The same `seed` gives the same text. `stop` are texts to end before. `log_probabilities` asks for those of
    every token, and of so many likeliest others (at most 20); `prompt_log_probabilities` for those of the prompt's
    tokens, as `score` has them. `samples` texts are made (at most 16), the prompt is read once; sample n is what
    `seed` + n gives alone.

    As in vLLM: `logit_bias` by token id (−100 to 100), `min_p`, the penalties (1 is no `repetition_penalty`, 0 none
    of the others), `min_tokens` before which no text ends by itself, and `bad_words`, spellings that it doesn't hold,
    with and without a space before them.

    The whole text is what one of these says, and ends where nothing may follow: `json_schema`, a JSON Schema as a dict
    or as JSON; `regex`, which all of it matches, without look-around and back-references; `grammar`, in Lark's syntax
    or GBNF. `max_tokens` may still cut it off.
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
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_tokens: int = 0
    bad_words: Sequence[str] = ()
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    prompt_log_probabilities: int | None = None

    def message(self) -> pb.Sampling:
        temperature = self.temperature
        if temperature is None and self.top_k is not None:
            temperature = UNTRUNCATED.temperature  # no message says of a top_k of 0 that it is given
        structure = {"json_schema": _json_text(self.json_schema), "regex": self.regex, "grammar": self.grammar}
        given = {name: text for name, text in structure.items() if text is not None}
        if len(given) > 1:  # a message holds one, the last
            text = f"given together with {next(iter(given))}; a text can have one, leave the other out"
            raise InvalidRequest.at(f"sampling.{[*given][1]}", "AMBIGUOUS", text)
        return build(
            pb.Sampling,
            "sampling",
            **given,
            max_tokens=self.max_tokens,
            temperature=temperature,
            top_k=self.top_k or 0,
            top_p=self.top_p,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else self.stop,
            log_probabilities=self.log_probabilities,
            ignore_end_of_text=self.ignore_end_of_text,
            samples=self.samples,
            logit_bias=self.logit_bias,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            min_tokens=self.min_tokens,
            bad_words=self.bad_words,
            prompt_log_probabilities=self.prompt_log_probabilities,
        )


def _json_text(schema: str | Mapping[str, Any] | None) -> str | None:
    if schema is None or isinstance(schema, str):
        return schema
    try:
        return json.dumps(dict(schema))
    except (TypeError, ValueError) as error:
        raise InvalidRequest.at("sampling.json_schema", "NOT_JSON", f"it can't be written as JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class Pinning:
    """Which release a request gets: a channel's, under a canary by the key, not before a write is known; or that with
    the number `release`. The edits of `draft` apply after its own.

    For a comparison, which names its releases, `channel` is None.
    """

    channel: str | None
    request_key: str
    since: Position | None
    release: int | None = None
    draft: Edits | None = None

    def of(self, request: R) -> R:
        """The request, with what it is pinned by."""
        message: Any = request
        if self.channel is not None:
            fill(message, channel=self.channel)
        fill(message, request_key=self.request_key)
        if self.release is not None:
            fill(message, release=self.release)
        if self.draft is not None:
            message.draft.CopyFrom(_draft_message(self.draft, "draft"))
        if self.since is not None:
            if min(self.since.epoch, self.since.revision) < 0:
                raise InvalidRequest.at("since", "OUT_OF_RANGE", f"{self.since}; positions count from 0")
            fill(message.min_revision, "since", epoch=self.since.epoch, revision=self.since.revision)
            message.min_revision.SetInParent()
        return request


def generate(
    given: Prompt, sampling: Sampling, priority: int, explain: int | None, pinned: Pinning
) -> pb.GenerateRequest:
    request = build(pb.GenerateRequest, priority=priority)
    request.prompt.CopyFrom(prompt(given))
    request.sampling.CopyFrom(sampling.message())
    return pinned.of(_with_explanations(request, explain))


def stream(
    given: Prompt,
    sampling: Sampling,
    priority: int,
    explain: int | None,
    coalesce: float | None,
    pinned: Pinning,
) -> pb.GenerateStreamRequest:
    request = build(pb.GenerateStreamRequest, priority=priority)
    request.prompt.CopyFrom(prompt(given))
    request.sampling.CopyFrom(sampling.message())
    if coalesce is not None:
        request.coalesce.FromNanoseconds(int(coalesce * 1e9))
    return pinned.of(_with_explanations(request, explain))


def score(given: Prompt, pinned: Pinning) -> pb.ScoreRequest:
    return pinned.of(pb.ScoreRequest(text=prompt(given, "text")))


def explain(given: Prompt, target: Word | None, limit: int, pinned: Pinning) -> pb.ExplainRequest:
    request = build(pb.ExplainRequest, limit=limit)
    request.prompt.CopyFrom(prompt(given))
    if target is not None:
        request.target.CopyFrom(word(target, "target"))
    return pinned.of(request)


def senses(given: Word, limit: int, neighbours: int, pinned: Pinning) -> pb.ListSensesRequest:
    request = build(pb.ListSensesRequest, limit=limit, neighbours=neighbours)
    request.word.CopyFrom(word(given))
    return pinned.of(request)


def map_sense(
    sense: int,
    words: Sequence[Word],
    toward: Word | Sequence[Word],
    against: Word | Sequence[Word],
    limit: int,
    pinned: Pinning,
) -> pb.MapSenseRequest:
    request = build(pb.MapSenseRequest, sense=sense, limit=limit)
    for name, given in (("words", words), ("toward", toward), ("against", against)):
        getattr(request, name).extend(_several_words(given, name))
    return pinned.of(request)


def uses(given: Word, limit: int, pinned: Pinning) -> pb.ListUsesRequest:
    request = build(pb.ListUsesRequest, limit=limit)
    request.word.CopyFrom(word(given))
    return pinned.of(request)


def judge(limit: int, pinned: Pinning) -> pb.JudgeRequest:
    return pinned.of(build(pb.JudgeRequest, limit=limit))


def find_senses(
    words: Word | Sequence[Word],
    against: Word | Sequence[Word] | None,
    effect: Effect,
    order: Order,
    prompts: str | Sequence[Prompt],
    pinned: Pinning,
) -> pb.FindSensesRequest:
    request = pb.FindSensesRequest(against_all=against is None)
    for name, value, known in (("effect", effect, _EFFECTS), ("order", order, _ORDERS)):
        if value not in known:
            raise InvalidRequest.at(name, "UNKNOWN_VALUE", f"{value!r}; write {' or '.join(known)}")
        setattr(request, name, known[value])
    for name, given in (("words", words), ("against", () if against is None else against)):
        getattr(request, name).extend(_several_words(given, name))
    texts = [prompts] if isinstance(prompts, str) else prompts
    request.prompts.extend(prompt(each, f"prompts[{at}]") for at, each in enumerate(texts))
    return pinned.of(request)


def _several_words(given: Word | Sequence[Word], called: str) -> list[pb.Word]:
    """One word, or several."""
    several = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return [word(each, f"{called}[{at}]") for at, each in enumerate(several)]


def compare(
    given: Prompt, releases: Sequence[Release], top: int, targets: Sequence[Word], pinned: Pinning
) -> pb.CompareRequest:
    request = build(pb.CompareRequest, mode=pb.COMPARE_MODE_NEXT_TOKEN, top=top)
    request.prompt.CopyFrom(prompt(given))
    request.targets.extend(word(each, f"targets[{at}]") for at, each in enumerate(targets))
    return _compare_request(request, releases, pinned)


def compare_scores(given: Prompt, releases: Sequence[Release], pinned: Pinning) -> pb.CompareRequest:
    request = pb.CompareRequest(prompt=prompt(given, "text"), mode=pb.COMPARE_MODE_SCORE)
    return _compare_request(request, releases, pinned)


def tokenize(text: str) -> pb.TokenizeRequest:
    return build(pb.TokenizeRequest, text=text)


def prompt(given: Prompt, called: str = "prompt") -> pb.Prompt:
    if isinstance(given, str):
        return build(pb.Prompt, called, text=given)
    return pb.Prompt(tokens=build(pb.TokenIds, called, ids=given))


def word(given: Word, called: str = "word") -> pb.Word:
    if isinstance(given, Token):
        return build(pb.Word, called, text=given.text, token=given.id)
    return build(pb.Word, called, text=given) if isinstance(given, str) else build(pb.Word, called, token=given)


def _with_explanations(request: R, limit: int | None) -> R:
    message: Any = request
    if limit is not None:
        fill(message.explain, "explain", limit=limit)
        message.explain.SetInParent()
    return request


def _compare_request(request: pb.CompareRequest, releases: Sequence[Release], pinned: Pinning) -> pb.CompareRequest:
    for at, release in enumerate(releases):
        choice, called = request.releases.add(), f"releases[{at}]"
        if isinstance(release, Draft):
            choice.draft.CopyFrom(_draft_message(release.edits, f"{called}.draft"))
            release = release.release
        if isinstance(release, str):
            fill(choice, called, channel=release)
        else:
            fill(choice, called, number=release)
    return pinned.of(request)


def edit_messages(edits: Edits) -> list[pb.Edit]:
    """Raises InvalidRequest, with the place, for what is no edit or can't be sent."""
    if not isinstance(edits, Sequence):
        raise invalid_argument("edits", edits, "write a list of edits, such as [Scale('nurse', 0)]")
    found = []
    for at, edit in enumerate(edits):
        if not isinstance(edit, AnEdit):
            if not isinstance(edit, pb.Edit):
                raise invalid_argument(f"edits[{at}]", edit, "write an edit, such as Scale('nurse', 0)")
            found.append(edit)
            continue
        with within(f"edits[{at}]"):
            found.append(edit.message())
    return found


def _draft_message(edits: Edits, called: str) -> pb.Draft:
    with within(called):
        return pb.Draft(edits=edit_messages(edits))
