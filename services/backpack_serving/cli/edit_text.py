"""An edit as a line of text, such as `scale nurse:7 0`: what `backpack try` and `backpack steer` take."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace

from backpack_serving.client import Bias, Cells, Copy, Edit, Form, ProjectOut, Scale, Swap, Topic
from backpack_serving.client.edits import Tokens

ReadCells = Callable[[str], list[Cells]]


@dataclass(frozen=True, slots=True)
class _Syntax:
    """How one kind of edit is written, and how its words are read: `read` gets how cells are, and raises ValueError."""

    written: str
    example: str
    read: Callable[[ReadCells, list[str]], Edit]


def parse_edit(text: str, form: Form = "both", any_case: bool = False, tokens: Tokens = "single") -> Edit:
    """The edit that a line of text names, of these forms and tokens of its words.

    Raises ValueError, which shows how it is written.
    """
    try:
        kind, *words = shlex.split(text) or [""]
    except ValueError as error:
        raise ValueError(f"{text!r} is no edit: {error}; write {_all_forms()}") from None
    if kind not in _KINDS:
        raise ValueError(f"{text!r} is no edit: there is no kind {kind!r}; write {_all_forms()}")
    syntax = _KINDS[kind]
    if len(words) != len(syntax.written.split()):
        raise ValueError(f"{text!r} is no edit: write {kind} {syntax.written}, such as `{kind} {syntax.example}`")
    try:
        edit = syntax.read(lambda words: _cells(words, form, any_case, tokens), words)
    except ValueError as error:
        raise ValueError(f"{text!r} is no edit: {error}; write {kind} {syntax.written}") from None
    if isinstance(edit, Topic) and (any_case or form != "both" or tokens != "single"):
        options = "--form, --any-case and --tokens"
        raise ValueError(f"{text!r}: a topic has the first token of each word alone; leave out {options}")
    return replace(edit, form=form, any_case=any_case, tokens=tokens) if isinstance(edit, Bias) else edit


def sense_numbers(senses: str) -> list[int]:
    """The numbers of 3 or 8,12-14; none for all. Raises ValueError."""
    numbers: list[int] = []
    for part in filter(None, senses.split(",")):
        written = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if not written or int(written[2] or written[1]) < int(written[1]):
            raise ValueError(f"{part!r} names no sense; write 3 or 8,12-14")
        numbers.extend(range(int(written[1]), int(written[2] or written[1]) + 1))
    return numbers


def _cells(text: str, form: Form = "inner", any_case: bool = False, tokens: Tokens = "single") -> list[Cells]:
    """Words with commas between them, and the senses of each after a colon."""
    words, colon, senses = text.rpartition(":")
    if not (colon and words):
        words, senses = text, ""
    elif not senses:
        raise ValueError(f"{text!r} has a colon and no senses after it")
    numbers = tuple(sense_numbers(senses))
    return [Cells(word, numbers, tokens, form, any_case) for word in _split(words)]


def _split(words: str) -> list[str | int]:
    found = [","] if words == "," else words.split(",")
    if not all(found):
        raise ValueError(f"{words!r} has an empty word; a comma among others is #ID, as `backpack tokenize ,` has it")
    return list(map(_word, found))


def _word(text: str) -> str | int:
    """A word; `#ID` is the token with that id."""
    return int(text[1:]) if re.fullmatch(r"#[0-9]{1,9}", text) else text


def _decimal(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None


def _copy(cells: ReadCells, words: list[str]) -> Edit:
    source, *others = _cells(words[1])
    if others:
        raise ValueError(f"{words[1]!r} names {len(others) + 1} words to copy; name one")
    if len(source.senses) > 1:
        raise ValueError(f"{words[1]!r} names {len(source.senses)} senses to copy; name one, or none for the same ones")
    return Copy(cells(words[0]), source.word, *source.senses)


def _topic(cells: ReadCells, words: list[str]) -> Edit:
    if words[1] not in ("1", "2", "3"):
        raise ValueError(f"{words[1]!r} is no strength; it is 1, 2 or 3")
    return Topic(_split(words[0]), int(words[1]))


_KINDS = {
    "scale": _Syntax(
        "WORDS[:SENSES] FACTOR", "nurse:7 0", lambda cells, words: Scale(cells(words[0]), _decimal(words[1]))
    ),
    "copy": _Syntax("WORDS[:SENSES] SOURCE[:SENSE]", "king,queen ship", _copy),
    "swap": _Syntax(
        "WORDS[:SENSES] OLD NEW",
        "nurse she he",
        lambda cells, words: Swap(cells(words[0]), _word(words[1]), _word(words[2])),
    ),
    "project-out": _Syntax(
        "WORDS[:SENSES] DIRECTION", "nurse she", lambda cells, words: ProjectOut(cells(words[0]), _word(words[1]))
    ),
    "topic": _Syntax("WORDS STRENGTH", "sea,ship,captain 2", _topic),
    "bias": _Syntax("WORDS AMOUNT", "money -5", lambda cells, words: Bias(_split(words[0]), _decimal(words[1]))),
    "forbid": _Syntax("WORDS", "money,cash", lambda cells, words: Bias(_split(words[0]), -math.inf)),
}


def _all_forms() -> str:
    return ", ".join(f"`{kind} {syntax.example}`" for kind, syntax in _KINDS.items())
