"""Each kind of edit against a direct dense computation: the whole sense table written out and edited by hand."""

from __future__ import annotations

import pytest
import torch
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import (
    AddEdit,
    BiasEdit,
    Cell,
    CopyEdit,
    Edit,
    PatchError,
    ProjectOutEdit,
    ReleaseContent,
    RevisionContent,
    ScaleEdit,
    SetEdit,
    SwapEdit,
    TopicEdit,
    Vector,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models.conftest import EOS, REAL, D, K, T, V
from tests.models.test_compare import edits

IDS = torch.randint(1, REAL, (2, T), generator=torch.Generator().manual_seed(3))
EVERY = tuple(Cell(t, s) for t in range(REAL) for s in range(K))


def _release(*edits: Edit) -> ReleaseContent:
    return ReleaseContent((RevisionContent("ab" * 32, edits),)) if edits else ReleaseContent()


def _dense(model: Backpack, senses: Tensor, ids: Tensor, multipliers: Tensor | None = None) -> Tensor:
    """The equation itself: o_i = Σ_j Σ_l α m C(x_j)_l with C a whole table, logits = E o."""
    alpha = model.sense_weights(ids)  # [B, k, T, T]
    if multipliers is not None:
        alpha = alpha * multipliers  # [B, k, T, T]
    mixed = torch.einsum("blij,bjld->bid", alpha, senses[ids])
    return mixed @ model.embedding.t()


def _check(model: Backpack, table: SenseTable, senses: Tensor, *edits: Edit) -> None:
    overlay = Overlay.compile(_release(*edits), table)
    got = model(IDS, overlay)
    torch.testing.assert_close(got, _dense(model, senses, IDS), atol=1e-5, rtol=1e-5)
    assert (got - model(IDS)).abs().max() > 1e-3, "the edit did nothing"


def _vector(seed: int) -> Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed))


def _packed(vector: Tensor) -> Vector:
    return Vector.of(vector.tolist())


USED = sorted(set(IDS.flatten().tolist()))[:8]


def test_scale(model: Backpack, table: SenseTable) -> None:
    senses = table.rows.clone()
    senses[USED, 1] *= -1.5
    senses[USED, 2] *= 0
    cells = lambda sense: tuple(Cell(t, sense) for t in USED)  # noqa: E731
    _check(model, table, senses, ScaleEdit(cells(1), -1.5), ScaleEdit(cells(2), 0.0))


def test_add(model: Backpack, table: SenseTable) -> None:
    senses = table.rows.clone()
    senses[USED, 3] += _vector(1)
    _check(model, table, senses, AddEdit(tuple(Cell(t, 3) for t in USED), _packed(_vector(1))))


def test_set(model: Backpack, table: SenseTable) -> None:
    senses = table.rows.clone()
    senses[USED, 0] = _vector(2)
    _check(model, table, senses, SetEdit(tuple(Cell(t, 0) for t in USED), _packed(_vector(2))))


def test_copy_of_the_same_senses(model: Backpack, table: SenseTable) -> None:
    senses = table.rows.clone()
    for t in USED:
        senses[t, 1:3] = table.rows[5, 1:3]
    _check(model, table, senses, CopyEdit(tuple(Cell(t, s) for t in USED for s in (1, 2)), 5))


def test_copy_of_one_sense(model: Backpack, table: SenseTable) -> None:
    senses = table.rows.clone()
    senses[USED, 1] = table.rows[5, 3]
    _check(model, table, senses, CopyEdit(tuple(Cell(t, 1) for t in USED), 5, source_sense=3))


def test_project_out(model: Backpack, table: SenseTable) -> None:
    r = model.embedding[9]
    senses = table.rows.clone()
    for t in range(REAL):
        for s in range(K):
            v = senses[t, s]
            senses[t, s] = v - torch.dot(v, r) / torch.dot(r, r) * r
    _check(model, table, senses, ProjectOutEdit(EVERY, 9))
    assert (senses[:REAL] @ r).abs().max() < 1e-4


def test_swap(model: Backpack, table: SenseTable) -> None:
    r, a = model.embedding[9], model.embedding[12]
    senses = table.rows.clone()
    for t in range(REAL):
        for s in range(K):
            v = senses[t, s]
            c = torch.dot(v, r) / torch.dot(r, r)
            senses[t, s] = v - c * r + c * a * torch.dot(r, r) / torch.dot(a, a)
    _check(model, table, senses, SwapEdit(EVERY, 9, 12))


def test_edits_apply_in_order_each_to_what_the_one_before_left(model: Backpack, table: SenseTable) -> None:
    cells = tuple(Cell(t, 1) for t in USED)
    senses = table.rows.clone()
    senses[USED, 1] = (senses[USED, 1] + _vector(4)) * 2.0
    senses[USED, 0] = senses[USED[0], 1]
    edits = (
        AddEdit(cells, _packed(_vector(4))),
        ScaleEdit(cells, 2.0),
        CopyEdit(tuple(Cell(t, 0) for t in USED), USED[0], 1),
    )
    _check(model, table, senses, *edits)
    one = Overlay.compile(_release(*edits), table)
    two = Overlay.compile(
        ReleaseContent((RevisionContent("ab" * 32, edits[:1]), RevisionContent("ab" * 32, edits[1:]))), table
    )
    torch.testing.assert_close(one.rows, two.rows)
    assert one.digest != two.digest


def test_a_copy_reads_its_source_before_anything_of_it_is_written(model: Backpack, table: SenseTable) -> None:
    a, b = USED[:2]
    senses = table.rows.clone()
    senses[a] = table.rows[b]
    senses[b] = table.rows[b]
    cells = tuple(Cell(t, s) for t in (a, b) for s in range(K))
    overlay = Overlay.compile(_release(CopyEdit(cells, b)), table)
    torch.testing.assert_close(model(IDS, overlay), _dense(model, senses, IDS), atol=1e-5, rtol=1e-5)


def _one_cell(edit: Edit, v: Tensor, cell: Cell, senses: Tensor, e: Tensor) -> Tensor:
    """What an edit makes of one vector, from its definition in `edits.py`."""
    match edit:
        case ScaleEdit(factor=s):
            return v * s
        case AddEdit(delta=delta):
            return v + torch.tensor(delta.values().tolist())
        case SetEdit(vector=vector):
            return torch.tensor(vector.values().tolist()).double()
        case CopyEdit():
            return senses[edit.source, cell.sense if edit.source_sense is None else edit.source_sense]
        case ProjectOutEdit(direction=r):
            return v - (v @ e[r]) / (e[r] @ e[r]) * e[r]
        case SwapEdit(old=r, new=a):
            c = (v @ e[r]) / (e[r] @ e[r])
            return v - c * e[r] + c * e[a] * (e[r] @ e[r]) / (e[a] @ e[a])
    return v  # a topic leaves vectors alone


@settings(max_examples=100, deadline=None)
@given(revisions=st.lists(st.lists(edits, max_size=6).map(tuple), min_size=1, max_size=4))
def test_any_edits_are_what_they_make_of_one_cell_after_another(
    table: SenseTable, revisions: list[tuple[Edit, ...]]
) -> None:
    senses, embedding = table.rows.double(), table.embedding.double()
    for edit in (edit for revision in revisions for edit in revision):
        before = senses.clone()
        for cell in edit.cells:
            senses[cell.token, cell.sense] = _one_cell(edit, before[cell.token, cell.sense], cell, before, embedding)
    overlay = Overlay.compile(
        ReleaseContent(tuple(RevisionContent("ab" * 32, revision) for revision in revisions)), table
    )
    ids = torch.arange(V)[None]
    found = overlay.replace(ids, table.rows[ids])[0].double()
    torch.testing.assert_close(found, senses, rtol=1e-5, atol=1e-5)


# ---- topics


def _levels(model: Backpack, senses: Tensor, words: tuple[int, ...], deltas: tuple[float, ...]) -> Tensor:
    """δ of every cell [V, k], from the definition: one cell at a time, a full projection for each."""
    many_hot = torch.zeros(V)
    many_hot[list(words)] = 1.0
    scores = torch.zeros(V, K)
    for t in range(V):
        for s in range(K):
            logits = model.embedding @ senses[t, s]
            scores[t, s] = torch.dot(logits, many_hot) / logits.max()
    scores[EOS] = 0.0
    scores[REAL:] = 0.0
    high, middle, low = torch.quantile(scores.flatten(), torch.tensor([0.95, 0.80, 0.60]))
    out = torch.full((V, K), deltas[3])
    out[scores > low] = deltas[2]
    out[scores > middle] = deltas[1]
    out[scores > high] = deltas[0]
    return out


def _annealed(model: Backpack, senses: Tensor, ids: Tensor, delta: Tensor, deltas: tuple[float, ...]) -> Tensor:
    """Effective multipliers [k, T, T] of one text, recomputed in full for every prediction i and cell (j, l)."""
    f = max(deltas) / 7.5
    out = torch.zeros(K, len(ids), len(ids))
    for i in range(len(ids)):
        seen = ids[: i + 1]
        for j in range(i + 1):
            for s in range(K):
                logits = model.embedding @ senses[ids[j], s]  # full vocabulary, as the reference does it
                a = sum(max(0.0, float(logits[x])) for x in seen)
                b = torch.sigmoid(torch.tensor(-f * a + 6)) * (1 + j / 100)
                out[s, i, j] = b * delta[ids[j], s] + (1 - b)
    return out


STRENGTHS = {1: (1.5, 1.5, 1.3, 1.0), 2: (2.2, 2.2, 1.5, 1.0), 3: (3.3, 3.3, 3.0, 1.0)}


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_a_constant_topic(model: Backpack, table: SenseTable, strength: int) -> None:
    delta = _levels(model, table.rows, (7, 8, 30), STRENGTHS[strength])
    overlay = Overlay.compile(_release(TopicEdit((7, 8, 30), strength, annealed=False)), table)
    multipliers = delta[IDS].permute(0, 2, 1)[:, :, None, :]  # [B, k, 1, T]
    expected = _dense(model, table.rows, IDS, multipliers)
    torch.testing.assert_close(model(IDS, overlay), expected, atol=1e-4, rtol=1e-4)
    assert (expected - model(IDS)).abs().max() > 1e-2


@pytest.mark.parametrize("edited", [False, True])
def test_an_annealed_topic_token_by_token(model: Backpack, table: SenseTable, edited: bool) -> None:
    """With edited rows below it: scores come from the model, what is annealed_sum from the rows as they stand."""
    senses = table.rows.clone()
    edits: tuple[Edit, ...] = (TopicEdit((7, 8, 30), 3),)
    if edited:
        senses[USED, 1] += _vector(5)
        edits = (AddEdit(tuple(Cell(t, 1) for t in USED), _packed(_vector(5))), *edits)
    delta = _levels(model, table.rows, (7, 8, 30), STRENGTHS[3])
    multipliers = torch.stack([_annealed(model, senses, ids, delta, STRENGTHS[3]) for ids in IDS])
    expected = _dense(model, senses, IDS, multipliers)
    overlay = Overlay.compile(_release(*edits), table)
    torch.testing.assert_close(model(IDS, overlay), expected, atol=1e-4, rtol=1e-4)
    constant = Overlay.compile(_release(*edits[:-1], TopicEdit((7, 8, 30), 3, annealed=False)), table)
    assert (model(IDS, constant) - expected).abs().max() > 1e-2, "annealing changed nothing"


def test_two_topics_multiply(model: Backpack, table: SenseTable) -> None:
    words = ((7, 8, 30), (20, 21))
    deltas = [_levels(model, table.rows, w, STRENGTHS[2]) for w in words]
    parts = [torch.stack([_annealed(model, table.rows, i, d, STRENGTHS[2]) for i in IDS]) for d in deltas]
    overlay = Overlay.compile(_release(*(TopicEdit(w, 2) for w in words)), table)
    expected = _dense(model, table.rows, IDS, parts[0] * parts[1])
    torch.testing.assert_close(model(IDS, overlay), expected, atol=1e-4, rtol=1e-4)


def test_biases_of_a_token_add_up_and_what_is_forbidden_stays_so(model: Backpack, table: SenseTable) -> None:
    edits = (
        BiasEdit((7, 8, 7), 2.5),
        TopicEdit((7, 8, 30), 3),
        BiasEdit((8, EOS), -float("inf")),
        BiasEdit((8, 9), -1.0),
        BiasEdit((7,), -0.5),
    )
    expected = model(IDS, Overlay.compile(_release(edits[1]), table))
    expected[..., 7] += 2
    expected[..., 9] -= 1
    expected[..., [8, EOS]] = -float("inf")
    overlay = Overlay.compile(_release(*edits), table)
    torch.testing.assert_close(model(IDS, overlay), expected)
    assert [overlay.bias_of(token) for token in (7, 8, 9, 10)] == [2, -float("inf"), -1, 0]
    alone = Overlay.compile(_release(BiasEdit((7,), 40.0)), table)
    assert (model(IDS, alone).argmax(-1) == 7).all()
    assert not alone.empty
    assert alone.nbytes > Overlay.compile(ReleaseContent(), table).nbytes


def test_a_release_without_edits_is_the_model(model: Backpack, table: SenseTable) -> None:
    overlay = Overlay.compile(ReleaseContent(), table)
    assert overlay.empty
    assert torch.equal(model(IDS, overlay), model(IDS))


def test_what_the_edits_add_up_to_must_fit_the_table(table: SenseTable) -> None:
    small = SenseTable(table.rows.half(), table.embedding.half())
    cells = (Cell(3, 0),)
    grow = tuple(ScaleEdit(cells, 8.0) for _ in range(12))
    with pytest.raises(PatchError, match="sense 0 of token 3 is too large"):
        Overlay.compile(_release(SetEdit(cells, _packed(torch.ones(D))), *grow), small)
