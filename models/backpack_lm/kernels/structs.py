"""The structures that Python and the compiled library share, and the check that both lay them out alike.

Each is declared twice: here, and in a header of cpp/ under the name in `LAYOUTS`. ctypes checks nothing, so a field
that only one side has would make the library read memory that isn't there. `check_layouts` compares both sides when
the library is loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from backpack_lm.kernels.caches import TokenSpan

Layout: TypeAlias = tuple[int, tuple[tuple[str, int, int], ...]]
"""A structure's size in bytes, and its fields: (name, offset, size)."""


class LayoutMismatch(Exception):
    """Python and the compiled library disagree about a structure: a mistake in our sources, so nothing falls back."""


def _pointers(*names: str) -> tuple[tuple[str, type[ctypes.c_void_p]], ...]:
    return tuple((name, ctypes.c_void_p) for name in names)


def _ints(*names: str) -> tuple[tuple[str, type[ctypes.c_int]], ...]:
    return tuple((name, ctypes.c_int) for name in names)


class Lists(ctypes.Structure):
    _fields_ = (*_pointers("starts", "words"), *_ints("context", "vocabulary"))


class PageTable(ctypes.Structure):
    _fields_ = (*_pointers("pages"), *_ints("each", "size"))


class MixState(ctypes.Structure):
    _fields_ = (
        *_pointers("table", "embedding", "rows", "ids", "previous", "following", "annealed_sum", "alpha", "parts"),
        ("lists", Lists),
        *_pointers("topics"),
        ("pages", PageTable),
        *_ints("senses", "width", "context", "slots"),
    )


class AppendTargets(ctypes.Structure):
    _fields_ = (*_pointers("ids", "rows", "previous", "following"), *_ints("senses", "context"))


class Matrix(ctypes.Structure):
    _fields_ = _pointers("weights", "bias")


class Norm(ctypes.Structure):
    _fields_ = _pointers("gain", "bias")


class LayerTable(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("qkv", "proj", "fc", "out")),
        *((name, Norm) for name in ("middle", "after")),
        *_pointers("keys", "values"),
        ("scale", ctypes.c_float),
    )


class Tap(ctypes.Structure):
    _fields_ = (("norm", Norm), *_ints("layer", "query_part", "key_part"))


class TrunkState(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(LayerTable)),
        ("taps", ctypes.POINTER(Tap)),
        *((name, Matrix) for name in ("together", "query", "key")),
        ("first", Norm),
        *_pointers("tokens", "positions", "turns", "sense_turns", "sense_keys", "seconds"),
        ("pages", PageTable),
        *_ints("count", "width", "heads", "groups", "head_width", "inner", "gated"),
        *_ints("senses", "sense_width", "tapped", "query_states", "key_states"),
        ("epsilon", ctypes.c_float),
    )


class NewTokens(ctypes.Structure):
    _fields_ = _pointers("tokens", "slots", "positions")


TOPIC = np.dtype([("levels", "u8"), ("multipliers", "f4", 4), ("scale", "f4"), ("annealed", "i4")])
"""A `TopicMultipliers`. `levels` is an address in the memory of the topic's device."""

DRAW_PARAMS = np.dtype(
    [("seed", "u8"), ("top_p", "f8"), ("position", "i4"), ("top_k", "i4"), ("temperature", "f4")], align=True
)
"""A `DrawParams`."""

PREDICTION = np.dtype([(name, "i4") for name in ("slot", "length", "fresh", "topics", "first_topic")])
"""A `MixSpan`: how many topics it has, and where the first of them stands among those of all predictions."""

SPAN = np.dtype([(name, "i4") for name in TokenSpan._fields])
"""A `TokenSpan`."""

LAYOUTS: Mapping[str, type[ctypes.Structure] | np.dtype[np.void]] = {
    "AppendTargets": AppendTargets,
    "DrawParams": DRAW_PARAMS,
    "Layer": LayerTable,
    "Lists": Lists,
    "Matrix": Matrix,
    "Mix": MixState,
    "NewTokens": NewTokens,
    "Norm": Norm,
    "PageTable": PageTable,
    "Prediction": PREDICTION,
    "Span": SPAN,
    "Tap": Tap,
    "Topic": TOPIC,
    "Trunk": TrunkState,
}
"""By their names in cpp/layouts.h."""


def layout(structure: type[ctypes.Structure] | np.dtype[np.void]) -> Layout:
    """How Python lays out a structure."""
    if isinstance(structure, np.dtype):
        fields = [(name, structure.fields[name]) for name in structure.names or () if structure.fields]
        return structure.itemsize, tuple((name, found[1], found[0].itemsize) for name, found in fields)
    described = ((field[0], getattr(structure, field[0])) for field in structure._fields_)
    return ctypes.sizeof(structure), tuple((name, field.offset, field.size) for name, field in described)


def reported_layouts(library: ctypes.CDLL) -> dict[str, Layout]:
    """How the compiled library lays out each of its structures: lines `Name size field:offset:size …`."""
    library.layouts.restype = ctypes.c_char_p
    found: dict[str, Layout] = {}
    for line in library.layouts().decode().splitlines():
        name, size, *fields = line.split()
        parts = (field.split(":") for field in fields)
        found[name] = int(size), tuple((field, int(at), int(width)) for field, at, width in parts)
    return found


def check_layouts(library: ctypes.CDLL) -> None:
    """Raises LayoutMismatch, naming the structure and both layouts, where Python and the library differ."""
    reported = reported_layouts(library)
    for name in sorted({*reported, *LAYOUTS}):
        here = layout(LAYOUTS[name]) if name in LAYOUTS else None
        if (there := reported.get(name)) != here:
            raise LayoutMismatch(
                f"{name} is {_written(here)} in kernels/structs.py, but {_written(there)} in the compiled library; "
                "give both sides the same fields (structs.py, and the header that cpp/layouts.h names)"
            )


def _written(found: Layout | None) -> str:
    if found is None:
        return "missing"
    size, fields = found
    return f"{size} bytes [{', '.join(f'{name} {width} B at {at}' for name, at, width in fields)}]"


class SpanArray:
    """Spans of new tokens as the library reads them.

    All layers of a step pass the same list, so the last one is kept and recognized by its identity.
    """

    def __init__(self) -> None:
        self._last: tuple[Sequence[TokenSpan], np.ndarray] = (), np.empty(0)

    def pointer(self, spans: Sequence[TokenSpan]) -> ctypes.c_void_p:
        """Their address: valid until the next call."""
        if spans is not self._last[0]:
            self._last = spans, np.array(spans, dtype=np.int32)
        return self._last[1].ctypes.data_as(ctypes.c_void_p)
