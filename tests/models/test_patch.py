"""What is allowed in a patch, how a refusal is worded, and bytes that mean one revision only."""

from __future__ import annotations

import hashlib
import math
import re
import struct

import pytest
from backpack_lm.patch import (
    Add,
    Cell,
    Copy,
    Edit,
    Limits,
    ModelShape,
    PatchError,
    ProjectOut,
    Release,
    Revision,
    Scale,
    Set,
    Swap,
    Topic,
    Vector,
    release_digest,
)
from hypothesis import given
from hypothesis import strategies as st

SHAPE = ModelShape("ab" * 32, vocab_size=50, num_senses=4, width=3, sense_rms=(1.0, 2.0, 1.0, 1.0))
CELL = (Cell(3, 1),)
ONES = Vector.of([1.0, 1.0, 1.0])


def _refusal(*edits: Edit, fingerprint: str = SHAPE.fingerprint, limits: Limits = Limits()) -> PatchError:
    with pytest.raises(PatchError) as refused:
        Revision(fingerprint, edits).validate(SHAPE, limits)
    return refused.value


@pytest.mark.parametrize(
    ("edit", "field", "reason", "says"),
    [
        (Scale((Cell(50, 0),), 0.0), "edits[0].cells", "UNKNOWN_TOKEN", "token 50; this model's are 0 to 49"),
        (Scale((Cell(3, 4),), 0.0), "edits[0].cells", "BAD_SENSE_INDEX", "sense 4 of token 3; senses are 0 to 3"),
        (Scale((), 0.0), "edits[0].cells", "EMPTY", "give a word and its senses"),
        (Scale(CELL, math.nan), "edits[0].factor", "NON_FINITE", "nan"),
        (Scale(CELL, math.inf), "edits[0].factor", "NON_FINITE", "inf"),
        (Scale(CELL, 1.0), "edits[0].factor", "ZERO_EFFECT", "scaling by 1"),
        (Scale(CELL, -9.0), "edits[0].factor", "OUT_OF_RANGE", "at most ±8"),
        (
            Add(CELL, Vector.of([1.0, 2.0])),
            "edits[0].delta",
            "WRONG_WIDTH",
            "2 numbers; this model's vectors have 3",
        ),
        (Add(CELL, Vector.of([0.0, -0.0, 0.0])), "edits[0].delta", "ZERO_EFFECT", "adding zeros"),
        (Add(CELL, Vector.of([1.0, math.nan, 0.0])), "edits[0].delta", "NON_FINITE", "NaN"),
        (Set(CELL, Vector.of([math.inf, 0.0, 0.0])), "edits[0].vector", "NON_FINITE", "infinity"),
        (Set(CELL, Vector.of([7e4, 0.0, 0.0])), "edits[0].vector", "OVERFLOW", "float16"),
        (Set(CELL, Vector.of([17.0, 0.0, 0.0])), "edits[0].vector", "NORM_TOO_LARGE", "at most 16"),
        (Copy(CELL, 50), "edits[0].cells", "UNKNOWN_TOKEN", "token 50"),
        (Copy(CELL, 4, 4), "edits[0].cells", "BAD_SENSE_INDEX", "sense 4 of token 4"),
        (Copy(CELL, 3), "edits[0].source", "ZERO_EFFECT", "onto themselves"),
        (ProjectOut(CELL, 50), "edits[0].direction", "UNKNOWN_TOKEN", "token 50"),
        (Swap(CELL, 50, 2), "edits[0].old", "UNKNOWN_TOKEN", "token 50"),
        (Swap(CELL, 2, 2), "edits[0].new", "ZERO_EFFECT", "with itself"),
        (Topic((), 1), "edits[0].words", "EMPTY", "at least one word"),
        (Topic((50,), 1), "edits[0].words", "UNKNOWN_TOKEN", "token 50"),
        (Topic((1,), 0), "edits[0].strength", "ZERO_EFFECT", "use 1, 2 or 3"),
        (Topic((1,), 4), "edits[0].strength", "OUT_OF_RANGE", "4; use 1, 2 or 3"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isupper() else "",
)
def test_refusals_name_the_field_the_value_and_the_fix(edit: Edit, field: str, reason: str, says: str) -> None:
    refused = _refusal(edit)
    assert [(v.field, v.reason) for v in refused.violations] == [(field, reason)]
    assert says in str(refused)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    refused = _refusal(Scale((Cell(99, 9),), math.nan), Swap((), 2, 2))
    assert [v.reason for v in refused.violations] == [
        "UNKNOWN_TOKEN",
        "BAD_SENSE_INDEX",
        "NON_FINITE",
        "EMPTY",
        "ZERO_EFFECT",
    ]


def test_a_revision_of_another_model_is_refused_for_that_alone() -> None:
    refused = _refusal(Scale((Cell(99, 9),), 0.0), fingerprint="cd" * 32)
    assert [v.reason for v in refused.violations] == ["WRONG_MODEL"]
    assert "cdcdcdcdcdcd" in str(refused)


def test_limits() -> None:
    assert _refusal().violations[0].reason == "EMPTY"
    many = Scale(tuple(Cell(t % 50, t % 4) for t in range(9)), 0.0)
    assert _refusal(many, limits=Limits(cells=8)).violations[0].reason == "TOO_MANY_CELLS"
    assert _refusal(many, limits=Limits(blob_bytes=64)).violations[0].reason == "TOO_LARGE"
    assert _refusal(Topic((1, 2, 3), 1), limits=Limits(topic_words=2)).violations[0].reason == "TOO_MANY_WORDS"
    topics = [Topic((token,), 1) for token in range(17)]
    assert [v.reason for v in _refusal(*topics).violations] == ["TOO_MANY_TOPICS"]
    Revision(SHAPE.fingerprint, tuple(topics[:16])).validate(SHAPE)
    nine = Release(tuple(Revision(SHAPE.fingerprint, (Scale(CELL, 0.5),)) for _ in range(9)))
    with pytest.raises(PatchError, match="9 revisions, at most 8"):
        nine.validate(SHAPE)


def test_numbers_that_bytes_have_no_place_for() -> None:
    with pytest.raises(PatchError, match="can't be stored"):
        Revision(SHAPE.fingerprint, (Scale((Cell(-1, 0),), 0.5),))


# ---- canonical bytes

cells = st.lists(st.builds(Cell, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=4).map(tuple)
token = st.integers(0, 2**32 - 1)
vectors = st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(Vector.of)
edits = st.one_of(
    st.builds(Scale, cells, st.floats(allow_nan=False)),
    st.builds(Add, cells, vectors),
    st.builds(Set, cells, vectors),
    st.builds(Copy, cells, token, st.none() | st.integers(0, 2**31 - 1)),
    st.builds(ProjectOut, cells, token),
    st.builds(Swap, cells, token, token),
    st.builds(Topic, st.lists(token, max_size=5).map(tuple), st.integers(0, 255), st.booleans()),
)
revisions = st.builds(
    Revision, st.binary(min_size=32, max_size=32).map(bytes.hex), st.lists(edits, max_size=5).map(tuple)
)


@given(revisions)
def test_bytes_come_back_as_the_revision_that_made_them(revision: Revision) -> None:
    again = Revision.from_bytes(revision.to_bytes())
    assert again == revision
    assert again.digest == revision.digest == hashlib.sha256(revision.to_bytes()).hexdigest()


@given(revisions, st.data())
def test_damaged_bytes_are_refused_or_another_revision(revision: Revision, data: st.DataObject) -> None:
    blob = bytearray(revision.to_bytes())
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= data.draw(st.integers(1, 255))
    try:
        other = Revision.from_bytes(bytes(blob))
    except PatchError:
        return
    assert other.digest != revision.digest


@given(revisions, st.data())
def test_truncated_bytes_are_refused(revision: Revision, data: st.DataObject) -> None:
    blob = revision.to_bytes()
    with pytest.raises(PatchError):
        Revision.from_bytes(blob[: data.draw(st.integers(0, len(blob) - 1))])
    with pytest.raises(PatchError, match="after the last edit"):
        Revision.from_bytes(blob + b"\0")


def test_the_bytes_are_pinned() -> None:
    """A digest names a revision for ever: these must never change, whatever else does."""
    revision = Revision("00" * 32, (Scale((Cell(1, 2),), 0.5), Topic((7,), 3), Copy(CELL, 4)))
    assert revision.digest == "a838389940ded56d3b07b3b719f09dabe736e4d14eaf2f4ad672d7a128da4afc"
    assert release_digest([revision.digest]) == "aec18e3bef9af2406ad81f39c4e9570bda70c37fa61120b17ffa043999bb67ff"
    assert release_digest([]) == "a053d96a389a83910b0a9e3c7521107fbce219ef45d1a8bb9ce5af89f61d3d32"


def test_zero_has_one_spelling() -> None:
    assert Vector.of([-0.0]) == Vector.of([0.0])
    assert Revision("00" * 32, (Scale(CELL, -0.0),)).digest == Revision("00" * 32, (Scale(CELL, 0.0),)).digest


def test_a_vector_of_odd_bytes() -> None:
    with pytest.raises(PatchError, match="not a list of float32"):
        Vector(b"abc").values()
    assert Vector(struct.pack("<2f", 3.0, 4.0)).norm() == 5.0


def test_the_order_of_a_release_is_part_of_its_digest() -> None:
    a, b = (Revision("00" * 32, (Scale(CELL, f),)) for f in (0.5, 0.25))
    assert Release((a, b)).digest != Release((b, a)).digest
    assert re.fullmatch("[0-9a-f]{64}", Release().digest)
