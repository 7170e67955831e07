"""Many releases, one pass of the trunk: each reads as the model's own forward pass under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from backpack_lm import compare
from backpack_lm.attribution import attribute_text
from backpack_lm.compare import Predicting, Scoring
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import (
    AddEdit,
    BiasEdit,
    Cell,
    CopyEdit,
    Edit,
    ProjectOutEdit,
    ReleaseContent,
    RevisionContent,
    ScaleEdit,
    SetEdit,
    SwapEdit,
    TopicEdit,
    Vector,
)
from backpack_lm.trunk_pass import TrunkPass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models.conftest import REAL, D, K, T, scores

TOLERANCE = 1e-4
"""Of a log-probability or logit in float32, against the forward pass."""

tokens = st.integers(1, REAL - 1)
cells = st.lists(st.builds(Cell, tokens, st.integers(0, K - 1)), min_size=1, max_size=12).map(tuple)
vectors = st.integers(0, 99).map(
    lambda seed: Vector.of(torch.randn(D, generator=torch.Generator().manual_seed(seed)).tolist())
)
edits = st.one_of(
    st.builds(ScaleEdit, cells, st.floats(-4, 4, width=32)),
    st.builds(AddEdit, cells, vectors),
    st.builds(SetEdit, cells, vectors),
    st.builds(CopyEdit, cells, tokens, st.none() | st.integers(0, K - 1)),
    st.builds(ProjectOutEdit, cells, tokens),
    st.builds(SwapEdit, cells, tokens, tokens),
    st.builds(TopicEdit, st.lists(tokens, min_size=1, max_size=4).map(tuple), st.integers(1, 3), st.booleans()),
    st.builds(
        BiasEdit,
        st.lists(tokens, min_size=1, max_size=4).map(tuple),
        st.floats(-20, 20, width=32) | st.just(-float("inf")),
    ),
)
releases = st.lists(st.lists(edits, max_size=5).map(tuple), min_size=1, max_size=5)
texts = st.lists(tokens, min_size=2, max_size=T).map(torch.tensor)
checked = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _compile(edits: tuple[Edit, ...], table: SenseTable) -> Overlay:
    return Overlay.compile(ReleaseContent((RevisionContent("ab" * 32, edits),) if edits else ()), table)


def _compiled(releases: list[tuple[Edit, ...]], table: SenseTable) -> list[Overlay]:
    return [_compile(edits, table) for edits in releases]


@contextmanager
def _passes(model: Backpack) -> Iterator[list[int]]:
    """The length of each text that the trunk reads inside the block."""
    seen: list[int] = []
    hook = model.gpt2_model.h[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    try:
        yield seen
    finally:
        hook.remove()


@checked
@given(ids=texts, releases=releases)
def test_scores_are_those_of_the_forward_pass(
    model: Backpack, table: SenseTable, ids: Tensor, releases: list[tuple[Edit, ...]]
) -> None:
    overlays = _compiled(releases, table)
    for overlay, found in zip(overlays, Scoring(model, table, ids).read(overlays), strict=True):
        assert found == pytest.approx(scores(model, ids, overlay), abs=TOLERANCE)


@checked
@given(ids=texts, releases=releases)
def test_what_would_have_been_likelier_is_that_of_the_forward_pass(
    model: Backpack, table: SenseTable, ids: Tensor, releases: list[tuple[Edit, ...]]
) -> None:
    for overlay in _compiled(releases, table):
        found = Scoring(model, table, ids).likeliest(overlay, 5)
        logs = model(ids[None, :-1], overlay)[0, :, :REAL].log_softmax(-1)
        assert [[value for _, value in each] for each in found] == [
            pytest.approx(row, abs=TOLERANCE) for row in logs.topk(5).values.tolist()
        ]
        for at, each in enumerate(found):
            for token, value in each:
                assert value == pytest.approx(float(logs[at, token]), abs=TOLERANCE)


@checked
@given(ids=texts, releases=releases, targets=st.lists(tokens, max_size=3))
def test_next_tokens_are_those_of_the_forward_pass(
    model: Backpack, table: SenseTable, ids: Tensor, releases: list[tuple[Edit, ...]], targets: list[int]
) -> None:
    overlays = _compiled(releases, table)
    for overlay, found in zip(overlays, Predicting(model, table, ids, 5, targets).read(overlays), strict=True):
        logs = model(ids[None], overlay)[0, -1, :REAL].log_softmax(-1)
        assert [value for _, value in found.top] == pytest.approx(logs.topk(5).values.tolist(), abs=TOLERANCE)
        for token, value in (*found.top, *found.targets):
            assert value == pytest.approx(float(logs[token]), abs=TOLERANCE)
        assert [token for token, _ in found.targets] == targets


@checked
@given(ids=texts, releases=releases, data=st.data())
def test_every_token_of_a_text_is_explained_exactly(
    model: Backpack, table: SenseTable, ids: Tensor, releases: list[tuple[Edit, ...]], data: st.DataObject
) -> None:
    start = data.draw(st.integers(1, len(ids) - 1))
    overlay = _compile(releases[0], table)
    with _passes(model) as passes:
        found = attribute_text(model, table, ids, overlay, start)
    assert passes == [len(ids) - 1]
    logits = model(ids[None, :-1], overlay)[0]
    for at, terms in enumerate(found, start):
        assert terms.contributions.shape == (at, K)
        assert terms.logit == pytest.approx(float(logits[at - 1, ids[at]]), abs=TOLERANCE)
        listed, unlisted = terms.largest(3)
        assert sum(term.contribution for term in listed) + unlisted + terms.bias == pytest.approx(terms.logit, abs=1e-9)
        assert [abs(t.contribution) for t in listed] == sorted((abs(t.contribution) for t in listed), reverse=True)


IDS = torch.randint(1, REAL, (T,), generator=torch.Generator().manual_seed(5))
ABSENT = next(token for token in range(1, REAL) if token not in IDS)
LATE = int(IDS[12])
MANY: list[tuple[Edit, ...]] = [
    (),
    (ScaleEdit((Cell(LATE, 1), Cell(LATE, 2)), -2.0),),
    (TopicEdit((7, 8, 30), 3),),
    (ScaleEdit((Cell(ABSENT, 1),), 0.0),),
    (ScaleEdit((Cell(LATE, 1),), 3.0), TopicEdit((7, 8), 2), TopicEdit((9, 10), 1, annealed=False)),
    (BiasEdit((7, 8), 3.0), BiasEdit((LATE,), -float("inf"))),
    (ScaleEdit((Cell(LATE, 1),), 3.0), BiasEdit((9,), -4.0)),
]


def test_any_number_of_releases_takes_one_pass_of_the_trunk(model: Backpack, table: SenseTable) -> None:
    overlays = _compiled(MANY, table)
    with _passes(model) as passes:
        scoring = Scoring(model, table, IDS)
        assert len(scoring.read(overlays)) == len(scoring.read(overlays)) == len(MANY)
        assert passes == [T - 1]
        predicting = Predicting(model, table, IDS, 3)
        assert len(predicting.read(overlays)) == len(predicting.read(overlays)) == len(MANY)
        assert passes == [T - 1, T]


def test_a_release_costs_nothing_where_it_changes_nothing(model: Backpack, table: SenseTable) -> None:
    read = TrunkPass(model, table, IDS)
    first = IDS.tolist().index(LATE)
    expected = [T, first, 0, T, 0, T, first]
    for edits, at in zip(MANY, expected, strict=True):
        found, outputs = read.under(_compile(edits, table))
        assert (found, len(outputs)) == (at, T - at)


def test_the_head_is_taken_in_pieces(model: Backpack, table: SenseTable, monkeypatch: pytest.MonkeyPatch) -> None:
    overlays = _compiled(MANY, table)
    whole = Scoring(model, table, IDS).read(overlays), Predicting(model, table, IDS, 3).read(overlays)
    monkeypatch.setattr(compare, "HEAD_BYTES", 3 * 4 * REAL)
    pieces = [len(logits) for _, logits in compare.logits_in_pieces(torch.zeros(10, D), model.embedding[:REAL])]
    assert pieces == [3, 3, 3, 1]
    scores, predicted = Scoring(model, table, IDS).read(overlays), Predicting(model, table, IDS, 3).read(overlays)
    for found, expected in zip(scores, whole[0], strict=True):
        assert found == pytest.approx(expected, abs=TOLERANCE)
    for mine, theirs in zip(predicted, whole[1], strict=True):
        assert [v for _, v in mine.top] == pytest.approx([v for _, v in theirs.top], abs=TOLERANCE)
