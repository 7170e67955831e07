"""What is allowed in a patch, how a refusal is worded, and bytes that mean one revision only."""

from __future__ import annotations

import hashlib
import math
import re
import struct
from dataclasses import replace

import pytest
from backpack_lm.patch import (
    AddEdit,
    BiasEdit,
    Cell,
    CopyEdit,
    Edit,
    ModelShape,
    PatchError,
    PatchLimits,
    ProjectOutEdit,
    ReleaseContent,
    RevisionContent,
    ScaleEdit,
    SetEdit,
    SwapEdit,
    TopicEdit,
    Vector,
    release_digest,
)
from hypothesis import given
from hypothesis import strategies as st

SHAPE = ModelShape("ab" * 32, vocab_size=50, num_senses=4, width=3, sense_rms=(1.0, 2.0, 1.0, 1.0))
CELL = (Cell(3, 1),)
ONES = Vector.of([1.0, 1.0, 1.0])


def _refusal(*edits: Edit, fingerprint: str = SHAPE.fingerprint, limits: PatchLimits = PatchLimits()) -> PatchError:
    with pytest.raises(PatchError) as refused:
        RevisionContent(fingerprint, edits).validate(SHAPE, limits)
    return refused.value


@pytest.mark.parametrize(
    ("edit", "field", "reason", "says"),
    [
        (ScaleEdit((Cell(50, 0),), 0.0), "edits[0].cells", "UNKNOWN_TOKEN", "token 50; this model's are 0 to 49"),
        (ScaleEdit((Cell(3, 4),), 0.0), "edits[0].cells", "BAD_SENSE_INDEX", "sense 4 of token 3; senses are 0 to 3"),
        (ScaleEdit((), 0.0), "edits[0].cells", "EMPTY", "give a word and its senses"),
        (ScaleEdit(CELL, math.nan), "edits[0].factor", "NON_FINITE", "nan"),
        (ScaleEdit(CELL, math.inf), "edits[0].factor", "NON_FINITE", "inf"),
        (ScaleEdit(CELL, 1.0), "edits[0].factor", "ZERO_EFFECT", "scaling by 1"),
        (ScaleEdit(CELL, -9.0), "edits[0].factor", "OUT_OF_RANGE", "at most ±8"),
        (
            AddEdit(CELL, Vector.of([1.0, 2.0])),
            "edits[0].delta",
            "WRONG_WIDTH",
            "2 numbers; this model's vectors have 3",
        ),
        (AddEdit(CELL, Vector.of([0.0, -0.0, 0.0])), "edits[0].delta", "ZERO_EFFECT", "adding zeros"),
        (AddEdit(CELL, Vector.of([1.0, math.nan, 0.0])), "edits[0].delta", "NON_FINITE", "NaN"),
        (SetEdit(CELL, Vector.of([math.inf, 0.0, 0.0])), "edits[0].vector", "NON_FINITE", "infinity"),
        (SetEdit(CELL, Vector.of([7e4, 0.0, 0.0])), "edits[0].vector", "OVERFLOW", "float16"),
        (SetEdit(CELL, Vector.of([17.0, 0.0, 0.0])), "edits[0].vector", "NORM_TOO_LARGE", "at most 16"),
        (CopyEdit(CELL, 50), "edits[0].cells", "UNKNOWN_TOKEN", "token 50"),
        (CopyEdit(CELL, 4, 4), "edits[0].cells", "BAD_SENSE_INDEX", "sense 4 of token 4"),
        (CopyEdit(CELL, 3), "edits[0].source", "ZERO_EFFECT", "onto themselves"),
        (ProjectOutEdit(CELL, 50), "edits[0].direction", "UNKNOWN_TOKEN", "token 50"),
        (SwapEdit(CELL, 50, 2), "edits[0].old", "UNKNOWN_TOKEN", "token 50"),
        (SwapEdit(CELL, 2, 2), "edits[0].new", "ZERO_EFFECT", "with itself"),
        (TopicEdit((), 1), "edits[0].words", "EMPTY", "at least one word"),
        (TopicEdit((50,), 1), "edits[0].words", "UNKNOWN_TOKEN", "token 50"),
        (TopicEdit((1,), 0), "edits[0].strength", "ZERO_EFFECT", "use 1, 2 or 3"),
        (TopicEdit((1,), 4), "edits[0].strength", "OUT_OF_RANGE", "4; use 1, 2 or 3"),
        (BiasEdit((), 1.0), "edits[0].words", "EMPTY", "at least one word"),
        (BiasEdit((50,), -math.inf), "edits[0].words", "UNKNOWN_TOKEN", "token 50; this model's are 0 to 49"),
        (BiasEdit((1,), 0.0), "edits[0].amount", "ZERO_EFFECT", "adding 0"),
        (BiasEdit((1,), math.nan), "edits[0].amount", "NON_FINITE", "nan; at most ±100, or −∞"),
        (BiasEdit((1,), math.inf), "edits[0].amount", "NON_FINITE", "inf; at most ±100, or −∞"),
        (BiasEdit((1,), -100.5), "edits[0].amount", "OUT_OF_RANGE", "-100.5; at most ±100, or −∞"),
        (BiasEdit(tuple(range(50)), -math.inf), "edits", "NOTHING_LEFT", "all 50 tokens are forbidden"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isupper() else "",
)
def test_refusals_name_the_field_the_value_and_the_fix(edit: Edit, field: str, reason: str, says: str) -> None:
    refused = _refusal(edit)
    assert [(v.field, v.reason) for v in refused.violations] == [(field, reason)]
    assert says in str(refused)


def test_a_token_is_named_by_its_text_where_that_is_known() -> None:
    spelled = replace(SHAPE, spell=lambda token: f" word{token}")
    with pytest.raises(PatchError, match=r"sense 4 of token 3 \(' word3'\); senses are 0 to 3"):
        RevisionContent(SHAPE.fingerprint, (ScaleEdit((Cell(3, 4),), 0.0),)).validate(spelled)
    with pytest.raises(PatchError, match="sense 4 of token 50; senses"):
        RevisionContent(SHAPE.fingerprint, (ScaleEdit((Cell(50, 4),), 0.0),)).validate(spelled)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    refused = _refusal(ScaleEdit((Cell(99, 9),), math.nan), SwapEdit((), 2, 2))
    assert [v.reason for v in refused.violations] == [
        "UNKNOWN_TOKEN",
        "BAD_SENSE_INDEX",
        "NON_FINITE",
        "EMPTY",
        "ZERO_EFFECT",
    ]


def test_a_revision_of_another_model_is_refused_for_that_alone() -> None:
    refused = _refusal(ScaleEdit((Cell(99, 9),), 0.0), fingerprint="cd" * 32)
    assert [v.reason for v in refused.violations] == ["WRONG_MODEL"]
    assert "cdcdcdcdcdcd" in str(refused)


def test_limits() -> None:
    assert _refusal().violations[0].reason == "EMPTY"
    many = ScaleEdit(tuple(Cell(t % 50, t % 4) for t in range(9)), 0.0)
    assert _refusal(many, limits=PatchLimits(cells=8)).violations[0].reason == "TOO_MANY_CELLS"
    assert _refusal(many, limits=PatchLimits(blob_bytes=64)).violations[0].reason == "TOO_LARGE"
    assert _refusal(TopicEdit((1, 2, 3), 1), limits=PatchLimits(topic_words=2)).violations[0].reason == "TOO_MANY_WORDS"
    topics = [TopicEdit((token,), 1) for token in range(17)]
    assert [v.reason for v in _refusal(*topics).violations] == ["TOO_MANY_TOPICS"]
    RevisionContent(SHAPE.fingerprint, tuple(topics[:16])).validate(SHAPE)
    biases = [BiasEdit((1, 2), 1.0), BiasEdit((3,), -math.inf)]
    assert _refusal(*biases, limits=PatchLimits(biased=2)).violations[0].reason == "TOO_MANY_WORDS"
    RevisionContent(SHAPE.fingerprint, tuple(biases)).validate(SHAPE, PatchLimits(biased=3))
    nine = ReleaseContent(tuple(RevisionContent(SHAPE.fingerprint, (ScaleEdit(CELL, 0.5),)) for _ in range(9)))
    with pytest.raises(PatchError, match="9 revisions; at most 8"):
        nine.validate(SHAPE)


def test_revisions_may_not_forbid_everything_together() -> None:
    halves = [RevisionContent(SHAPE.fingerprint, (BiasEdit(tuple(r), -math.inf),)) for r in (range(25), range(20, 50))]
    for half in halves:
        ReleaseContent((half,)).validate(SHAPE)
    with pytest.raises(PatchError, match="all 50 tokens are forbidden") as refused:
        ReleaseContent(tuple(halves)).validate(SHAPE)
    assert refused.value.violations[0].field == "revisions"
    lowered = RevisionContent(SHAPE.fingerprint, (BiasEdit(tuple(range(50)), -100.0),))
    ReleaseContent((lowered, halves[0])).validate(SHAPE)


def test_numbers_that_bytes_have_no_place_for() -> None:
    with pytest.raises(PatchError, match="can't be stored"):
        RevisionContent(SHAPE.fingerprint, (ScaleEdit((Cell(-1, 0),), 0.5),))


# ---- canonical bytes

cells = st.lists(st.builds(Cell, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=4).map(tuple)
token = st.integers(0, 2**32 - 1)
vectors = st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(Vector.of)
edits = st.one_of(
    st.builds(ScaleEdit, cells, st.floats(allow_nan=False)),
    st.builds(AddEdit, cells, vectors),
    st.builds(SetEdit, cells, vectors),
    st.builds(CopyEdit, cells, token, st.none() | st.integers(0, 2**31 - 1)),
    st.builds(ProjectOutEdit, cells, token),
    st.builds(SwapEdit, cells, token, token),
    st.builds(TopicEdit, st.lists(token, max_size=5).map(tuple), st.integers(0, 255), st.booleans()),
    st.builds(BiasEdit, st.lists(token, max_size=5).map(tuple), st.floats(allow_nan=False)),
)
revisions = st.builds(
    RevisionContent, st.binary(min_size=32, max_size=32).map(bytes.hex), st.lists(edits, max_size=5).map(tuple)
)


@given(revisions)
def test_bytes_come_back_as_the_revision_that_made_them(revision: RevisionContent) -> None:
    again = RevisionContent.from_bytes(revision.to_bytes())
    assert again == revision
    assert again.digest == revision.digest == hashlib.sha256(revision.to_bytes()).hexdigest()


@given(revisions, st.data())
def test_damaged_bytes_are_refused_or_another_revision(revision: RevisionContent, data: st.DataObject) -> None:
    blob = bytearray(revision.to_bytes())
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= data.draw(st.integers(1, 255))
    try:
        other = RevisionContent.from_bytes(bytes(blob))
    except PatchError:
        return
    assert other.digest != revision.digest


@given(revisions, st.data())
def test_truncated_bytes_are_refused(revision: RevisionContent, data: st.DataObject) -> None:
    blob = revision.to_bytes()
    with pytest.raises(PatchError):
        RevisionContent.from_bytes(blob[: data.draw(st.integers(0, len(blob) - 1))])
    with pytest.raises(PatchError, match="after the last edit"):
        RevisionContent.from_bytes(blob + b"\0")


def test_the_bytes_are_pinned() -> None:
    """A digest names a revision for ever: these must never change, whatever else does."""
    revision = RevisionContent("00" * 32, (ScaleEdit((Cell(1, 2),), 0.5), TopicEdit((7,), 3), CopyEdit(CELL, 4)))
    assert revision.digest == "a838389940ded56d3b07b3b719f09dabe736e4d14eaf2f4ad672d7a128da4afc"
    bias = RevisionContent("00" * 32, (BiasEdit((7, 8), -math.inf), BiasEdit((9,), 0.5)))
    assert bias.digest == "193ee44211aead6e9bb4ef3afc482a35490aa90046c9bb44dc77a9845b7ca316"
    assert release_digest([revision.digest]) == "aec18e3bef9af2406ad81f39c4e9570bda70c37fa61120b17ffa043999bb67ff"
    assert release_digest([]) == "a053d96a389a83910b0a9e3c7521107fbce219ef45d1a8bb9ce5af89f61d3d32"


def test_zero_has_one_spelling() -> None:
    assert Vector.of([-0.0]) == Vector.of([0.0])
    minus, plus = (RevisionContent("00" * 32, (BiasEdit((1,), zero),)) for zero in (-0.0, 0.0))
    assert minus.digest == plus.digest
    assert (
        RevisionContent("00" * 32, (ScaleEdit(CELL, -0.0),)).digest
        == RevisionContent("00" * 32, (ScaleEdit(CELL, 0.0),)).digest
    )


def test_a_vector_of_odd_bytes() -> None:
    with pytest.raises(PatchError, match="not a list of float32"):
        Vector(b"abc").values()
    assert Vector(struct.pack("<2f", 3.0, 4.0)).norm() == 5.0


def test_the_order_of_a_release_is_part_of_its_digest() -> None:
    a, b = (RevisionContent("00" * 32, (ScaleEdit(CELL, f),)) for f in (0.5, 0.25))
    assert ReleaseContent((a, b)).digest != ReleaseContent((b, a)).digest
    assert re.fullmatch("[0-9a-f]{64}", ReleaseContent().digest)
