"""What requests may say. What OpenAI's API has and we can't do is refused by its name, unless its value means "off"."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from backpack_lm import strict_json
from backpack_lm.patch import Violation
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from backpack_serving.errors import InvalidRequest
from backpack_serving.http.openai.structure import ResponseFormat, StructuredOutputs, forms, violations
from backpack_serving.wire.inference import (
    HIGHEST_PRIORITY,
    LARGEST_STOP,
    MOST_ALTERNATIVES,
    MOST_BAD_WORDS,
    MOST_BIAS,
    MOST_BIASES,
    MOST_EXPLAINED,
    MOST_PENALTY,
    MOST_REPETITION_PENALTY,
    MOST_SAMPLES,
    MOST_STOPS,
)

MOST_PROMPTS = 64
"""Prompts of one request. Each is a call of its own, as limits count them."""

DEFAULT_TOKENS = 16
"""OpenAI's, of completions."""

_LARGEST = 2**31 - 1

_SHOWN = 60
"""Most characters of a value in an error."""

OFF: Mapping[str, Sequence[Any]] = {
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "metadata": (None, {}),
    "safety_identifier": (None,),
    "prompt_cache_key": (None,),
}
"""What neither kind of request can have, with the values that ask for nothing."""

OFF_IN_COMPLETIONS: Mapping[str, Sequence[Any]] = {**OFF, "best_of": (None, 1), "suffix": (None, "")}

OFF_IN_CHATS: Mapping[str, Sequence[Any]] = {
    **OFF,
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": (None, False, True),  # of no tools
    "functions": (None, []),
    "function_call": (None, "none"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
}

MODEL = re.compile(r"(?P<channel>[^@]+)(@(?P<release>[0-9]{1,18}))?")
_SINCE = re.compile(r"(?P<epoch>[0-9]{1,18})\.(?P<revision>[0-9]{1,18})")

Prompt = str | list[int]
R = TypeVar("R", bound="Sampled")


def _one_or_many(value: Any) -> list[Prompt]:
    """OpenAI's four forms of a prompt, as a list of texts or of token ids."""
    many: list[Any] = value if isinstance(value, list) and value and not _is_token_id(value[0]) else [value]
    if not all(isinstance(one, str) or (isinstance(one, list) and one and all(map(_is_token_id, one))) for one in many):
        raise ValueError("give a text, token ids, or a list of texts or of lists of token ids; none of them empty")
    if len(many) > MOST_PROMPTS:
        raise ValueError(f"{len(many)} prompts; at most {MOST_PROMPTS} in one request")
    return many


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def _several(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


_TOKENS: Any = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}}
_TEXT: Any = {"type": "string", "minLength": 1}
_STOP: Any = {"type": "string", "minLength": 1, "maxLength": LARGEST_STOP}

Prompts = Annotated[
    list[Prompt],
    BeforeValidator(_one_or_many),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "minItems": 1, "maxItems": MOST_PROMPTS, "items": _TEXT},
                _TOKENS,
                {"type": "array", "minItems": 1, "maxItems": MOST_PROMPTS, "items": _TOKENS},
            ]
        }
    ),
]

Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=LARGEST_STOP)]],
    Field(max_length=MOST_STOPS),
    BeforeValidator(_several),
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "maxItems": MOST_STOPS, "items": _STOP}, {"type": "null"}]}),
]


Biases = dict[
    Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]
]

BadWords = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=LARGEST_STOP)]],
    Field(max_length=MOST_BAD_WORDS),
    BeforeValidator(_several),
    WithJsonSchema({"type": "array", "maxItems": MOST_BAD_WORDS, "items": _STOP}),
]


_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = _STRICT

    include_usage: bool | None = Field(None, description="A last chunk says how many tokens there were.")
    include_obfuscation: Literal[False] | None = None


class Sampled(BaseModel, ABC):
    """What both kinds of requests have."""

    model_config = _STRICT

    model: str = Field(
        pattern="^[^@]+(@[0-9]{1,18})?$",
        description="A channel of yours; CHANNEL:canary, its canary alone; or CHANNEL@17: release 17, wherever it is.",
    )
    n: int | None = Field(None, ge=1, le=MOST_SAMPLES, description="Texts of each prompt, which is read once.")
    temperature: float | None = Field(
        None, ge=0, description="0 is greedy. Without it, top_p and top_k: the model's defaults."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed gives the same text.")
    stop: Stops = Field([], description="Texts to end before.")
    logit_bias: Biases | None = Field(
        None, max_length=MOST_BIASES, description="Added to the logits of tokens, by their ids."
    )
    frequency_penalty: float | None = Field(None, ge=-MOST_PENALTY, le=MOST_PENALTY)
    presence_penalty: float | None = Field(None, ge=-MOST_PENALTY, le=MOST_PENALTY)
    response_format: ResponseFormat | None = Field(None, description="The text is JSON, of a schema or any object.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Decides under a canary, as `request_key` does.")
    # vLLM's.
    top_k: int | None = Field(None, ge=0, le=_LARGEST, description="Only the k most likely tokens; 0 for all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Only tokens of this share of the likeliest one's.")
    repetition_penalty: float | None = Field(
        None, gt=0, le=MOST_REPETITION_PENALTY, description="Of tokens in the prompt or the text; 1 for none."
    )
    min_tokens: int | None = Field(None, ge=0, le=_LARGEST, description="No text ends by itself before them.")
    bad_words: BadWords = Field(
        [],
        description="Spellings that the text doesn't hold, with and without a space before them; other forms of a word "
        "(Horse, horses) are other spellings.",
    )
    structured_outputs: StructuredOutputs | None = Field(None, description="The text has a form.")
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="List so many likeliest tokens with each of the prompt's."
    )
    # Ours.
    explain: int | None = Field(
        None, ge=1, le=MOST_EXPLAINED, description="List so many contributions with each generated token."
    )
    priority: int | None = Field(
        None, ge=-HIGHEST_PRIORITY, le=HIGHEST_PRIORITY, description="Of your waiting requests, the highest run first."
    )
    since: str | None = Field(
        None,
        pattern=f"^{_SINCE.pattern.replace('?P<epoch>', '').replace('?P<revision>', '')}$",
        description="EPOCH.REVISION of a write that the gateway must have seen.",
    )
    request_key: str | None = Field(
        None, description="Which half of a canary: the same key always the same. Default: `user`, or drawn."
    )
    draft: list[dict[str, Any]] | None = Field(
        None,
        description="Edits to try over the release, as `backpack patch show` prints them; nothing is stored. The key "
        "needs the role `author`, too.",
    )
    ignore_end_of_text: bool | None = Field(None, description="Goes on past the end-of-text token.")

    @property
    def channel(self) -> str:
        return _matched(MODEL, self.model)["channel"]

    @property
    def release(self) -> int | None:
        number = _matched(MODEL, self.model)["release"]
        return None if number is None else int(number)

    @property
    def position(self) -> dict[str, int] | None:
        """Epoch and revision of `since`."""
        if self.since is None:
            return None
        return {name: int(text) for name, text in _matched(_SINCE, self.since).groupdict().items()}

    @property
    def structure(self) -> dict[str, str]:
        """The field of `Sampling` that says what the text has to be, if anything."""
        return dict(forms(self.response_format, self.structured_outputs).values())

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def usage_in_stream(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @abstractmethod
    def most_tokens(self) -> int | None:
        """How many tokens to make at most; None: as many as there is room for."""

    @abstractmethod
    def alternatives(self) -> int | None:
        """How many likeliest tokens to list with each; None: no log-probabilities."""


class Completion(Sampled):
    """A request for texts that go on from prompts."""

    prompt: Prompts
    max_tokens: int | None = Field(
        DEFAULT_TOKENS, ge=0, le=_LARGEST, description="0, with `echo`: only the prompt's log-probabilities."
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    echo: bool | None = Field(None, description="The answer begins with the prompt.")

    def most_tokens(self) -> int | None:
        return DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    def alternatives(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    """A part of a message."""

    model_config = _STRICT

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a chat. Which roles there may be, the model's template says."""

    model_config = _STRICT

    role: str
    content: str | list[TextPart]
    name: str | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(Sampled):
    """A request for the next message of a chat."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=_LARGEST)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=_LARGEST, description="Default: as many as the context has room for."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def read(kind: type[R], body: bytes) -> R:
    """The request in a body. Raises InvalidRequest, with all fields that are wrong."""
    try:
        values = strict_json.parse(body)
    except strict_json.JsonError as error:
        raise InvalidRequest("NOT_JSON", f"the body is no JSON that can be read: {error}") from None
    if not isinstance(values, dict):
        raise InvalidRequest("NOT_JSON", f"the body is {_shown(values)}; it must be a JSON object")
    off = OFF_IN_COMPLETIONS if kind is Completion else OFF_IN_CHATS
    unsupported = [
        name for name in values if name in off and not any(_means_off(values[name], each) for each in off[name])
    ]
    found = [
        Violation(name, "UNSUPPORTED", f"{_shown(values[name])}; this server can't do that, leave it out")
        for name in unsupported
    ]
    try:
        request = kind.model_validate({name: value for name, value in values.items() if name not in off})
    except ValidationError as error:
        found += _field_violations(error)
    else:
        found += _combinations(request)
    if found:
        raise InvalidRequest.of(*found)
    return request


def _combinations(request: Sampled) -> list[Violation]:
    """Fields that are good by themselves, and not together."""
    found = []
    if request.stream_options and not request.stream:
        found.append(Violation("stream_options", "NOT_IN_THIS_MODE", "for streams; set stream, or leave it out"))
    if request.prompt_logprobs is not None and request.stream:
        text = f"{request.prompt_logprobs}, but streams don't have it; leave one of the two out"
        found.append(Violation("prompt_logprobs", "NOT_IN_THIS_MODE", text))
    found += violations(request.response_format, request.structured_outputs)
    if isinstance(request, Completion) and request.max_tokens == 0 and not request.echo:
        found.append(Violation("max_tokens", "OUT_OF_RANGE", "0; at least 1, or 0 with echo"))
    if isinstance(request, Completion) and request.max_tokens == 0 and request.explain:
        found.append(Violation("explain", "NOT_IN_THIS_MODE", "max_tokens is 0, so no token is made; leave it out"))
    if isinstance(request, Completion) and request.max_tokens == 0 and request.prompt_logprobs is not None:
        text = "max_tokens is 0, so no token is made; `logprobs` lists the same of the echo"
        found.append(Violation("prompt_logprobs", "NOT_IN_THIS_MODE", text))
    if isinstance(request, Chat) and request.top_logprobs and not request.logprobs:
        text = f"{request.top_logprobs}, but logprobs isn't set; set it, or leave this out"
        found.append(Violation("top_logprobs", "NOT_IN_THIS_MODE", text))
    if isinstance(request, Chat) and request.max_tokens and request.max_completion_tokens:
        text = f"{request.max_completion_tokens}, and max_tokens is {request.max_tokens}; they mean the same, give one"
        found.append(Violation("max_completion_tokens", "AMBIGUOUS", text))
    return found


_REASONS = {"missing": "MISSING", "extra_forbidden": "UNKNOWN_FIELD"}

_WRITTEN = {
    "model": "write a channel, or CHANNEL@17 for release 17",
    "since": "write EPOCH.REVISION, as in 1.35",
    "logit_bias": "keys are token ids, as in 262, with no zero before them",
}
"""How the fields are written whose values have a pattern."""


def _field_violations(error: ValidationError) -> list[Violation]:
    """One for each field: of a value that may have several forms, what the last one says."""
    found: dict[str, Violation] = {}
    for each in error.errors(include_url=False):
        steps = [f"[{step}]" if _is_index(step) else f".{step}" for step in each["loc"] if not _is_form(step)]
        field = "".join(steps).removeprefix(".")
        reason = _REASONS.get(each["type"], "INVALID")
        text = each["msg"].removeprefix("Value error, ")
        if each["type"] == "string_pattern_mismatch":
            text = _WRITTEN[str(each["loc"][0])]
        if reason == "INVALID":
            text = f"{_shown(each['input'])}; {text[:1].lower()}{text[1:]}"
        elif reason == "UNKNOWN_FIELD":
            text = "there is no such field; leave it out"
        else:
            text = "it is missing; give it"
        found[field] = Violation(field, reason, text)
    return list(found.values())


def _is_form(step: int | str) -> bool:
    """Whether a step of pydantic's path is the form of a value, not a field's name."""
    return isinstance(step, str) and (step in ("str", "bool", "int") or not (step.isidentifier() or step.isdecimal()))


def _is_index(step: int | str) -> bool:
    """Whether it is a place in a list, or a token id."""
    return isinstance(step, int) or step.isdecimal()


def _means_off(value: Any, off: Any) -> bool:
    return value == off and isinstance(value, bool) == isinstance(off, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _matched(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.fullmatch(text)
    assert found, "the field's own pattern says the same"
    return found
