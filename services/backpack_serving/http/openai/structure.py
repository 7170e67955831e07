"""What a text has to be, as OpenAI's `response_format` and vLLM's `structured_outputs` say it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ANY_OBJECT = {"type": "object"}
"""The schema that "JSON mode" means."""

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextFormat(BaseModel):
    """Any text."""

    model_config = _STRICT

    type: Literal["text"]


class ObjectFormat(BaseModel):
    """A JSON object."""

    model_config = _STRICT

    type: Literal["json_object"]


class NamedSchema(BaseModel):
    """A JSON Schema. Its name and description are for people; it is always followed strictly."""

    model_config = _STRICT

    name: str
    description: str | None = None
    value: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(BaseModel):
    """JSON that a schema describes."""

    model_config = _STRICT

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(BaseModel):
    """vLLM's: one of these."""

    model_config = _STRICT

    schema_: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON Schema.")
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = Field(None, description="In Lark's syntax, or GBNF.")


def forms(response: ResponseFormat | None, outputs: StructuredOutputs | None) -> Mapping[str, tuple[str, str]]:
    """What is asked for: the request's own field that says so, and the field of our `Sampling` with its text."""
    found: dict[str, tuple[str, str]] = {}
    if isinstance(response, SchemaFormat):
        found["response_format"] = "json_schema", json.dumps(response.json_schema.value)
    elif isinstance(response, ObjectFormat):
        found["response_format"] = "json_schema", json.dumps(ANY_OBJECT)
    if outputs:
        if outputs.schema_ is not None:
            schema = outputs.schema_
            text = schema if isinstance(schema, str) else json.dumps(schema)
            found["structured_outputs.json"] = "json_schema", text
        if outputs.json_object:
            found["structured_outputs.json_object"] = "json_schema", json.dumps(ANY_OBJECT)
        if outputs.regex is not None:
            found["structured_outputs.regex"] = "regex", outputs.regex
        if outputs.grammar is not None:
            found["structured_outputs.grammar"] = "grammar", outputs.grammar
    return found
