"""Texts that are held to a grammar: always within it, the oracle's tokens, and the same in any company."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
import torch
from backpack_lm.installed import folder_of
from backpack_lm.overlay import Overlay
from backpack_lm.patch import BiasEdit, Cell, CopyEdit, ReleaseContent, RevisionContent
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.logits import change
from backpack_serving.engine.loop import EngineLoop, NoTokenAllowed
from backpack_serving.engine.runner import Runner
from backpack_serving.engine.sampler import choose, log_probability
from backpack_serving.engine.scheduler import Scheduler
from backpack_serving.engine.sequence import Finish, GenerationRequest, Output
from backpack_serving.engine.slots import OverlayRows, Slots
from backpack_serving.inference.grammars import CompiledGrammar, GrammarCompiler
from backpack_serving.inference.served_model import ServedModel
from backpack_serving.sampling import SamplingParams, TextStructure

from tests.engine.conftest import compiled, outputs_of

ROOM = 64
ENDS = (0,)


@dataclass(frozen=True)
class Form:
    """A structure, and the same as a regular expression for another library, which can match a beginning."""

    structure: TextStructure
    pattern: str

    def begins(self, text: str) -> bool:
        return regex.fullmatch(self.pattern, text, regex.DOTALL, partial=True) is not None

    def check_whole(self, text: str) -> None:
        assert regex.fullmatch(self.pattern, text, regex.DOTALL), text
        if self.structure.form == "json_schema":
            jsonschema.validate(json.loads(text), json.loads(self.structure.text))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["ship", "horse", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
CHARACTER = r'(?:[^"\\\x00-\x1f\x7f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))'
FORMS = {
    "schema": Form(
        TextStructure("json_schema", json.dumps(SCHEMA)),
        rf'\{{"name": "{CHARACTER}{{0,12}}", "age": [1-9]?[0-9], "kind": (?:"ship"|"horse"|null), '
        r'"tags": \[(?:(?:true|false)(?:, (?:true|false)){0,2})?\]\}',
    ),
    "array": Form(
        TextStructure("json_schema", '{"type": "array", "items": {"type": "string"}, "minItems": 2}'),
        rf'\["{CHARACTER}*"(?:, "{CHARACTER}*")+\]',
    ),
    "date": Form(TextStructure("regex", r"[0-9]{4}-(0[1-9]|1[0-2])"), r"[0-9]{4}-(0[1-9]|1[0-2])"),
    "words": Form(TextStructure("regex", "( [a-zé]+){1,6}[.!]"), "( [a-zé]+){1,6}[.!]"),
    "any": Form(TextStructure("regex", "(?s:.*)"), ".*"),
    "answer": Form(TextStructure("grammar", 'start: "yes" | "no" | "may" "be"*'), "yes|no|may(be)*"),
    "gbnf": Form(TextStructure("grammar", 'root ::= "<" [a-c]+ ">" | "<" root ">"'), "<+[a-c]+>+"),
}


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return ServedModel.read(folder_of("micro"), room=ROOM)


@pytest.fixture(scope="module")
def grammars(served: ServedModel) -> dict[str, CompiledGrammar]:
    compiler = GrammarCompiler(served.tokenizer, served.manifest.config.tokens, served.manifest.end_tokens)

    async def all_of_them() -> dict[str, CompiledGrammar]:
        return {name: await compiler.compiled("t", form.structure) for name, form in FORMS.items()}

    return asyncio.run(all_of_them())


@pytest.fixture(scope="module")
def overlay(served: ServedModel) -> Overlay:
    return compiled((CopyEdit(tuple(Cell(t, 3) for t in range(40, 60)), 9, 0),), served.table)


def engine_of(served: ServedModel, slots: int = 8, **caches: int) -> Engine:
    runner = Runner(served.model, served.storage, slots, **caches)
    return Engine(runner, Slots(slots), OverlayRows(ROOM), Scheduler(64, 64), end_tokens=served.manifest.end_tokens)


def tokens(outputs: list[Output]) -> list[int]:
    return [output.token for output in outputs]


def oracle(served: ServedModel, request: GenerationRequest) -> list[int]:
    """The same on the reference model, whose logits are all there, and masked one by one."""
    state, made = request.grammar.start() if request.grammar else None, list[int]()

    def pick(logits: torch.Tensor) -> int:
        allowed = set(np.flatnonzero(state.allowed()).tolist()) if state else None
        logits = logits[: served.manifest.config.tokens]
        changed = change(logits, request.prompt, made, request.sampling, ENDS, allowed)
        return choose(changed, request.sampling, len(request.prompt) + len(made))

    for token in islice(served.model.generate(request.prompt, request.overlay, pick), request.sampling.max_tokens):
        made.append(token)
        if token in ENDS:
            break
        if state:
            state.add(token)
            if state.complete:
                break
    return made


def prompt(seed: int, length: int = 6) -> tuple[int, ...]:
    return tuple(100 + (seed * 31 + i * 17) % 900 for i in range(length))


@pytest.mark.parametrize("seed", range(12))
def test_what_is_made_is_in_the_grammar_and_what_was_begun_can_go_on(
    seed: int, served: ServedModel, grammars: dict[str, CompiledGrammar], overlay: Overlay
) -> None:
    """In batches with requests that have none, at any temperature; by another library and JSON Schema's own checker."""
    draw, requests = Random(seed), {}
    for name in FORMS:
        for n in range(3):
            how: dict[str, Any] = {"temperature": draw.choice([0.0, 0.6, 1.0, 3.0]), "seed": draw.randrange(2**60)}
            how |= draw.choice([{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.05}, {"repetition_penalty": 1.3}])
            sampling = SamplingParams(max_tokens=draw.choice([3, 12, 60]), **how)
            request = GenerationRequest(f"{name} {n}", "t", prompt(n), sampling, overlay, 0, grammars[name])
            requests[request.id] = request
            free = replace(request, id=f"{name} {n} free", grammar=None)
            requests[free.id] = free
    made = outputs_of(engine_of(served), list(requests.values()))
    ended = 0
    for key, request in requests.items():
        if request.grammar is None:
            continue
        form, outputs = FORMS[key.split()[0]], made[key]
        data = b""
        for output in outputs:
            if output.token not in ENDS:
                data += served.tokenizer.token_bytes(output.token)
                assert form.begins(data.decode("utf-8", "ignore")), (key, data)  # what is left of it may go on
        if outputs[-1].finish is Finish.STOP:
            ended += 1
            form.check_whole(data.decode())
        else:
            assert len(outputs) == request.sampling.max_tokens
            assert outputs[-1].finish is Finish.LENGTH
    assert ended > 5


@pytest.mark.parametrize("name", FORMS)
def test_greedy_tokens_are_the_likeliest_that_are_allowed(
    name: str, served: ServedModel, grammars: dict[str, CompiledGrammar], overlay: Overlay
) -> None:
    sampling = SamplingParams(max_tokens=25, temperature=0.0)
    request = GenerationRequest("r", "t", prompt(3), sampling, overlay, 0, grammars[name])
    state, expected = grammars[name].start(), []
    for _ in range(sampling.max_tokens):
        context = torch.tensor([[*request.prompt, *expected]])
        with torch.inference_mode():
            logits = served.model(context, overlay)[0, -1, : served.manifest.config.tokens]
        token = max(np.flatnonzero(state.allowed()).tolist(), key=lambda each: (float(logits[each]), -each))
        expected.append(token)
        state.add(token)
        if token in ENDS or state.complete:
            break
    assert tokens(outputs_of(engine_of(served), [request])["r"]) == expected == oracle(served, request)


ASKED: dict[str, dict[str, Any]] = {
    "drawn": {},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.2},
    "biased": {"logit_bias": ((35, 30.0), (70, -100.0))},
    "penalties": {"repetition_penalty": 1.4, "frequency_penalty": 1.0, "presence_penalty": 0.5},
    "min_tokens": {"min_tokens": 15},
    "bad words": {"bad_words": ((34, 34), (70,), (20,))},
}


@pytest.mark.parametrize("asked", ASKED)
def test_drawn_tokens_are_the_oracles_alone_and_in_company(
    asked: str, served: ServedModel, grammars: dict[str, CompiledGrammar], overlay: Overlay
) -> None:
    """The mask comes before what truncates: the two likeliest are two that are allowed."""
    sampling = SamplingParams(max_tokens=16, temperature=1.0, **ASKED[asked])
    requests = [
        GenerationRequest(name, "t", prompt(n), replace(sampling, seed=n), overlay, 0, grammars[name])
        for n, name in enumerate(("schema", "words", "answer"))
    ]
    free = [replace(request, id=f"{request.id} free", grammar=None) for request in requests]
    together = outputs_of(engine_of(served), [*requests, *free])
    for request in requests:
        expected = oracle(served, request)
        assert tokens(together[request.id]) == expected, request.id
        assert tokens(outputs_of(engine_of(served, slots=1), [request])[request.id]) == expected, request.id
    assert any(tokens(together[request.id]) != tokens(together[f"{request.id} free"]) for request in requests)


def test_who_is_pre_empted_goes_on_where_it_was(
    served: ServedModel, grammars: dict[str, CompiledGrammar], overlay: Overlay
) -> None:
    sampling = SamplingParams(max_tokens=80, temperature=1.0)
    requests = [
        GenerationRequest(f"{n}", "t", prompt(n, 20), replace(sampling, seed=n), overlay, 0, grammars["array"])
        for n in range(4)
    ]
    engine = engine_of(served, slots=4, context=128, cache_tokens=128, page_size=32)
    made = outputs_of(engine, requests)
    assert engine.preemptions
    roomy = engine_of(served, slots=4)
    undisturbed = outputs_of(roomy, requests)
    assert not roomy.preemptions
    assert {key: tokens(outputs) for key, outputs in made.items()} == {
        key: tokens(outputs) for key, outputs in undisturbed.items()
    }


def test_log_probabilities_stay_the_models(
    served: ServedModel, grammars: dict[str, CompiledGrammar], overlay: Overlay
) -> None:
    sampling = SamplingParams(max_tokens=6, temperature=0.0, log_probabilities=3)
    request = GenerationRequest("r", "t", prompt(1), sampling, overlay, 0, grammars["schema"])
    context = list(request.prompt)
    for output in outputs_of(engine_of(served), [request])["r"]:
        with torch.inference_mode():
            logits = served.model(torch.tensor([context]), overlay)[0, -1, : served.manifest.config.tokens]
        expected = log_probability(logits, output.token, 3)
        assert output.log_probability is not None
        assert output.log_probability.chosen == pytest.approx(expected.chosen, abs=1e-3)
        assert [t for t, _ in output.log_probability.alternatives] == [t for t, _ in expected.alternatives]
        context.append(output.token)


def test_ends_are_allowed_exactly_where_a_text_may_end(grammars: dict[str, CompiledGrammar]) -> None:
    for name, form in FORMS.items():
        state, text = grammars[name].start(), b""
        vocabulary = state._vocabulary
        draw = Random(name)
        for _ in range(40):
            allowed = np.flatnonzero(state.allowed()).tolist()
            whole = regex.fullmatch(form.pattern, text.decode("utf-8", "replace"), regex.DOTALL) is not None
            assert (0 in allowed) == whole, (name, text)
            words = [token for token in allowed if token not in ENDS]
            assert bool(words) != state.complete
            # The library's own parser takes each, token by token, on a copy.
            for token in draw.sample(words, min(len(words), 20)):
                copy = state._matcher.deep_copy()
                assert copy.consume_token(token)
            if not words:
                break
            state.add(token := draw.choice(words))
            text += vocabulary.tokens[token]


@pytest.mark.parametrize(
    ("pattern", "asked", "finish", "text"),
    [
        ("a", {}, Finish.STOP, "a"),
        ("a", {"min_tokens": 5}, Finish.STOP, "a"),  # nothing may follow, however short the text is
        ("", {"min_tokens": 5}, Finish.STOP, ""),
        ("a{1,9}", {"min_tokens": 3, "bad_words": ((81,),)}, None, None),
        ("aaaa", {"max_tokens": 1, "bad_words": ()}, None, None),
    ],
)
def test_a_text_ends_where_nothing_may_follow(
    pattern: str, asked: Any, finish: Finish | None, text: str | None, served: ServedModel, overlay: Overlay
) -> None:
    compiler = GrammarCompiler(served.tokenizer, served.manifest.config.tokens, served.manifest.end_tokens)
    grammar = asyncio.run(compiler.compiled("t", TextStructure("regex", pattern)))
    sampling = SamplingParams(**{"max_tokens": 9, "temperature": 0.0, **asked})
    outputs = outputs_of(engine_of(served), [GenerationRequest("r", "t", prompt(1), sampling, overlay, 0, grammar)])[
        "r"
    ]
    said = served.tokenizer.decode([token for token in tokens(outputs) if token not in ENDS])
    if text is not None:
        assert (outputs[-1].finish, said) == (finish, text)
    assert regex.fullmatch(pattern, said, partial=True)
    assert outputs[-1].finish in (Finish.STOP, Finish.LENGTH)
    assert len(outputs) >= min(asked.get("min_tokens", 0), len(said))


def test_a_text_that_no_token_is_left_for_ends_with_an_error_and_no_other_does(
    served: ServedModel, grammars: dict[str, CompiledGrammar], overlay: Overlay
) -> None:
    every = tuple((token,) for token in range(1, served.manifest.config.tokens))
    sampling = SamplingParams(max_tokens=9, temperature=0.0)
    stuck = replace(sampling, bad_words=every)
    requests = [
        GenerationRequest("stuck", "t", prompt(1), stuck, overlay, 0, grammars["schema"]),
        GenerationRequest(
            "drawn", "t", prompt(1), replace(stuck, temperature=1.0, seed=1), overlay, 0, grammars["any"]
        ),
        GenerationRequest("good", "t", prompt(1), sampling, overlay, 0, grammars["schema"]),
    ]
    made = outputs_of(engine_of(served), requests)
    assert [(o.token, o.finish) for o in made["stuck"]] == [(-1, Finish.NO_TOKEN)]
    assert "bad_words" in made["stuck"][0].why
    assert tokens(made["drawn"]) == [0]  # the end is allowed, and no bad word
    assert len(made["good"]) == 9

    async def asked() -> None:
        loop = EngineLoop(engine_of(served))
        try:
            with pytest.raises(NoTokenAllowed, match="bad_words"):
                async for _ in loop.generate(replace(requests[0], id="again")):
                    pass
            assert loop.healthy
        finally:
            await loop.stop()

    asyncio.run(asked())


def test_a_release_that_forbids_what_a_grammar_wants_ends_its_text(
    served: ServedModel, grammars: dict[str, Any]
) -> None:
    """Its forbidden tokens are −∞ among the logits, which are numbers all the same."""
    every = tuple(range(served.manifest.config.tokens - 1))
    revision = RevisionContent(served.manifest.fingerprint, (BiasEdit(every[: len(every) // 2], -math.inf),))
    rest = RevisionContent(served.manifest.fingerprint, (BiasEdit(every[len(every) // 2 :], -math.inf),))
    forbidding = Overlay.compile(ReleaseContent((revision, rest)), served.table)
    sampling = SamplingParams(max_tokens=9, temperature=0.0)
    request = GenerationRequest("r", "t", prompt(1), sampling, forbidding, 0, grammars["schema"])
    (output,) = outputs_of(engine_of(served), [request])["r"]
    assert output.finish is Finish.NO_TOKEN


def test_a_grammar_that_grows_too_complex_ends_its_text_with_the_librarys_words(
    served: ServedModel, overlay: Overlay
) -> None:
    """The library then allows the ends of texts: a text that is cut off must not pass for a whole one."""
    compiler = GrammarCompiler(served.tokenizer, served.manifest.config.tokens, served.manifest.end_tokens)
    grammar = asyncio.run(compiler.compiled("t", TextStructure("regex", r"(\w+\s?){1,500}")))
    sampling = SamplingParams(max_tokens=60, temperature=1.0, seed=1)
    outputs = outputs_of(engine_of(served), [GenerationRequest("r", "t", prompt(1), sampling, overlay, 0, grammar)])[
        "r"
    ]
    assert outputs[-1].finish is Finish.NO_TOKEN
    assert "too many expressions" in outputs[-1].why


def test_a_state_is_each_texts_own(grammars: dict[str, CompiledGrammar]) -> None:
    first, second = grammars["answer"].start(), grammars["answer"].start()
    before = second.allowed()
    first.add(int(np.flatnonzero(first.allowed())[0]))
    assert np.array_equal(second.allowed(), before)
    assert not np.array_equal(first.allowed(), before)
