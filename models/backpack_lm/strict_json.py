"""JSON that a person or another program wrote, read so that nothing in it is lost without a word.

Python's reader lets the last of two equal keys win, takes NaN and half a character, and ends in a RecursionError
where brackets nest deeply. Here each of these is a JsonError. A byte order mark, as editors on Windows write one,
is skipped.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

UTF8 = "utf-8-sig"
"""How text files of others are decoded: UTF-8, with a byte order mark or without."""

_LFS = b"version https://git-lfs.github.com/spec/"


class JsonError(ValueError):
    """Text that isn't JSON, or that readers of JSON would understand differently."""


def read(path: Path, finite: bool = True) -> Any:
    """The value in a JSON file, as `parse` reads it. Raises OSError, and JsonError without the file's name."""
    data = path.read_bytes()
    if is_lfs_pointer(data):
        raise JsonError(f"it is a git-lfs pointer, not the file itself; run `git lfs pull` in {path.parent}")
    return parse(data, finite)


def parse(text: str | bytes, finite: bool = True) -> Any:
    """The value that a JSON text holds. With `finite=False`, NaN and Infinity are numbers, as Python writes them.

    Raises JsonError, naming the line and column or the key.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode(UTF8)
        except UnicodeDecodeError as error:
            raise JsonError(f"it isn't UTF-8 text: byte {error.start} is 0x{text[error.start]:02x}") from None
    text = text.removeprefix("\ufeff")
    checked: dict[str, Any] = {"parse_constant": _not_finite, "parse_float": _parse_finite} if finite else {}
    try:
        value = json.loads(text, object_pairs_hook=_object, **checked)
    except JsonError:
        raise
    except json.JSONDecodeError as error:
        raise JsonError(str(error)) from None  # "Expecting value: line 1 column 6 (char 5)"
    except RecursionError:
        raise JsonError("its brackets nest too deeply") from None
    except ValueError:  # what is left of ValueErrors: Python reads no whole number of thousands of digits
        raise JsonError("it holds a whole number of more digits than can be read") from None
    if "\\ud" in text or "\\uD" in text:  # half a character can only be spelled out
        _check_characters(value)
    return value


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that starts so stands for one that git-lfs didn't fetch."""
    return start.startswith(_LFS)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"{twice!r} stands twice in one object; leave the one that is meant")
    return found


def _not_finite(name: str) -> NoReturn:
    raise JsonError(f"{name} is no number of JSON's")


def _parse_finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise JsonError(f"{digits[:40]} is more than a number can be")
    return value


def _check_characters(value: Any) -> None:
    """Raise JsonError if a string in there, at any depth, can't be UTF-8."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            todo += one
        elif isinstance(one, str) and not _is_text(one):
            raise JsonError(f"{one[:40]!r} holds half a character (a lone surrogate)")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
