"""A revision as bytes: the same bytes for the same revision on every machine, and only for it.

Its digest is their SHA-256. Little-endian throughout: magic, fingerprint [32], number of edits, then for each
edit its kind (one byte) and its fields; cells and vectors are preceded by their count (4 bytes).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from backpack_lm.edits import (
    AddEdit,
    BiasEdit,
    Cell,
    CopyEdit,
    Edit,
    PatchError,
    ProjectOutEdit,
    ScaleEdit,
    SetEdit,
    SwapEdit,
    TopicEdit,
    Vector,
    Violation,
)

_MAGIC = b"backpack.revision.v1\n"
_CELL = struct.Struct("<II")
_COUNT = struct.Struct("<I")


def encode(fingerprint: str, edits: Sequence[Edit]) -> bytes:
    """The canonical bytes of a revision. Raises PatchError for a number that has no place in them."""
    try:
        parts = [_MAGIC, bytes.fromhex(fingerprint), _COUNT.pack(len(edits))]
        for edit in edits:
            parts.append(struct.pack("<B", edit.KIND))
            parts.extend(_encode_edit(edit))
        return b"".join(parts)
    except struct.error as error:
        raise PatchError(
            Violation("edits", "OUT_OF_RANGE", f"an id, sense or factor can't be stored: {error}")
        ) from None


def _encode_edit(edit: Edit) -> Iterator[bytes]:
    if isinstance(edit, TopicEdit):
        yield struct.pack("<B?I", edit.strength, edit.annealed, len(edit.tokens))
        yield struct.pack(f"<{len(edit.tokens)}I", *edit.tokens)
        return
    if isinstance(edit, BiasEdit):
        yield struct.pack("<dI", edit.amount + 0.0, len(edit.tokens))
        yield struct.pack(f"<{len(edit.tokens)}I", *edit.tokens)
        return
    yield _COUNT.pack(len(edit.cells))
    for cell in edit.cells:
        yield _CELL.pack(cell.token, cell.sense)
    if isinstance(edit, ScaleEdit):
        yield struct.pack("<d", edit.factor + 0.0)
    elif isinstance(edit, AddEdit | SetEdit):
        vector = edit.delta if isinstance(edit, AddEdit) else edit.vector
        yield _COUNT.pack(len(vector))
        yield bytes(vector)
    elif isinstance(edit, CopyEdit):
        yield struct.pack("<Ii", edit.source, -1 if edit.source_sense is None else edit.source_sense)
    elif isinstance(edit, ProjectOutEdit):
        yield _COUNT.pack(edit.direction)
    else:
        yield _CELL.pack(edit.old, edit.new)


class _Reader:
    """Takes fields off the front of canonical bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise PatchError(Violation("blob", "CORRUPT", f"ends early, at byte {len(self.data)}"))
        self.at += size
        return self.data[self.at - size : self.at]

    def unpack(self, form: str) -> tuple[int | float | bool, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def count(self) -> int:
        return int(_COUNT.unpack(self.take(4))[0])

    def tokens(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self.take(4 * count))

    def cell(self) -> Cell:
        return Cell(*_CELL.unpack(self.take(8)))


def decode(data: bytes) -> tuple[str, tuple[Edit, ...]]:
    """Fingerprint and edits of canonical bytes. Raises PatchError if they are anything else."""
    reader = _Reader(data)
    if reader.take(len(_MAGIC)) != _MAGIC:
        raise PatchError(Violation("blob", "CORRUPT", "not a patch revision (wrong header)"))
    fingerprint = reader.take(32).hex()
    edits = tuple(_decode_edit(reader) for _ in range(reader.count()))
    if reader.at != len(data):
        raise PatchError(Violation("blob", "CORRUPT", f"{len(data) - reader.at} bytes after the last edit"))
    return fingerprint, edits


def _decode_edit(reader: _Reader) -> Edit:
    (kind,) = reader.take(1)
    if kind == TopicEdit.KIND:
        strength, annealed, count = reader.unpack("<BBI")
        if annealed > 1:
            raise PatchError(Violation("blob", "CORRUPT", f"a flag is {annealed}, neither 0 nor 1"))
        return TopicEdit(reader.tokens(int(count)), int(strength), bool(annealed))
    if kind == BiasEdit.KIND:
        amount, count = reader.unpack("<dI")
        return BiasEdit(reader.tokens(int(count)), float(amount))
    cells = tuple(reader.cell() for _ in range(reader.count()))
    match kind:
        case ScaleEdit.KIND:
            return ScaleEdit(cells, float(reader.unpack("<d")[0]))
        case AddEdit.KIND:
            return AddEdit(cells, Vector(reader.take(reader.count())))
        case SetEdit.KIND:
            return SetEdit(cells, Vector(reader.take(reader.count())))
        case CopyEdit.KIND:
            source, sense = map(int, reader.unpack("<Ii"))
            if sense < -1:
                raise PatchError(Violation("blob", "CORRUPT", f"sense {sense}"))
            return CopyEdit(cells, source, None if sense < 0 else sense)
        case ProjectOutEdit.KIND:
            return ProjectOutEdit(cells, reader.count())
        case SwapEdit.KIND:
            return SwapEdit(cells, reader.count(), reader.count())
    raise PatchError(Violation("blob", "UNKNOWN_KIND", f"edit kind {kind}"))
