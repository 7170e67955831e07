"""What a text has to be, as OpenAI's `response_format` and vLLM's `structured_outputs` say it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from backpack_lm.patch import Violation
from pydantic import BaseModel, ConfigDict, Field

ANY_OBJECT = {"type": "object"}
"""The schema that "JSON mode" means."""

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


class NamedSchema(BaseModel):
    """A JSON Schema. Its name and description are for people; it is always followed strictly."""

    model_config = _STRICT

    name: str
    description: str | None = None
    value: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's: any text, a JSON object, or JSON that a schema describes."""

    model_config = _STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's: one of these."""

    model_config = _STRICT

    value: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON Schema.")
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = Field(None, description="In Lark's syntax, or GBNF.")


def forms(response: ResponseFormat | None, outputs: StructuredOutputs | None) -> Mapping[str, tuple[str, str]]:
    """What is asked for: the request's own field that says so, and the field of our `Sampling` with its text."""
    found: dict[str, tuple[str, str]] = {}
    if response and response.type == "json_object":
        found["response_format"] = "json_schema", json.dumps(ANY_OBJECT)
    if response and response.json_schema:
        found["response_format"] = "json_schema", json.dumps(response.json_schema.value)
    if outputs and outputs.value is not None:
        schema = outputs.value
        found["structured_outputs.json"] = "json_schema", schema if isinstance(schema, str) else json.dumps(schema)
    if outputs and outputs.json_object:
        found["structured_outputs.json_object"] = "json_schema", json.dumps(ANY_OBJECT)
    if outputs and outputs.regex is not None:
        found["structured_outputs.regex"] = "regex", outputs.regex
    if outputs and outputs.grammar is not None:
        found["structured_outputs.grammar"] = "grammar", outputs.grammar
    return found


def violations(response: ResponseFormat | None, outputs: StructuredOutputs | None) -> Iterator[Violation]:
    """Fields that are good by themselves, and not together."""
    if response and (response.type == "json_schema") != (response.json_schema is not None):
        if response.json_schema is None:
            yield Violation("response_format.json_schema", "MISSING", "it is missing; give it")
        else:
            text = f"the type is {response.type!r}; make it 'json_schema', or leave this out"
            yield Violation("response_format.json_schema", "NOT_IN_THIS_MODE", text)
    if len(asked := [*forms(response, outputs)]) > 1:
        text = f"given together with {asked[0]}; a text can have one, leave the other out"
        yield Violation(asked[1], "AMBIGUOUS", text)
