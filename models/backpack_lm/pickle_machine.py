"""Pickles, understood without running anything.

A pickle is a program for a small machine with a stack. Python's own machine imports what the program names and
calls it. This one can't: it makes numbers, texts, lists, tuples and dicts, and notes where a tensor's numbers lie.
What else a program names, a class of Lightning's or omegaconf's, becomes an `Inert`, which has a name and nothing
else. Time and memory grow with the pickle's length, not with what it claims.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from math import prod
from typing import Any

_DANGEROUS = frozenset(
    "os posix nt sys io _io subprocess shutil socket pty ctypes importlib runpy code codeop marshal pickle "
    "_pickle cloudpickle dill webbrowser multiprocessing threading signal".split()
)
_HARMLESS = frozenset(
    "bool bytearray bytes complex dict float frozenset int list object set slice str tuple type range getattr "
    "NoneType Ellipsis NotImplemented".split()
)
"""What of `builtins` is pickled in good faith: types, and `getattr`, by which Python spells members of an Enum."""


class BadPickle(ValueError):
    """A pickle that can't be read, or that only an attack would need to be run."""


@dataclass(frozen=True, slots=True)
class Inert:
    """Something that a pickle names, and that is neither imported nor called."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Numbers kept outside of the pickle under a key. `kind` is torch's class, as in "FloatStorage"."""

    key: str
    kind: str
    count: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in its storage, in numbers, not in bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_within(self) -> bool:
        """Whether it has no number beyond its storage, nor more of them than there are."""
        numbers = prod(self.shape)
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return numbers == 0 or (numbers <= self.storage.count and last < self.storage.count)


def unpickle(data: bytes | bytearray) -> Any:
    """What a pickle of `torch.save` holds. Raises BadPickle."""
    machine = _Machine()
    try:
        with warnings.catch_warnings(action="ignore"):  # of texts that are spelled wrongly
            for opcode, argument, _ in pickletools.genops(BytesIO(data)):
                if opcode.name == "STOP":
                    return machine.pop()
                machine.step(opcode.name, argument)
    except BadPickle:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise BadPickle(f"it is damaged ({type(error).__name__})") from None
    raise BadPickle("it is cut off")


class _Mark:
    """Where a group of values begins on the stack."""


_MARK = _Mark()
_PUSHED = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_VALUES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Inert("builtins.set"),
    "MARK": lambda: _MARK,
}


class _Machine:
    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise BadPickle("it is damaged (a mark is no value)")
        return value

    def step(self, name: str, argument: Any) -> None:
        push, pop = self._stack.append, self.pop
        if name in _PUSHED:
            push(argument)
        elif name in _VALUES:
            push(_VALUES[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "POP":
            self._stack.pop()
        elif name == "POP_MARK":
            self._group()
        elif name == "DUP":
            push(self._top())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._top()
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            push(self._memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            push(tuple([pop() for _ in range(int(name[-1]))][::-1]))
        elif name == "TUPLE":
            push(tuple(self._group()))
        elif name == "LIST":
            push(self._group())
        elif name == "DICT":
            push(_set_items({}, self._group()))
        elif name == "FROZENSET":
            self._group()
            push(Inert("builtins.frozenset"))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [pop()] if name == "APPEND" else self._group()
            if isinstance(self._top(), list):
                self._top().extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [pop(), pop()][::-1] if name == "SETITEM" else self._group()
            if isinstance(self._top(), dict):
                _set_items(self._top(), items)
        elif name == "GLOBAL":
            push(_inert_global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = pop(), pop()
            push(_inert_global(module, attribute))
        elif name == "INST":
            self._group()
            push(_inert_global(*argument.split(" ", 1)))
        elif name == "OBJ":
            group = self._group()
            push(_called(group[0], tuple(group[1:])))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = pop(), pop()
            push(_called(function, arguments))
        elif name == "NEWOBJ_EX":
            pop()
            arguments, function = pop(), pop()
            push(_called(function, arguments))
        elif name == "BUILD":
            pop()  # the state of an object: nothing here has any
            self._top()
        elif name == "BINPERSID":
            push(_storage(pop()))
        else:
            raise BadPickle(f"it has an instruction that torch.save doesn't write ({name})")

    def _top(self) -> Any:
        self._stack.append(value := self.pop())
        return value

    def _group(self) -> list[Any]:
        """All above the last mark, which goes too."""
        found = []
        while (value := self._stack.pop()) is not _MARK:
            found.append(value)
        return found[::-1]


def _set_items(into: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            key = Inert(f"a key of type {type(key).__name__}")  # to hash a tuple of tuples may take for ever
        elif key in into:
            raise BadPickle(f"{key[:100]!r} stands in it twice")
        into[key] = value
    return into


def _inert_global(module: Any, name: Any) -> Inert:
    """Raises BadPickle for what only an attack names."""
    if not (isinstance(module, str) and isinstance(name, str)):
        raise BadPickle("it is damaged (a name isn't text)")
    found = Inert(f"{module}.{name}"[:200])
    builtin = module in ("builtins", "__builtin__")
    if module.split(".")[0] in _DANGEROUS or (builtin and name not in _HARMLESS):
        raise BadPickle(f"Python would call {found.name}, which no checkpoint needs; nothing was called")
    return found


def _called(function: Any, arguments: Any) -> Any:
    """What the call of something named would give: a tensor or a dict, or else something inert."""
    if not isinstance(function, Inert) or not isinstance(arguments, tuple):
        raise BadPickle("it is damaged (it calls what can't be called)")
    if function.name == "torch._utils._rebuild_from_type_v2" and len(arguments) > 2:  # a tensor with attributes
        function, arguments = arguments[0], arguments[2]
        if not isinstance(function, Inert) or not isinstance(arguments, tuple):
            raise BadPickle("it is damaged (it calls what can't be called)")
    if function.name == "collections.OrderedDict" and not arguments:
        return {}
    if function.name.startswith("torch._utils._rebuild_parameter") and arguments:
        return arguments[0]
    if function.name == "torch._utils._rebuild_tensor_v2" and len(arguments) >= 4:
        storage, offset, shape, stride = arguments[:4]
        sizes = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 16
        if isinstance(storage, Storage) and sizes and all(map(_is_natural, (offset, *shape, *stride))):
            return StoredTensor(storage, offset, shape, stride)
        raise BadPickle("it is damaged (a tensor lies nowhere)")
    return function


def _storage(identity: Any) -> Storage:
    """What torch writes of a storage: ("storage", its class, its key, its device, how many numbers)."""
    if isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage":
        kind, key, count = identity[1], identity[2], identity[4]
        if isinstance(kind, Inert) and isinstance(key, str) and _is_natural(count):
            return Storage(key, kind.name.removeprefix("torch."), count)
    raise BadPickle("it is damaged (a storage is none)")


def _is_natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62
