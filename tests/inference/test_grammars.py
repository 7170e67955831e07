"""Grammars are compiled once, off the event loop, and refused in words that say what is wrong."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest
from backpack_lm.installed import folder_of
from backpack_lm.manifest import Manifest
from backpack_lm.tokenizer import Tokenizer
from backpack_serving.errors import InvalidRequest
from backpack_serving.inference import grammar_check, grammars
from backpack_serving.inference.grammar_check import check
from backpack_serving.inference.grammars import GrammarCompiler
from backpack_serving.sampling import TextStructure

FOLDER = folder_of("micro")
TOKENIZER, MANIFEST = Tokenizer.read(FOLDER / "tokenizer.json"), Manifest.read(FOLDER)


def compiler(**named: Any) -> GrammarCompiler:
    given = {"tokenizer": TOKENIZER, "tokens": MANIFEST.config.tokens, "ends": MANIFEST.end_tokens, **named}
    return GrammarCompiler(**given)


def refusal(structure: TextStructure, **named: Any) -> tuple[str, str, str]:
    with pytest.raises(InvalidRequest) as refused:
        asyncio.run(compiler(**named).compiled("t", structure))
    (violation,) = refused.value.violations
    return violation.field, violation.reason, violation.description


@pytest.mark.parametrize(
    ("form", "text", "says"),
    [
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around, including look-ahead and look-behind, is not supported"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", r"[^\s\S]", "it allows no text"),
        ("grammar", 'start: "a" foo', 'unknown name: "foo"'),
        ("grammar", "start: a\na: a", "it allows no text"),
        ("grammar", "nonsense", "Failed to convert the grammar from GBNF to Lark"),
        ("grammar", "start: " + "(" * 8000 + '"a"' + ")" * 8000, "too deeply nested"),
        ("json_schema", '{"type": "foo"}', "Invalid type: foo"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', 'Unimplemented keys: ["uniqueItems"]'),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 4}', "minimum (5) is greater than maximum (4)"),
        ("json_schema", '{"$ref": "http://127.0.0.1/x"}', "does not fetch resources"),
    ],
)
def test_what_cant_be_compiled_is_refused_by_its_field(form: Any, text: str, says: str) -> None:
    field, reason, description = refusal(TextStructure(form, text))
    assert (field, reason) == (f"sampling.{form}", "BAD_GRAMMAR")
    assert says in description
    assert len(description) < 400


def test_what_would_take_forever_is_ended() -> None:
    """n patterns of an `allOf` take the library 2^n steps: these, some hours."""
    schema = {"allOf": [{"type": "string", "pattern": f"^.*a{n}.*$"} for n in range(30)]}
    began = time.monotonic()
    _, _, description = refusal(TextStructure("json_schema", json.dumps(schema)))
    assert description == "it takes more than 2 s or 1024 MiB to compile; make it simpler"
    assert time.monotonic() - began < grammar_check.WAIT


def test_a_process_that_gets_no_time_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "WAIT", 0.001)
    assert refusal(TextStructure("regex", "a"))[2] == "it wasn't compiled within 0.001 s; make it simpler"


def test_the_same_is_compiled_once_and_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def check(form: str, text: str) -> str:
        checked.append(text)
        return grammar_check.check(form, text)

    monkeypatch.setattr(grammars, "check", check)
    monkeypatch.setattr(grammars, "KEPT", 2)

    async def ask() -> None:
        one = compiler()
        same = await asyncio.gather(*(one.compiled(f"t{n}", TextStructure("regex", "a")) for n in range(3)))
        assert same[0] is same[1] is same[2]
        for _ in range(2):
            with pytest.raises(InvalidRequest):
                await one.compiled("t", TextStructure("regex", "(a"))
        await one.compiled("t", TextStructure("regex", "a"))  # newest again
        await one.compiled("t", TextStructure("regex", "b"))
        await one.compiled("t", TextStructure("regex", "a"))
        assert checked == ["a", "(a", "b"]
        with pytest.raises(InvalidRequest):
            await one.compiled("t", TextStructure("regex", "(a"))
        assert checked == ["a", "(a", "b", "(a"]

    asyncio.run(ask())


def test_what_compiles_is_waited_for_though_who_asked_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = [0]

    def check(form: str, text: str) -> str:
        running.append(running[-1] + 1)
        time.sleep(0.2)
        running.append(running[-1] - 1)
        return grammar_check.check(form, text)

    monkeypatch.setattr(grammars, "check", check)

    async def ask() -> None:
        one = compiler()
        for n in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(one.compiled("t", TextStructure("regex", f"a{n}")), 0.01)
        await one.compiled("t", TextStructure("regex", "b"))

    asyncio.run(ask())
    assert max(running) == 1


def test_a_process_that_fails_is_our_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "__name__", "backpack_serving.nowhere")
    with pytest.raises(RuntimeError, match="No module named"):
        grammar_check.check("regex", "a")


def test_the_event_loop_goes_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled waits for a signal here, which only a loop that goes on can give."""
    went_on = threading.Event()

    def check_and_wait(form: str, text: str) -> str:
        assert went_on.wait(10), "the loop stands still"
        return check(form, text)

    monkeypatch.setattr("backpack_serving.inference.grammars.check", check_and_wait)

    async def ask() -> None:
        compiling = asyncio.ensure_future(compiler().compiled("t", TextStructure("regex", "( [a-z]+){3}")))
        await asyncio.sleep(0.01)
        went_on.set()
        await compiling

    asyncio.run(ask())


def test_marks_are_no_words_and_padding_is_no_token() -> None:
    """A model may have more logits than its tokenizer has tokens, or fewer, and other ends, or none."""
    anything = TextStructure("regex", "(?s:.*)")

    def allowed(**named: Any) -> Any:
        return asyncio.run(compiler(**named).compiled("t", anything)).start().allowed()

    mask = allowed(tokens=TOKENIZER.vocab_size + 7)
    assert len(mask) == TOKENIZER.vocab_size + 7
    assert not mask[TOKENIZER.vocab_size :].any()
    assert mask[0]
    assert len(allowed(tokens=5000)) == 5000
    several = allowed(ends={0, 17})
    assert several[0]
    assert several[17]
    none = allowed(ends=())
    assert len(none) == MANIFEST.config.tokens
    assert not none[0]  # it is special, and ends nothing
    assert none[1:].sum() == mask[1:].sum()


def test_an_end_within_a_text_ends_nothing() -> None:
    grammar = asyncio.run(compiler().compiled("t", TextStructure("grammar", 'start: "a" <|endoftext|> "b"'))).start()
    grammar.add(TOKENIZER.encode("a")[0])
    assert not grammar.allowed().any()
    assert not grammar.complete


def test_json_is_written_as_python_writes_it_unless_the_schema_says_otherwise() -> None:
    def begins(schema: Any, text: str) -> bool:
        state = asyncio.run(compiler().compiled("t", TextStructure("json_schema", json.dumps(schema)))).start()
        for token in TOKENIZER.encode(text):
            if not state.allowed()[token]:
                return False
            state.add(token)
        return True

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert begins(schema, '{"a": 1, "b": [1, {}]}')
    free = {"whitespace_flexible": True, "item_separator": ",", "key_separator": ":"}
    assert not begins(schema, '{"a":1')
    assert not begins(schema, '{\n"a"')
    assert begins({**schema, "x-guidance": free}, '{\n"a" :1}')
