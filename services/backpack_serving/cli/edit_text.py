"""An edit as a line of text, such as `scale nurse:7 0`: what `backpack try` and `backpack steer` take."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from backpack_serving.client import Bias, Cells, Copy, Edit, ProjectOut, Scale, Swap, Topic


@dataclass(frozen=True, slots=True)
class _Form:
    """How one kind of edit is written, and how its words are read. `read` raises ValueError."""

    written: str
    example: str
    read: Callable[[list[str]], Edit]


def parse_edit(text: str) -> Edit:
    """The edit that a line of text names. Raises ValueError, which shows how it is written."""
    try:
        kind, *words = shlex.split(text) or [""]
    except ValueError as error:
        raise ValueError(f"{text!r} is no edit: {error}; write {_all_forms()}") from None
    if kind not in _FORMS:
        raise ValueError(f"{text!r} is no edit: there is no kind {kind!r}; write {_all_forms()}")
    form = _FORMS[kind]
    if len(words) != len(form.written.split()):
        raise ValueError(f"{text!r} is no edit: write {kind} {form.written}, such as `{kind} {form.example}`")
    try:
        return form.read(words)
    except ValueError as error:
        raise ValueError(f"{text!r} is no edit: {error}; write {kind} {form.written}") from None


def sense_numbers(senses: str) -> list[int]:
    """The numbers of 3 or 8,12-14; none for all. Raises ValueError."""
    numbers: list[int] = []
    for part in filter(None, senses.split(",")):
        written = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if not written or int(written[2] or written[1]) < int(written[1]):
            raise ValueError(f"{part!r} names no sense; write 3 or 8,12-14")
        numbers.extend(range(int(written[1]), int(written[2] or written[1]) + 1))
    return numbers


def _cells(text: str) -> list[Cells]:
    """Words with commas between them, and the senses of each after a colon."""
    words, colon, senses = text.rpartition(":")
    if not (colon and words):
        words, senses = text, ""
    elif not senses:
        raise ValueError(f"{text!r} has a colon and no senses after it")
    numbers = tuple(sense_numbers(senses))
    return [Cells(word, numbers) for word in _split(words)]


def _split(words: str) -> list[str]:
    found = words.split(",")
    if not all(found):
        raise ValueError(f"{words!r} has an empty word")
    return found


def _decimal(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None


def _copy(words: list[str]) -> Edit:
    source, *others = _cells(words[1])
    if others:
        raise ValueError(f"{words[1]!r} names {len(others) + 1} words to copy; name one")
    if len(source.senses) > 1:
        raise ValueError(f"{words[1]!r} names {len(source.senses)} senses to copy; name one, or none for the same ones")
    return Copy(_cells(words[0]), source.word, *source.senses)


def _topic(words: list[str]) -> Edit:
    if words[1] not in ("1", "2", "3"):
        raise ValueError(f"{words[1]!r} is no strength; it is 1, 2 or 3")
    return Topic(_split(words[0]), int(words[1]))


_FORMS = {
    "scale": _Form("WORDS[:SENSES] FACTOR", "nurse:7 0", lambda words: Scale(_cells(words[0]), _decimal(words[1]))),
    "copy": _Form("WORDS[:SENSES] SOURCE[:SENSE]", "king,queen ship", _copy),
    "swap": _Form("WORDS[:SENSES] OLD NEW", "nurse she he", lambda words: Swap(_cells(words[0]), *words[1:])),
    "project-out": _Form("WORDS[:SENSES] DIRECTION", "nurse she", lambda words: ProjectOut(_cells(words[0]), words[1])),
    "bias": _Form("WORDS AMOUNT", "money -5", lambda words: Bias(_split(words[0]), _decimal(words[1]))),
    "forbid": _Form("WORDS", "money,cash", lambda words: Bias(_split(words[0]), -math.inf)),
    "topic": _Form("WORDS STRENGTH", "sea,ship,captain 2", _topic),
}


def _all_forms() -> str:
    return ", ".join(f"`{kind} {form.example}`" for kind, form in _FORMS.items())
