"""What a patch to the sense vectors means: edits, revisions, releases, and their digests.

An edit acts on selected cells of the sense table, a cell being one (token, sense) pair with its
vector v = C(token)_sense of width d. A `Revision` is an immutable ordered list of edits bound to one
model; a `Release` is an immutable ordered list of revisions. Edits apply in order, each to what the
one before it left. Topic edits are the exception: they multiply whatever vector the other edits
leave in a cell, because their multipliers come from the unedited model (BACKPACK.md, section 2).

Everything here is standard library: the intervention service reads it without torch.

Errors: every refusal is a `PatchError`, which names the field, the offending value and the fix.
"""

from __future__ import annotations

import hashlib
import math
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

COMPOSITION_VERSION = 1
"""Version of the composition rules above. It is part of every release digest: a release keeps its
meaning only under the rules it was made for."""

TOPIC_QUANTILES = (0.95, 0.80, 0.60)
TOPIC_MULTIPLIERS: dict[int, tuple[float, float, float, float]] = {
    1: (1.5, 1.5, 1.3, 1.0),
    2: (2.2, 2.2, 1.5, 1.0),
    3: (3.3, 3.3, 3.0, 1.0),
}
"""Multiplier of a cell whose topic score lies above the .95, .80, .60 quantile, and below them all."""

FLOAT16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a patch: where, why (a stable word), and what to do about it."""

    field: str
    reason: str
    description: str


class PatchError(ValueError):
    """A patch that can't be accepted. `violations` lists everything that was found wrong with it."""

    def __init__(self, *violations: Violation) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a patch must know of the model it is bound to.

    `sense_rms[l]` is the root mean square over the vocabulary of the norms of sense l's vectors.
    """

    fingerprint: str
    vocab_size: int
    num_senses: int
    width: int
    sense_rms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one revision or release. The defaults are the service's defaults."""

    cells: int = 4096
    blob_bytes: int = 16 * 2**20
    revisions: int = 8
    norm_factor: float = 8.0
    topic_words: int = 256


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One entry of the sense table: sense number `sense` of the word with id `token`."""

    token: int
    sense: int


class Vector(bytes):
    """A vector of float32, packed little-endian: immutable, hashable, and canonical as it stands."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Vector:
        # + 0.0 turns -0.0 into 0.0, so that equal vectors have equal bytes.
        return cls(struct.pack(f"<{len(values)}f", *(v + 0.0 for v in values)))

    def values(self) -> array[float]:
        """The numbers, as an array of 32-bit floats. Raises PatchError if the bytes do not divide."""
        if len(self) % 4:
            raise PatchError(Violation("vector", "WRONG_WIDTH", f"{len(self)} bytes are not a list of float32"))
        return array("f", struct.unpack(f"<{len(self) // 4}f", self))

    def norm(self) -> float:
        return math.sqrt(math.fsum(v * v for v in self.values()))


@dataclass(frozen=True, slots=True)
class Scale:
    """v ← factor · v. Factor 0 removes the sense."""

    cells: tuple[Cell, ...]
    factor: float
    KIND: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class Add:
    """v ← v + delta: what sense finetuning learns (arXiv 2402.06155)."""

    cell: Cell
    delta: Vector
    KIND: ClassVar[int] = 2

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (self.cell,)


@dataclass(frozen=True, slots=True)
class Set:
    """v ← vector."""

    cell: Cell
    vector: Vector
    KIND: ClassVar[int] = 3

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (self.cell,)


@dataclass(frozen=True, slots=True)
class Copy:
    """v ← the source cell, as the edits before this one left it."""

    cell: Cell
    source: Cell
    KIND: ClassVar[int] = 4

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (self.cell,)


@dataclass(frozen=True, slots=True)
class ProjectOut:
    """v ← v − c·r with r = wte[direction] and c = (v·r)/(r·r)."""

    cells: tuple[Cell, ...]
    direction: int
    KIND: ClassVar[int] = 5


@dataclass(frozen=True, slots=True)
class Swap:
    """v ← v − c·r + c·a·(r·r)/(a·a) with r = wte[old], a = wte[new] and c = (v·r)/(r·r)."""

    cells: tuple[Cell, ...]
    old: int
    new: int
    KIND: ClassVar[int] = 6


@dataclass(frozen=True, slots=True)
class Topic:
    """Multiply every cell by the multiplier of its topic score, annealed while generating.

    `tokens` are the first tokens of the topic's words; `strength` is 1, 2 or 3. The score of a cell
    is (E C)·b / max_y (E C)_y with b the many-hot vector of `tokens`; its quantile over all cells picks
    the multiplier (`TOPIC_MULTIPLIERS`). With `annealed`, a multiplier fades as the text comes to
    satisfy its cell (paper, section 5.1 and appendix).
    """

    tokens: tuple[int, ...]
    strength: int
    annealed: bool = True
    KIND: ClassVar[int] = 7

    @property
    def cells(self) -> tuple[Cell, ...]:
        return ()

    @property
    def multipliers(self) -> tuple[float, float, float, float]:
        return TOPIC_MULTIPLIERS[self.strength]

    @property
    def annealing_scale(self) -> float:
        """f of the annealing's sigmoid(−f·a + 6)."""
        return max(self.multipliers) / 7.5


Edit = Scale | Add | Set | Copy | ProjectOut | Swap | Topic


@dataclass(frozen=True, slots=True)
class Revision:
    """An immutable ordered list of edits, bound to the model with `fingerprint` (SHA-256, hex)."""

    fingerprint: str
    edits: tuple[Edit, ...]
    digest: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", hashlib.sha256(self.to_bytes()).hexdigest())

    def to_bytes(self) -> bytes:
        """The canonical bytes. Equal revisions have equal bytes, on every machine and version."""
        return _encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Revision:
        """The revision whose canonical bytes are `data`. Raises PatchError if they are not that."""
        return _decode(data)

    def validate(self, model: ModelShape, limits: Limits = Limits()) -> None:
        """Raise PatchError, listing every violation, unless this can be applied to `model`."""
        found = tuple(_violations(self, model, limits))
        if found:
            raise PatchError(*found)


@dataclass(frozen=True, slots=True)
class Release:
    """An immutable ordered list of one tenant's revisions. No revisions is an explicit, empty release."""

    revisions: tuple[Revision, ...] = ()
    digest: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", release_digest([r.digest for r in self.revisions]))

    @property
    def edits(self) -> tuple[Edit, ...]:
        return tuple(edit for revision in self.revisions for edit in revision.edits)

    def validate(self, model: ModelShape, limits: Limits = Limits()) -> None:
        """Raise PatchError unless every revision can be applied to `model`."""
        if len(self.revisions) > limits.revisions:
            raise PatchError(
                Violation(
                    "revisions",
                    "TOO_MANY_REVISIONS",
                    f"{len(self.revisions)} revisions, at most {limits.revisions} go into a release",
                )
            )
        for revision in self.revisions:
            revision.validate(model, limits)


def release_digest(revision_digests: Sequence[str]) -> str:
    """The digest of the release made of these revisions, in this order, under these rules."""
    head = struct.pack("<HI", COMPOSITION_VERSION, len(revision_digests))
    body = b"".join(bytes.fromhex(digest) for digest in revision_digests)
    return hashlib.sha256(b"backpack.release.v1\n" + head + body).hexdigest()


def _violations(revision: Revision, model: ModelShape, limits: Limits) -> Iterator[Violation]:
    if revision.fingerprint != model.fingerprint:
        yield Violation(
            "fingerprint",
            "WRONG_MODEL",
            f"made for model {revision.fingerprint[:12]}…, but this is {model.fingerprint[:12]}…; "
            "create the revision again from its words for this model",
        )
        return
    if not revision.edits:
        yield Violation("edits", "EMPTY", "a revision needs at least one edit")
    cells = sum(len(edit.cells) for edit in revision.edits)
    if cells > limits.cells:
        yield Violation("edits", "TOO_MANY_CELLS", f"{cells} cells, at most {limits.cells}")
    size = len(revision.to_bytes())
    if size > limits.blob_bytes:
        yield Violation("edits", "TOO_LARGE", f"{size} bytes, at most {limits.blob_bytes}")
    for index, edit in enumerate(revision.edits):
        yield from _edit_violations(f"edits[{index}]", edit, model, limits)


def _edit_violations(at: str, edit: Edit, model: ModelShape, limits: Limits) -> Iterator[Violation]:
    if isinstance(edit, Topic):
        yield from _topic_violations(at, edit, model, limits)
    elif not edit.cells:
        yield Violation(f"{at}.cells", "EMPTY", "names no cell; give a word and its senses")
    cells = list(edit.cells) + ([edit.source] if isinstance(edit, Copy) else [])
    for cell in cells:
        yield from _token_violations(f"{at}.cells", cell.token, model)
        if not 0 <= cell.sense < model.num_senses:
            yield Violation(
                f"{at}.cells",
                "BAD_SENSE_INDEX",
                f"sense {cell.sense} of token {cell.token}; senses are 0 to {model.num_senses - 1}",
            )
    if isinstance(edit, Scale):
        yield from _factor_violations(f"{at}.factor", edit.factor, limits)
    elif isinstance(edit, Add):
        yield from _vector_violations(f"{at}.delta", edit.delta, edit.cell, model, limits)
        if not any(edit.delta):
            yield Violation(f"{at}.delta", "ZERO_EFFECT", "adding zeros changes nothing")
    elif isinstance(edit, Set):
        yield from _vector_violations(f"{at}.vector", edit.vector, edit.cell, model, limits)
    elif isinstance(edit, Copy):
        if edit.source == edit.cell:
            yield Violation(f"{at}.source", "ZERO_EFFECT", "a copy of a cell onto itself")
    elif isinstance(edit, ProjectOut):
        yield from _token_violations(f"{at}.direction", edit.direction, model)
    elif isinstance(edit, Swap):
        yield from _token_violations(f"{at}.old", edit.old, model)
        yield from _token_violations(f"{at}.new", edit.new, model)
        if edit.old == edit.new:
            yield Violation(f"{at}.new", "ZERO_EFFECT", "swaps a word with itself")


def _topic_violations(at: str, edit: Topic, model: ModelShape, limits: Limits) -> Iterator[Violation]:
    if edit.strength == 0:
        yield Violation(f"{at}.strength", "ZERO_EFFECT", "strength 0 multiplies by 1; use 1, 2 or 3")
    elif edit.strength not in TOPIC_MULTIPLIERS:
        yield Violation(f"{at}.strength", "OUT_OF_RANGE", f"{edit.strength}; use 1, 2 or 3")
    if not edit.tokens:
        yield Violation(f"{at}.words", "EMPTY", "a topic needs at least one word")
    if len(edit.tokens) > limits.topic_words:
        yield Violation(f"{at}.words", "TOO_MANY_WORDS", f"{len(edit.tokens)}, at most {limits.topic_words}")
    for token in edit.tokens:
        yield from _token_violations(f"{at}.words", token, model)


def _token_violations(at: str, token: int, model: ModelShape) -> Iterator[Violation]:
    if not 0 <= token < model.vocab_size:
        yield Violation(at, "UNKNOWN_TOKEN", f"token {token}; this model's are 0 to {model.vocab_size - 1}")


def _factor_violations(at: str, factor: float, limits: Limits) -> Iterator[Violation]:
    if not math.isfinite(factor):
        yield Violation(at, "NON_FINITE", f"{factor} is not a number a vector can be scaled by")
    elif factor == 1.0:
        yield Violation(at, "ZERO_EFFECT", "scaling by 1 changes nothing")
    elif abs(factor) > limits.norm_factor:
        yield Violation(at, "OUT_OF_RANGE", f"{factor}; at most ±{limits.norm_factor:g}")


def _vector_violations(
    at: str, vector: Vector, cell: Cell, model: ModelShape, limits: Limits
) -> Iterator[Violation]:
    if len(vector) != 4 * model.width:
        yield Violation(at, "WRONG_WIDTH", f"{len(vector) / 4:g} numbers; this model's vectors have {model.width}")
        return
    values = vector.values()
    if not all(map(math.isfinite, values)):
        yield Violation(at, "NON_FINITE", "holds NaN or infinity")
        return
    if max(map(abs, values)) > FLOAT16_MAX:
        yield Violation(at, "OVERFLOW", f"holds a number beyond float16's ±{FLOAT16_MAX:g}")
    if not 0 <= cell.sense < model.num_senses:
        return
    bound = limits.norm_factor * model.sense_rms[cell.sense]
    if vector.norm() > bound:
        yield Violation(
            at,
            "NORM_TOO_LARGE",
            f"norm {vector.norm():.4g}; at most {bound:.4g}, "
            f"{limits.norm_factor:g} times the typical vector of sense {cell.sense}",
        )


_MAGIC = b"backpack.revision.v1\n"
_CELL = struct.Struct("<II")
_COUNT = struct.Struct("<I")


def _encode(revision: Revision) -> bytes:
    try:
        parts = [_MAGIC, bytes.fromhex(revision.fingerprint), _COUNT.pack(len(revision.edits))]
        for edit in revision.edits:
            parts.append(struct.pack("<B", edit.KIND))
            parts.extend(_encode_edit(edit))
        return b"".join(parts)
    except struct.error as error:
        raise PatchError(
            Violation("edits", "OUT_OF_RANGE", f"an id, sense or factor can't be stored: {error}")
        ) from None


def _encode_edit(edit: Edit) -> Iterator[bytes]:
    if isinstance(edit, Topic):
        yield struct.pack("<B?I", edit.strength, edit.annealed, len(edit.tokens))
        yield struct.pack(f"<{len(edit.tokens)}I", *edit.tokens)
        return
    yield _COUNT.pack(len(edit.cells))
    for cell in edit.cells:
        yield _CELL.pack(cell.token, cell.sense)
    if isinstance(edit, Scale):
        yield struct.pack("<d", edit.factor + 0.0)
    elif isinstance(edit, Add | Set):
        vector = edit.delta if isinstance(edit, Add) else edit.vector
        yield _COUNT.pack(len(vector))
        yield bytes(vector)
    elif isinstance(edit, Copy):
        yield _CELL.pack(edit.source.token, edit.source.sense)
    elif isinstance(edit, ProjectOut):
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

    def cell(self) -> Cell:
        return Cell(*_CELL.unpack(self.take(8)))


def _decode(data: bytes) -> Revision:
    reader = _Reader(data)
    if reader.take(len(_MAGIC)) != _MAGIC:
        raise PatchError(Violation("blob", "CORRUPT", "not a patch revision (wrong header)"))
    fingerprint = reader.take(32).hex()
    edits = tuple(_decode_edit(reader) for _ in range(reader.count()))
    if reader.at != len(data):
        raise PatchError(Violation("blob", "CORRUPT", f"{len(data) - reader.at} bytes after the last edit"))
    return Revision(fingerprint, edits)


def _decode_edit(reader: _Reader) -> Edit:
    (kind,) = reader.take(1)
    if kind == Topic.KIND:
        strength, annealed, count = reader.unpack("<B?I")
        tokens = struct.unpack(f"<{int(count)}I", reader.take(4 * int(count)))
        return Topic(tokens, int(strength), bool(annealed))
    cells = tuple(reader.cell() for _ in range(reader.count()))
    match kind:
        case Scale.KIND:
            return Scale(cells, float(reader.unpack("<d")[0]))
        case Add.KIND if len(cells) == 1:
            return Add(cells[0], Vector(reader.take(reader.count())))
        case Set.KIND if len(cells) == 1:
            return Set(cells[0], Vector(reader.take(reader.count())))
        case Copy.KIND if len(cells) == 1:
            return Copy(cells[0], reader.cell())
        case ProjectOut.KIND:
            return ProjectOut(cells, reader.count())
        case Swap.KIND:
            return Swap(cells, reader.count(), reader.count())
    raise PatchError(Violation("blob", "UNKNOWN_KIND", f"edit kind {kind} with {len(cells)} cells"))
