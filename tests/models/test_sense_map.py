"""A map of a sense: its places against numpy's covariance, its axes, its directions of words."""

from __future__ import annotations

import pytest
import torch
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import Cell, ReleaseContent, RevisionContent, ScaleEdit
from backpack_lm.sense_map import map_sense

from tests.models.conftest import REAL

WORDS, SENSE = [3, 9, 11, 20, 33, 41, 50], 2


def _overlay(table: SenseTable, *edits: ScaleEdit) -> Overlay:
    revisions = (RevisionContent("ab" * 32, edits),) if edits else ()
    return Overlay.compile(ReleaseContent(revisions), table)


def test_places_are_the_two_principal_components(model: Backpack, table: SenseTable) -> None:
    found = map_sense(model, table, _overlay(table), WORDS, SENSE, limit=REAL)
    vectors = table.vectors(torch.tensor(WORDS))[:, SENSE].double()
    values, directions = torch.linalg.eigh(torch.cov(vectors.t()))  # ascending
    for at in (0, 1):
        direction = directions[:, -1 - at]
        places = torch.tensor(found.points)[:, at]
        expected = (vectors - vectors.mean(0)) @ direction
        assert float((places.double() @ expected).abs()) == pytest.approx(float(expected.square().sum()), rel=1e-4)
        assert float(places[places.abs().argmax()]) > 0
        assert found.axes[at].share == pytest.approx(float(values[-1 - at] / values.sum()), rel=1e-6)
        sign = 1 if float(places.double() @ expected) > 0 else -1
        scores = model.embedding[:REAL].double() @ direction * sign
        scores -= scores.mean()
        token, score = found.axes[at].positive[0]
        assert (token, score) == (int(scores.argmax()), pytest.approx(float(scores.max()), abs=1e-5))
        assert found.axes[at].negative[0][0] == int(scores.argmin())
        assert len(found.axes[at].positive) == REAL, "padding of the vocabulary is no token"
    assert found.norms == pytest.approx(vectors.norm(dim=1).tolist())


@pytest.mark.parametrize("against", [[], [7, 8]])
def test_toward_words_x_is_what_the_sense_adds_to_them(model: Backpack, table: SenseTable, against: list[int]) -> None:
    found = map_sense(model, table, _overlay(table), WORDS, SENSE, [5, 6], against)
    vectors = table.vectors(torch.tensor(WORDS))[:, SENSE]
    logits = vectors @ model.embedding[:REAL].t()  # [n, V]
    less = logits[:, against].mean(1) if against else logits.mean(1)
    assert [x for x, _ in found.points] == pytest.approx((logits[:, [5, 6]].mean(1) - less).tolist(), abs=1e-5)
    assert 0 < found.axes[1].share <= 1 - found.axes[0].share + 1e-9, "y has nothing of x"


def test_a_release_moves_the_words_that_it_edits(model: Backpack, table: SenseTable) -> None:
    overlay = _overlay(table, ScaleEdit((Cell(9, SENSE),), 0.0))
    found = map_sense(model, table, overlay, WORDS, SENSE, [5])
    assert found.edited == [word == 9 for word in WORDS]
    assert found.points[WORDS.index(9)][0] == found.norms[WORDS.index(9)] == 0


def test_words_that_are_all_alike_have_one_place(model: Backpack, table: SenseTable) -> None:
    overlay = _overlay(table, ScaleEdit(tuple(Cell(word, SENSE) for word in WORDS), 0.0))
    found = map_sense(model, table, overlay, WORDS, SENSE)
    assert found.points == [[0, 0]] * len(WORDS)
    assert [axis.share for axis in found.axes] == [0, 0]
