"""Whether a grammar can be compiled: tried by a process of its own (`python -m` this module), which may be killed.

It reads a form and a text as JSON, and writes llguidance's own form of the grammar, or what is wrong with it. The
library bounds most of its work, but not all: a schema's `allOf` of n patterns takes it 2^n steps.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, grammar_from

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

SECONDS, BYTES = 2, 2**30
"""Processor time and memory that a compilation may take."""

WAIT = 30.0
"""Seconds after which a compilation is given up that doesn't get its processor time."""

LIMITS = LLParserLimits(step_lexer_fuel=50_000, verbose_errors=False)
"""Of one mask: with four times as much, the library's default, a bad regular expression held up a step for 40 ms."""

SPACING: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is written, unless a schema's own `x-guidance` says otherwise. Where any whitespace is allowed, as the
library would have it, small models write little else: smollm2 filled 100 tokens with it in five of six texts."""

_SHOWN = 300

_GRAMMARS: Mapping[str, Callable[[str], str]] = {
    "json_schema": lambda schema: LLMatcher.grammar_from_json_schema(schema, defaults=SPACING),
    "regex": LLMatcher.grammar_from_regex,
    "grammar": lambda text: grammar_from("grammar", text),
}


class GrammarError(Exception):
    """A grammar that can't be compiled: why, as the library says it."""


def check(form: str, text: str) -> str:
    """A grammar as llguidance takes it, once a process of its own could compile it. Blocks.

    Raises GrammarError.
    """
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            command, input=json.dumps([form, text]), capture_output=True, text=True, timeout=WAIT, check=False
        )
    except subprocess.TimeoutExpired:
        raise GrammarError(f"it wasn't compiled within {WAIT:g} s; make it simpler") from None
    if done.returncode < 0 or "MemoryError" in done.stderr:  # a signal, for a limit
        raise GrammarError(f"it takes more than {SECONDS} s or {BYTES >> 20} MiB to compile; make it simpler")
    if done.returncode:
        raise RuntimeError(f"grammars can't be compiled here: {done.stderr[-_SHOWN:]}")
    grammar, error = json.loads(done.stdout)
    if error:
        raise GrammarError(error)
    return str(grammar)


def shorten(error: str) -> str:
    """What is wrong, of a message of llguidance: the first line, or that of a regular expression's parser."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "it can't be followed")
    return said.removeprefix("error: ")[:_SHOWN]


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    form, text = json.load(sys.stdin)
    grammar = error = ""
    try:
        grammar = _GRAMMARS[form](text)
    except ValueError as refused:
        error = shorten(str(refused))
    else:
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
        error = shorten(messages[0]) if failed else ""
    json.dump([grammar, error], sys.stdout)


if __name__ == "__main__":
    _main()
