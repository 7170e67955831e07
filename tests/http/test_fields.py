"""What requests may say: what can't be done is refused by its name, never ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from backpack_serving.errors import InvalidRequest
from backpack_serving.http.openai.fields import (
    MOST_PROMPTS,
    OFF_IN_CHATS,
    OFF_IN_COMPLETIONS,
    Chat,
    Completion,
    Sampled,
    read,
)

COMPLETION = {"model": "live", "prompt": "a"}
CHAT = {"model": "live", "messages": [{"role": "user", "content": "a"}]}


def refusals(kind: type[Sampled], values: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidRequest) as refused:
        read(kind, json.dumps(values).encode())
    return [(violation.field, violation.reason) for violation in refused.value.violations]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 3),
        ("suffix", "end"),
        ("store", True),
        ("service_tier", "flex"),
        ("metadata", {"a": "b"}),
    ],
)
def test_what_a_completion_cant_have_is_refused_by_name(name: str, value: Any) -> None:
    assert refusals(Completion, {**COMPLETION, name: value}) == [(name, "UNSUPPORTED")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("modalities", ["text", "audio"]),
        ("audio", {}),
        ("prediction", {}),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
    ],
)
def test_what_a_chat_cant_have_is_refused_by_name(name: str, value: Any) -> None:
    assert refusals(Chat, {**CHAT, name: value}) == [(name, "UNSUPPORTED")]


def test_values_that_mean_off_are_accepted() -> None:
    for kind, base, off in ((Completion, COMPLETION, OFF_IN_COMPLETIONS), (Chat, CHAT, OFF_IN_CHATS)):
        for name, values in off.items():
            for value in values:
                read(kind, json.dumps({**base, name: value}).encode())


@pytest.mark.parametrize("kind", [(Completion, COMPLETION), (Chat, CHAT)], ids=["completion", "chat"])
@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({}, {}),
        ({"response_format": None}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"json_schema": '{"type": "object"}'}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"x": 1}, "strict": True},
                }
            },
            {"json_schema": '{"x": 1}'},
        ),
        ({"structured_outputs": {"json": {"x": 1}}}, {"json_schema": '{"x": 1}'}),
        ({"structured_outputs": {"json": '{"x":1}'}}, {"json_schema": '{"x":1}'}),
        ({"structured_outputs": {"json_object": True}}, {"json_schema": '{"type": "object"}'}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
    ],
    ids=str,
)
def test_what_a_text_has_to_be(kind: Any, asked: Any, meant: Any) -> None:
    assert read(kind[0], json.dumps({**kind[1], **asked}).encode()).structure == meant


@pytest.mark.parametrize(
    ("asked", "field", "reason"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "INVALID"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "MISSING"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "MISSING",
        ),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}},
            "response_format.json_schema",
            "NOT_IN_THIS_MODE",
        ),
        ({"response_format": "json"}, "response_format", "INVALID"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice", "UNKNOWN_FIELD"),
        ({"guided_json": {}}, "guided_json", "UNKNOWN_FIELD"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs.grammar", "AMBIGUOUS"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
            "AMBIGUOUS",
        ),
    ],
    ids=str,
)
def test_what_no_text_can_be_is_refused(asked: Any, field: str, reason: str) -> None:
    assert refusals(Completion, {**COMPLETION, **asked}) == [(field, reason)]


def test_images_and_tools_in_messages_are_refused() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    assert refusals(Chat, {**CHAT, "messages": [{"role": "user", "content": [image]}]})
    assert ("messages[0].tool_calls", "UNKNOWN_FIELD") in refusals(
        Chat, {**CHAT, "messages": [{"role": "assistant", "content": "a", "tool_calls": []}]}
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert (
        read(Chat, json.dumps({**CHAT, "messages": [{"role": "user", "content": parts}]}).encode()).messages[0].text()
        == "ab"
    )


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"nonsense": 1}, [("nonsense", "UNKNOWN_FIELD")]),
        ({"model": None}, [("model", "INVALID")]),
        ({"model": "a@b"}, [("model", "INVALID")]),
        ({"model": "live@1.5"}, [("model", "INVALID")]),
        ({"prompt": ""}, []),
        ({"prompt": []}, [("prompt", "INVALID")]),
        ({"prompt": [[]]}, [("prompt", "INVALID")]),
        ({"prompt": [1, "a"]}, [("prompt", "INVALID")]),
        ({"prompt": ["a", 1]}, [("prompt", "INVALID")]),
        ({"prompt": [True]}, [("prompt", "INVALID")]),
        ({"prompt": [-1]}, [("prompt", "INVALID")]),
        ({"prompt": [2**32]}, [("prompt", "INVALID")]),
        ({"prompt": ["a"] * (MOST_PROMPTS + 1)}, [("prompt", "INVALID")]),
        ({"n": 0}, [("n", "INVALID")]),
        ({"n": 17, "top_p": 0}, [("n", "INVALID"), ("top_p", "INVALID")]),
        ({"n": True}, [("n", "INVALID")]),
        ({"max_tokens": "8"}, [("max_tokens", "INVALID")]),
        ({"max_tokens": 0}, [("max_tokens", "OUT_OF_RANGE")]),
        ({"max_tokens": 2**31}, [("max_tokens", "INVALID")]),
        ({"max_tokens": 0, "echo": True, "explain": 1}, [("explain", "NOT_IN_THIS_MODE")]),
        ({"temperature": -1}, [("temperature", "INVALID")]),
        ({"seed": 2**63}, [("seed", "INVALID")]),
        ({"logprobs": 21}, [("logprobs", "INVALID")]),
        ({"logprobs": True}, [("logprobs", "INVALID")]),
        ({"stop": [""]}, [("stop[0]", "INVALID")]),
        ({"stop": ["a"] * 17}, [("stop", "INVALID")]),
        ({"stream_options": {"include_usage": True}}, [("stream_options", "NOT_IN_THIS_MODE")]),
        ({"stream": True, "stream_options": {"other": 1}}, [("stream_options.other", "UNKNOWN_FIELD")]),
        ({"since": "1"}, [("since", "INVALID")]),
        ({"priority": 101}, [("priority", "INVALID")]),
        ({"explain": 65}, [("explain", "INVALID")]),
        ({"logit_bias": {"5": -100, "7": 0.5}, "presence_penalty": -2, "frequency_penalty": 1, "min_p": 1}, []),
        ({"logit_bias": {"a": 1}}, [("logit_bias.a", "INVALID")]),
        ({"logit_bias": {"1": 101, "7": "a"}}, [("logit_bias[1]", "INVALID"), ("logit_bias[7]", "INVALID")]),
        ({"logit_bias": {"0": 1, "5": 1, "05": 2}}, [("logit_bias[05]", "INVALID")]),
        ({"frequency_penalty": False}, [("frequency_penalty", "INVALID")]),
        ({"presence_penalty": 2.5}, [("presence_penalty", "INVALID")]),
        ({"min_p": -0.1}, [("min_p", "INVALID")]),
        ({"repetition_penalty": 0}, [("repetition_penalty", "INVALID")]),
        ({"bad_words": [""]}, [("bad_words[0]", "INVALID")]),
    ],
)
def test_a_wrong_value_is_refused_at_its_field(changes: dict[str, Any], found: list[tuple[str, str]]) -> None:
    values = {**COMPLETION, **changes}
    if not found:
        read(Completion, json.dumps(values).encode())
    else:
        assert refusals(Completion, values) == found


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        (Completion, {"logit_bias": {"05": 1}}, "'05'; keys are token ids, as in 262, with no zero before them"),
        (Completion, {"model": "live@x"}, "'live@x'; write a channel, or CHANNEL@17 for release 17"),
        (Completion, {"since": "3"}, "'3'; write EPOCH.REVISION, as in 1.35"),
        (Completion, {"nonsense": 1}, "there is no such field; leave it out"),
        (Completion, {"n": 0}, "0; input should be greater than or equal to 1"),
        (Completion, {"max_tokens": 0, "echo": True, "explain": 3}, "max_tokens is 0, so no token is made"),
        (Completion, {"prompt_logprobs": 1, "stream": True}, "1, but streams don't have it"),
        (Chat, {"prompt_logprobs": 21}, "21; input should be less than or equal to 20"),
        (Completion, {"max_tokens": 0, "echo": True, "prompt_logprobs": 0}, "`logprobs` lists the same of the echo"),
        (Chat, {"messages": [{"role": "user"}]}, "it is missing; give it"),
        (Chat, {"top_logprobs": 2}, "2, but logprobs isn't set; set it, or leave this out"),
        (Chat, {"max_tokens": 2, "max_completion_tokens": 3}, "3, and max_tokens is 2; they mean the same, give one"),
    ],
)
def test_a_refusal_says_the_value_and_the_fix(kind: type[Sampled], changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(kind, json.dumps({**(COMPLETION if kind is Completion else CHAT), **changes}).encode())
    (violation,) = refused.value.violations
    assert told in violation.description


def test_all_that_is_wrong_is_told_at_once() -> None:
    found = refusals(Completion, {"n": 0, "tools": [], "suffix": "end"})
    assert {field for field, _ in found} == {"n", "tools", "suffix", "model", "prompt"}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"a"', b'{"model": NaN}', b"\xff", b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}']
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(Completion, body)
    assert refused.value.reason == "NOT_JSON"
    assert body not in (b"[]", b'"a"') or f"the body is {json.loads(body)!r}; it must be" in refused.value.message


def test_chats_have_one_way_to_say_each_thing() -> None:
    assert refusals(Chat, {**CHAT, "top_logprobs": 2}) == [("top_logprobs", "NOT_IN_THIS_MODE")]
    assert refusals(Chat, {**CHAT, "max_tokens": 2, "max_completion_tokens": 2}) == [
        ("max_completion_tokens", "AMBIGUOUS")
    ]
    assert read(Chat, json.dumps({**CHAT, "max_tokens": 2}).encode()).most_tokens() == 2
    assert read(Chat, json.dumps(CHAT).encode()).most_tokens() is None


def test_a_model_is_a_channel_or_a_release() -> None:
    plain = read(Completion, json.dumps(COMPLETION).encode())
    assert (plain.channel, plain.release) == ("live", None)
    numbered = read(Completion, json.dumps({**COMPLETION, "model": "live@17", "since": "2.31"}).encode())
    assert (numbered.channel, numbered.release, numbered.position) == ("live", 17, {"epoch": 2, "revision": 31})
