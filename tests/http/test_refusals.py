"""Our errors as HTTP."""

from __future__ import annotations

import json

import pytest
from backpack_lm.patch import Violation
from backpack_serving import errors
from backpack_serving.http import refusals
from backpack_serving.http.document import document


def test_every_kind_of_error_has_a_status() -> None:
    assert refusals.STATUSES.keys() == errors.BY_CODE.keys()
    described = document()["paths"]["/v1/completions"]["post"]["responses"]
    assert {str(refusals.status(kind("R", "m"))) for kind in errors.BY_CODE.values()} <= described.keys()


def test_a_refusal_is_openais_error_with_our_reason() -> None:
    error = errors.InvalidRequest.of(Violation("sampling.samples", "OUT_OF_RANGE", "17; 1 to 16"))
    answer = refusals.response(error)
    assert answer.status_code == 400
    assert json.loads(answer.body)["error"] == {
        "message": "sampling.samples: 17; 1 to 16",
        "type": "invalid_request_error",
        "param": "n",
        "code": "OUT_OF_RANGE",
        "status": "INVALID_ARGUMENT",
    }


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("sampling.max_tokens", "max_tokens"),
        ("sampling.log_probabilities", "logprobs"),
        ("sampling.stop[2]", "stop[2]"),
        ("prompt", "prompt"),
        ("prompt.tokens.ids[3]", "prompt[3]"),
        ("text", "prompt"),
        ("text.tokens.ids[3]", "prompt[3]"),
        ("alternatives", "logprobs"),
        ("explain.limit", "explain"),
        ("min_revision", "since"),
        ("draft.edits[2].scale.factor", "draft[2].scale.factor"),
        ("release", "model"),
        ("messages[1].content", "messages[1].content"),
    ],
)
def test_a_field_is_called_as_the_request_calls_it(ours: str, theirs: str) -> None:
    body = refusals.body(errors.InvalidRequest.at(ours, "R", "d"))
    assert body["error"]["param"] == theirs


def test_who_may_come_again_is_told_when() -> None:
    error = errors.Exhausted("TOO_MANY", "slow down", retry_after=0.25)
    answer = refusals.response(error)
    assert (answer.status_code, answer.headers["retry-after"], answer.headers["retry-after-ms"]) == (429, "1", "250")
    assert "retry-after" not in refusals.response(errors.NotFound("R", "m")).headers
    assert refusals.response(errors.Unauthenticated("R", "m")).headers["www-authenticate"] == "Bearer"
    assert json.loads(refusals.response(errors.Exhausted("R", "m", limit="9")).body)["error"]["metadata"] == {
        "limit": "9"
    }
