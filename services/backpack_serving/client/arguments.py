"""Checks arguments of client methods, and builds messages from them. Nothing else builds a message.

`checked` wraps every public method of a client. It refuses values that no message field can hold, and times that no
call can wait. `build` makes a message, and names the field that can't hold its value. The server validates the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import isasyncgenfunction, iscoroutinefunction, signature
from typing import Any, TypeVar

from backpack_serving.errors import InvalidRequest

M = TypeVar("M")

LONGEST = 365 * 86_400.0
"""Longest wait in seconds. gRPC takes 285 years and more for a deadline in the past."""

_DURATIONS = {"timeout", "wait_seconds", "seconds", "coalesce", "retry_window"}

_EDITS = {"draft", "edits"}
"""What holds edits. They are checked where their messages are built, under the names that the server has for them; it
knows best which numbers they may have."""

_SHOWN = 60
"""Most characters of a value in an error."""


def checked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method so that it first raises InvalidRequest for unusable arguments."""
    known = signature(method)

    def check(args: Any, named: Any) -> None:
        for name, value in known.bind(*args, **named).arguments.items():
            if name != "self":
                _check(name, value)

    if iscoroutinefunction(method):

        @wraps(method)
        async def call(*args: Any, **named: Any) -> Any:
            check(args, named)
            return await method(*args, **named)

        return call

    @wraps(method)
    def stream(*args: Any, **named: Any) -> Any:
        check(args, named)
        return method(*args, **named)

    return stream


def is_public(name: str, method: object) -> bool:
    """Whether a class attribute is a public coroutine or asynchronous generator."""
    return not name.startswith("_") and (iscoroutinefunction(method) or isasyncgenfunction(method))


def seconds(name: str, value: Any) -> None:
    """Raise InvalidRequest unless this is a time in seconds that a call can wait."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LONGEST:
        raise invalid_argument(name, value, f"no request can wait for that; write seconds, from 0 to {LONGEST:.0f}")


def build(kind: type[M], at: str = "", /, **values: Any) -> M:
    """A message with these fields; None leaves one out. `at` is what the message itself is called, if anything.

    Raises InvalidRequest, naming the field, for a value that it can't hold.
    """
    try:
        message = kind(**values)
    except (TypeError, ValueError, OverflowError):
        for name, value in values.items():
            _fit(kind, name, value, f"{at}.{name}" if at else name)
        raise
    for name, value in values.items():
        # Of 64 bits, a number may be too large for the field's 32, which makes it infinite.
        if isinstance(value, float) and math.isfinite(value) and math.isinf(getattr(message, name)):
            raise invalid_argument(f"{at}.{name}" if at else name, value, "no request can hold this")
    return message


def fill(message: Any, at: str = "", /, **values: Any) -> None:
    """Set fields of an existing message, as `build` does."""
    message.MergeFrom(build(type(message), at, **values))


@contextmanager
def within(at: str) -> Iterator[None]:
    """Prefix the fields of InvalidRequest errors from the block with `at`."""
    try:
        yield
    except InvalidRequest as error:
        raise error.within(at) from None


def _check(name: str, value: Any) -> None:
    if name.rpartition(".")[2] in _EDITS:
        return
    if isinstance(value, str):
        _check_text(name, value)
    elif name in _DURATIONS:
        if value is not None:
            seconds(name, value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise invalid_argument(name, value, "no request can hold this; write a finite number")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise invalid_argument(name, value, "no request can hold a number of more than 64 bits")
    elif is_dataclass(value):
        for field in fields(value):
            _check(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _check(f"{name}[{key!r}]", each)
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        for at, each in enumerate(value):
            _check(f"{name}[{at}]", each)


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        why = f"character {error.start} is half of one (a lone surrogate), which no request can hold"
        raise invalid_argument(name, text[max(0, error.start - 20) :], why) from None


def _fit(kind: type[Any], name: str, value: Any, called: str) -> None:
    """Raise InvalidRequest if the field can't hold the value, or one of several."""
    parts = [(called, value)]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        parts = [(f"{called}[{at}]", [each]) for at, each in enumerate(value)]
    for part, one in parts:
        try:
            kind(**{name: one})
        except (TypeError, ValueError, OverflowError) as error:
            each = one if one is value else one[0]
            raise invalid_argument(part, each, f"no request can hold this: {error}") from None


def invalid_argument(name: str, value: Any, fix: str) -> InvalidRequest:
    """The refusal of a value that is an argument's or a field's, or is in one."""
    shown = f"{value:#x}" if isinstance(value, int) and abs(value) >= 2**64 else repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return InvalidRequest.at(name, "OUT_OF_RANGE", f"{shown}; {fix}")
