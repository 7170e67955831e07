"""Errors as HTTP: the status of each, and OpenAI's shape with our reason in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from backpack_serving.errors import InvalidRequest, ServiceError

STATUSES: Mapping[str, int] = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "DATA_LOSS": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""By canonical code, as google.rpc.Code and Connect's protocol have them."""

REASON_STATUSES: Mapping[str, int] = {
    "NO_SUCH_PATH": 404,
    "METHOD_NOT_ALLOWED": 405,
    "BODY_TOO_LARGE": 413,
    "NOT_JSON_TYPE": 415,
}
"""By reason, where HTTP has a more exact word: these are made here, before any call."""

_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}

_FIELDS: Mapping[str, str] = {
    "samples": "n",
    "json_schema": "response_format",
    "regex": "structured_outputs.regex",
    "grammar": "structured_outputs.grammar",
    "log_probabilities": "logprobs",
    "alternatives": "logprobs",
    "release": "model",
    "channel": "model",
    "text": "prompt",
    "min_revision": "since",
}
"""Our names of fields, where requests of OpenAI's API have another."""


def body_too_large(most: int) -> InvalidRequest:
    return InvalidRequest("BODY_TOO_LARGE", f"the body has more than {most} bytes")


def status(error: ServiceError) -> int:
    return REASON_STATUSES.get(error.reason) or STATUSES.get(error.code, 500)


def body(error: ServiceError) -> dict[str, Any]:
    """`error` as OpenAI has it: `code` is our reason, `param` the first field that is wrong."""
    code = status(error)
    kind = _TYPES.get(code, "server_error" if code >= 500 else "invalid_request_error")
    param = _param(error.violations[0].field) if error.violations else None
    more = {"metadata": dict(error.metadata)} if error.metadata else {}
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": param,
            "code": error.reason,
            "status": error.code,
            **more,
        }
    }


def headers(error: ServiceError) -> dict[str, str]:
    found = {}
    if error.retry_after is not None:
        found["retry-after"] = str(math.ceil(error.retry_after))
        found["retry-after-ms"] = str(math.ceil(error.retry_after * 1000))  # read by OpenAI's clients
    if "allow" in error.metadata:
        found["allow"] = error.metadata["allow"]
    if error.code == "UNAUTHENTICATED":
        found["www-authenticate"] = "Bearer"
    return found


def response(error: ServiceError) -> JSONResponse:
    return JSONResponse(body(error), status(error), headers(error))


def _param(field: str) -> str:
    name = field.removeprefix("sampling.").removesuffix(".limit").replace(".tokens.ids", "")
    name = name.replace("draft.edits", "draft")
    plain, bracket, at = name.partition("[")
    return _FIELDS.get(plain, plain) + bracket + at
