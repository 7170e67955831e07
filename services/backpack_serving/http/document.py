"""The OpenAPI document: OpenAI's API as it is served here. Our own services are described by their protos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from pydantic.json_schema import models_json_schema

from backpack_serving.http.openai.fields import OFF_IN_CHATS, OFF_IN_COMPLETIONS, Chat, Completion

_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code", "status"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The first field that is wrong."},
                "code": {"type": "string", "description": "The reason: a stable word for programs."},
                "status": {"type": "string", "description": "The canonical status (google.rpc.Code)."},
                "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        }
    },
}

_SERVED: dict[str, Any] = {
    "type": "object",
    "description": "What made the text: the release, by number and SHA-256.",
    "required": ["tenant", "channel", "release", "release_digest", "canary", "position", "model_fingerprint"],
    "properties": {
        "tenant": {"type": "string"},
        "channel": {"type": "string"},
        "release": {"type": "integer"},
        "release_digest": {"type": "string"},
        "canary": {"type": "boolean"},
        "draft_digest": {
            "type": "string",
            "description": "Of the edits that the request tries, as a revision.",
        },
        "position": {"type": "string", "description": "EPOCH.REVISION of the store, as `since` takes it."},
        "model_fingerprint": {"type": "string"},
    },
}

_MODEL: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "release", "release_digest"],
    "properties": {
        "id": {"type": "string", "description": "CHANNEL, CHANNEL:canary or CHANNEL@17."},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string", "description": "The tenant."},
        "release": {"type": "integer"},
        "release_digest": {"type": "string"},
    },
}

_USAGE = {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")}

_HEALTH: dict[str, Any] = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"enum": ["SERVING", "NOT_SERVING"]}, "why": {"type": "string"}},
}

_ANYWHERE = (401, 403, 404, 409, 429, 500, 503, 504)


def document() -> dict[str, Any]:
    """The document. Requests are described by what reads them."""
    _, schemas = models_json_schema(
        [(Completion, "validation"), (Chat, "validation")], ref_template="#/components/schemas/{model}"
    )
    requests: dict[str, Any] = schemas["$defs"]
    for name, off in (("Completion", OFF_IN_COMPLETIONS), ("Chat", OFF_IN_CHATS)):
        requests[name]["properties"] |= _off(off)
    models = {"type": "object", "required": ["object", "data"], "properties": {"object": {"const": "list"}}}
    models["properties"] |= {"data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}}  # type: ignore[operator]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Backpack Serving", "version": metadata.version("backpack-serving")},
        "security": [{"key": []}],
        "paths": {
            "/v1/models": {"get": _operation("List your channels and their canaries, which are models here.", models)},
            "/v1/models/{model}": {
                "get": _operation(
                    "A channel, its canary, or a release.", {"$ref": "#/components/schemas/Model"}, refused=(400,)
                ),
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
            },
            "/v1/completions": {"post": _generating("Continue texts.", "Completion", {"text": {"type": "string"}})},
            "/v1/chat/completions": {"post": _generating("Answer a chat.", "Chat", {"message": {"type": "object"}})},
            "/healthz": {"get": _operation("Does this process live?", _HEALTH, public=True)},
            "/readyz": {"get": _operation("Would requests be answered?", _HEALTH, public=True, others={503: _HEALTH})},
        },
        "components": {
            "schemas": {**requests, "Error": _ERROR, "Model": _MODEL, "Served": _SERVED},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _off(off: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    text = "Only this; what else it asks for isn't served here."
    return {name: {"enum": list(values), "description": text} for name, values in off.items()}


def _generating(summary: str, request: str, content: dict[str, Any]) -> dict[str, Any]:
    choice = {
        "type": "object",
        "required": ["index", *content, "finish_reason", "logprobs", "served"],
        "properties": {
            "index": {"type": "integer"},
            **content,
            "finish_reason": {"enum": ["stop", "length"]},
            "logprobs": {"type": ["object", "null"]},
            "served": {"$ref": "#/components/schemas/Served"},
            "explanations": {"type": "array", "items": {"type": "object"}},
        },
    }
    answer = {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"type": "string"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "system_fingerprint": {"type": "string"},
            "choices": {"type": "array", "items": choice},
            "usage": {"type": "object", "required": list(_USAGE), "properties": _USAGE},
        },
    }
    operation = _operation(summary, answer, refused=(400, 413, 415))
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": event}  # of each event
    schema = {"$ref": f"#/components/schemas/{request}"}
    return operation | {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _operation(
    summary: str,
    answer: dict[str, Any],
    refused: Sequence[int] = (),
    public: bool = False,
    others: Mapping[int, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    error = {"description": "Refused.", "content": _json_content({"$ref": "#/components/schemas/Error"})}
    responses = {"200": {"description": "Done.", "content": _json_content(answer)}}
    responses |= {str(code): error for code in (() if public else sorted({*_ANYWHERE, *refused}))}
    responses |= {
        str(code): {"description": "Not now.", "content": _json_content(each)} for code, each in (others or {}).items()
    }
    return {"summary": summary, "responses": responses} | ({"security": []} if public else {})


def _json_content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
