"""OpenAI's `response_format` and vLLM's `structured_outputs`, by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest
from backpack_serving.client import Client, Sampling

from tests.http.conftest import PROMPT, Web

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "horse", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_gives_what_the_schema_describes(web: Web, stream: bool) -> None:
    with openai.OpenAI(base_url=f"{web.url}/v1", api_key=web.key, max_retries=0) as client:
        asked: Any = {"model": "live", "seed": 1, "max_tokens": 100, "response_format": FORMAT, "n": 2}
        answer = client.chat.completions.create(
            messages=[{"role": "user", "content": "A horse"}], stream=stream, **asked
        )
        texts, finished = ["", ""], ["", ""]
        if stream:
            for chunk in answer:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
                    finished[choice.index] = choice.finish_reason or finished[choice.index]
        else:
            texts = [choice.message.content for choice in answer.choices]
            finished = [choice.finish_reason for choice in answer.choices]
    assert finished == ["stop", "stop"]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_a_completion_is_what_grpc_gives(web: Web) -> None:
    for fields, sampling in (
        ({"response_format": FORMAT}, {"json_schema": SCHEMA}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json_schema": SCHEMA}),
        ({"structured_outputs": {"regex": "( [a-z]{1,9}){2}!"}}, {"regex": "( [a-z]{1,9}){2}!"}),
        ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, {"grammar": 'start: "yes" | "no"'}),
    ):
        (choice,) = web.complete(max_tokens=60, logprobs=1, **fields)["choices"]
        with Client(web.gateway, web.key) as client:
            same = client.generate(PROMPT, Sampling(60, seed=1, log_probabilities=1, **sampling))
        assert choice["text"] == same.text
        assert choice["finish_reason"] == "stop"
        assert choice["logprobs"]["token_logprobs"] == [token.log_probability for token in same.tokens]
    assert choice["text"] in ("yes", "no")


def test_json_mode_gives_an_object(web: Web) -> None:
    (choice,) = web.complete(max_tokens=200, response_format={"type": "json_object"}, temperature=0.3)["choices"]
    assert choice["text"].startswith("{")
    assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["text"]), dict)


def test_what_cant_be_compiled_is_refused_by_its_field(web: Web) -> None:
    asked = {"model": "live", "prompt": PROMPT}
    bad = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "foo"}}}
    assert web.refused(**asked, response_format=bad) == (400, "BAD_GRAMMAR", "response_format")
    for form in ("regex", "grammar"):
        refused = web.refused(**asked, structured_outputs={form: "(a"}, stream=True)
        assert refused == (400, "BAD_GRAMMAR", f"structured_outputs.{form}")
    several = web.post(
        "/backpack.v1.InferenceService/Generate", {"prompt": {"text": "a"}, "sampling": {"regex": "a", "grammar": "b"}}
    )
    assert several.status_code == 400
    assert "structure" in several.text
