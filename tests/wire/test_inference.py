"""Requests for text: what would keep an event loop busy is refused before it is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from backpack_lm.generation import SamplingDefaults
from backpack_lm.installed import folder_of
from backpack_lm.manifest import Manifest
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2 as pb
from backpack_serving.client import Sampling
from backpack_serving.errors import InvalidRequest
from backpack_serving.sampling import TextStructure
from backpack_serving.wire.compare import read_comparison
from backpack_serving.wire.inference import normalize_request, read_generation, read_word

TOKENIZER = Tokenizer.read(folder_of("micro") / "tokenizer.json")
CONFIG = Manifest.read(folder_of("micro")).config
PROMPT = pb.Prompt(text="The king")
LONG = "ab" * 500_000


def _generate(*stop: str) -> object:
    request = pb.GenerateRequest(prompt=PROMPT, sampling=pb.Sampling(stop=stop))
    return read_generation(request, TOKENIZER, CONFIG, SamplingDefaults())


def _compare(*targets: pb.Word) -> object:
    return read_comparison(pb.CompareRequest(prompt=PROMPT, targets=targets), TOKENIZER, CONFIG)


@pytest.mark.parametrize(
    ("read", "field", "reason", "says"),
    [
        (lambda: _generate(*[""] * 300_000), "sampling.stop", "TOO_MANY", "300000; at most 16"),
        (lambda: _compare(*[pb.Word(text="king")] * 100_000), "targets", "TOO_MANY", "100000; at most 64"),
        (lambda: _compare(pb.Word(text=LONG)), "targets[0]", "TOO_LONG", "1000000 bytes; at most 256"),
        (
            lambda: _compare(pb.Word(text=LONG, policy=pb.WORD_POLICY_FIRST_TOKEN)),
            "targets[0]",
            "TOO_LONG",
            "1000000 bytes; at most 256",
        ),
        (
            lambda: read_word("word", pb.Word(text="\N{WAVE DASH}" * 86), TOKENIZER, CONFIG),
            "word",
            "TOO_LONG",
            "258 bytes; at most 256",
        ),
    ],
    ids=["stops", "targets", "word", "first token", "characters"],
)
def test_what_is_too_much_is_refused_before_it_is_read(
    read: Callable[[], object], field: str, reason: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, words = Tokenizer.encode, []

    def watched(self: Tokenizer, text: str) -> list[int]:
        words.append(text)
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    with pytest.raises(InvalidRequest) as refused:
        read()
    assert says in next(v.description for v in refused.value.violations if (v.field, v.reason) == (field, reason))
    assert len(refused.value.violations) <= 17
    assert len(words) <= 65
    assert max(map(len, words), default=0) < 300


def test_a_word_with_its_token_may_be_of_any_length() -> None:
    """As answers give it: the token counts."""
    assert read_word("word", pb.Word(text=LONG, token=5), TOKENIZER, CONFIG) == 5


@pytest.mark.parametrize(("given", "meant"), [(1e308, 1e30), (1.5, 1.5), (1e-7, 0.0), (5e-324, 0.0), (-0.0, 0.0)])
def test_a_temperature_is_one_that_float32_can_hold(given: float, meant: float) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, sampling=pb.Sampling(temperature=given))
    assert read_generation(request, TOKENIZER, CONFIG, SamplingDefaults()).sampling.temperature == meant


MODELS = SamplingDefaults(0.6, 20, 0.9)


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        ({}, (0.6, 20, 0.9)),
        ({"max_tokens": 3, "seed": 1, "stop": ["."], "log_probabilities": 2}, (0.6, 20, 0.9)),
        ({"temperature": 1.0}, (1.0, 0, 1.0)),
        ({"top_p": 1.0}, (1.0, 0, 1.0)),
        ({"temperature": 1.0, "top_p": 1.0}, (1.0, 0, 1.0)),
        ({"temperature": 0.0}, (0.0, 0, 1.0)),
        ({"top_k": 5}, (1.0, 5, 1.0)),
        ({"temperature": 0.7, "top_k": 30}, (0.7, 30, 1.0)),
    ],
)
def test_who_names_no_sampling_gets_the_models(named: dict[str, Any], meant: tuple[float, int, float]) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, sampling=pb.Sampling(**named))
    params = read_generation(request, TOKENIZER, CONFIG, MODELS)
    assert (params.sampling.temperature, params.sampling.top_k, params.sampling.top_p) == meant
    normalize_request(request, params)
    # A replica reads the same, whatever its model's folder says: a second attempt draws the same tokens.
    assert read_generation(request, TOKENIZER, CONFIG, SamplingDefaults(0.1, 1, 0.1)) == params


def test_what_changes_logits_is_read() -> None:
    asked = Sampling(
        logit_bias={7: -2.5, 3: 100}, min_p=0.1, repetition_penalty=1.5, frequency_penalty=-2, presence_penalty=0.5,
        min_tokens=4, bad_words=["king", " the court "],
    )  # fmt: skip
    request = pb.GenerateRequest(prompt=PROMPT, sampling=asked.message())
    params = read_generation(request, TOKENIZER, CONFIG, SamplingDefaults(0.6, 20, 0.9, 0.4, 3.0))
    s = params.sampling
    assert (s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty) == (1.0, 0, 1.0, 0.1, 1.5)
    assert (s.logit_bias, s.frequency_penalty, s.presence_penalty, s.min_tokens) == (((3, 100), (7, -2.5)), -2, 0.5, 4)
    assert s.bad_words == tuple(tuple(TOKENIZER.encode(word)) for word in ("king", " king", "the court", " the court"))
    normalize_request(request, params)
    assert read_generation(request, TOKENIZER, CONFIG, SamplingDefaults(0.1, 1, 0.1)) == params
    unnamed = pb.GenerateRequest(prompt=PROMPT, sampling=pb.Sampling(frequency_penalty=1))
    drawn = read_generation(unnamed, TOKENIZER, CONFIG, SamplingDefaults(0.6, 20, 0.9, 0.4, 3.0)).sampling
    assert (drawn.temperature, drawn.min_p, drawn.repetition_penalty) == (0.6, 0.4, 3.0)


@pytest.mark.parametrize(
    ("asked", "form", "text"),
    [
        (Sampling(json_schema={"type": "object"}), "json_schema", '{"type": "object"}'),
        (Sampling(json_schema='{"type":"object"}'), "json_schema", '{"type":"object"}'),
        (Sampling(regex="[a-z]+"), "regex", "[a-z]+"),
        (Sampling(grammar='start: "a"'), "grammar", 'start: "a"'),
    ],
)
def test_what_a_text_has_to_be_is_read(asked: Sampling, form: Any, text: str) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, sampling=asked.message())
    params = read_generation(request, TOKENIZER, CONFIG, SamplingDefaults())
    assert params.sampling.structure == TextStructure(form, text)
    normalize_request(request, params)
    assert read_generation(request, TOKENIZER, CONFIG, SamplingDefaults()) == params
    assert read_generation(pb.GenerateRequest(prompt=PROMPT), TOKENIZER, CONFIG, MODELS).sampling.structure is None


@pytest.mark.parametrize(
    ("asked", "field", "reason"),
    [
        (Sampling(json_schema={}, regex="a"), "sampling.regex", "AMBIGUOUS"),
        (Sampling(regex="a", grammar='start: "a"'), "sampling.grammar", "AMBIGUOUS"),
        (Sampling(json_schema={"a": object()}), "sampling.json_schema", "NOT_JSON"),
    ],
)
def test_the_python_client_refuses_what_no_message_can_say(asked: Sampling, field: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked.message()
    assert [(v.field, v.reason) for v in refused.value.violations] == [(field, reason)]


@pytest.mark.parametrize(
    ("named", "field", "reason"),
    [
        ({"min_p": -0.1}, "min_p", "OUT_OF_RANGE"),
        ({"min_p": math.nan}, "min_p", "OUT_OF_RANGE"),
        ({"repetition_penalty": 0.0}, "repetition_penalty", "OUT_OF_RANGE"),
        ({"repetition_penalty": math.inf}, "repetition_penalty", "OUT_OF_RANGE"),
        ({"frequency_penalty": 2.1}, "frequency_penalty", "OUT_OF_RANGE"),
        ({"presence_penalty": math.nan}, "presence_penalty", "OUT_OF_RANGE"),
        ({"min_tokens": -1}, "min_tokens", "OUT_OF_RANGE"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "OUT_OF_RANGE"),
        ({"logit_bias": {16384: 1.0}}, "logit_bias[16384]", "UNKNOWN_TOKEN"),
        ({"logit_bias": {5: math.nan}}, "logit_bias[5]", "OUT_OF_RANGE"),
        ({"logit_bias": {5: -math.inf}}, "logit_bias[5]", "OUT_OF_RANGE"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias", "TOO_MANY"),
        ({"bad_words": [" "]}, "bad_words[0]", "OUT_OF_RANGE"),
        ({"bad_words": [LONG]}, "bad_words[0]", "OUT_OF_RANGE"),
        ({"bad_words": ["a"] * 65}, "bad_words", "TOO_MANY"),
        ({"regex": ""}, "regex", "OUT_OF_RANGE"),
        ({"grammar": "a" * 65_537}, "grammar", "OUT_OF_RANGE"),
        ({"json_schema": "é" * 32_769}, "json_schema", "OUT_OF_RANGE"),
        ({"json_schema": "{'type': 'object'}"}, "json_schema", "NOT_JSON"),
        ({"json_schema": '{"type": "object", "type": "string"}'}, "json_schema", "NOT_JSON"),
        ({"json_schema": "[" * 60_000}, "json_schema", "NOT_JSON"),
        ({"json_schema": '["string"]'}, "json_schema", "BAD_GRAMMAR"),
        ({"regex": "a", "ignore_end_of_text": True}, "ignore_end_of_text", "NOT_IN_THIS_MODE"),
    ],
)
def test_what_no_logits_can_be_changed_by_is_refused(named: dict[str, Any], field: str, reason: str) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, sampling=pb.Sampling(**named))
    with pytest.raises(InvalidRequest) as refused:
        read_generation(request, TOKENIZER, CONFIG, SamplingDefaults())
    assert [(v.field, v.reason) for v in refused.value.violations] == [(f"sampling.{field}", reason)]


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "9; 0 to 8, which is max_tokens"),
        ({"min_tokens": 65}, "65; 0 to 64, which is max_tokens"),
        ({"bad_words": [f" {LONG}  "]}, f"{len(LONG)} characters without the spaces around it; 1 to 256"),
        ({"regex": ""}, "0 bytes; 1 to 65536"),
        ({"json_schema": "true"}, "true; it must be a JSON object"),
        ({"regex": "a", "ignore_end_of_text": True}, "regex says where the text ends; leave one of them out"),
    ],
)
def test_a_refusal_says_the_value_and_its_bounds(named: dict[str, Any], told: str) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, sampling=pb.Sampling(**named))
    with pytest.raises(InvalidRequest) as refused:
        read_generation(request, TOKENIZER, CONFIG, SamplingDefaults())
    assert [violation.description for violation in refused.value.violations] == [told]


@pytest.mark.parametrize(
    ("sampling", "meant"),
    [
        (Sampling(), (0.6, 20, 0.9)),
        (Sampling(top_k=0), (1.0, 0, 1.0)),
        (Sampling(top_k=4), (1.0, 4, 1.0)),
        (Sampling(top_p=0.5), (1.0, 0, 0.5)),
        (Sampling(temperature=0), (0.0, 0, 1.0)),
    ],
)
def test_the_python_client_names_what_it_was_given(sampling: Sampling, meant: tuple[float, int, float]) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, sampling=sampling.message())
    drawn = read_generation(request, TOKENIZER, CONFIG, MODELS).sampling
    assert (drawn.temperature, drawn.top_k, drawn.top_p) == meant
