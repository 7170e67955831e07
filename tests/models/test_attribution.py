"""Explanations are exact: their terms add up to the logits of the model that they explain."""

from __future__ import annotations

import pytest
import torch
from backpack_lm.attribution import attribute, read_senses
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import BiasEdit, Cell, Edit, ReleaseContent, RevisionContent, ScaleEdit, TopicEdit

from tests.models.conftest import REAL, K, T

IDS = torch.randint(1, REAL, (T,), generator=torch.Generator().manual_seed(5))
RELEASES: dict[str, tuple[Edit, ...]] = {
    "none": (),
    "edited rows": (ScaleEdit(tuple(Cell(int(t), 1) for t in set(IDS.tolist())), -2.0),),
    "topic": (TopicEdit((7, 8, 30), 3),),
    "bias": (TopicEdit((7, 8, 30), 3), BiasEdit((11, 12), 2.5), BiasEdit(tuple(range(30, 50)), -3.0)),
}


@pytest.fixture(params=RELEASES)
def overlay(request: pytest.FixtureRequest, table: SenseTable) -> Overlay:
    edits = RELEASES[request.param]
    return Overlay.compile(ReleaseContent((RevisionContent("ab" * 32, edits),)) if edits else ReleaseContent(), table)


@pytest.mark.parametrize("target", [None, 11])
def test_contributions_add_up_to_the_logit(
    model: Backpack, table: SenseTable, overlay: Overlay, target: int | None
) -> None:
    logits = model(IDS[None], overlay)[0, -1, :REAL]
    found = attribute(model, table, IDS, overlay, target)
    assert found.target == (int(logits.argmax()) if target is None else target)
    assert found.terms.contributions.shape == (T, K)
    assert found.terms.logit == pytest.approx(float(logits[found.target]), abs=1e-4)
    assert found.log_probability == pytest.approx(float(logits.log_softmax(-1)[found.target]), abs=1e-4)


def test_a_forbidden_word_has_terms_and_no_probability(model: Backpack, table: SenseTable) -> None:
    likeliest = attribute(model, table, IDS, Overlay.compile(ReleaseContent(), table))
    forbid = RevisionContent("ab" * 32, (BiasEdit((likeliest.target,), -float("inf")),))
    overlay = Overlay.compile(ReleaseContent((forbid,)), table)
    found = attribute(model, table, IDS, overlay, likeliest.target)
    assert found.terms.logit == found.terms.bias == found.log_probability == -float("inf")
    assert torch.equal(found.terms.contributions, likeliest.terms.contributions)
    assert attribute(model, table, IDS, overlay).target == int(model(IDS[None])[0, -1, :REAL].topk(2).indices[1])


def test_the_release_never_changes_the_weights(model: Backpack, table: SenseTable, overlay: Overlay) -> None:
    plain = attribute(model, table, IDS, Overlay.compile(ReleaseContent(), table))
    torch.testing.assert_close(attribute(model, table, IDS, overlay).terms.weights, plain.terms.weights)
    torch.testing.assert_close(plain.terms.weights.sum(0), torch.ones(K))


def test_a_sense_reads_as_its_extreme_projections(model: Backpack, table: SenseTable) -> None:
    edit = ScaleEdit((Cell(9, 2),), -1.0)
    overlay = Overlay.compile(ReleaseContent((RevisionContent("ab" * 32, (edit,)),)), table)
    plain = read_senses(model, table, 9, Overlay.compile(ReleaseContent(), table), 5)
    edited = read_senses(model, table, 9, overlay, 5)
    scores = model.embedding[:REAL] @ table.rows[9, 2]
    assert [t for t, _ in plain[2].positive] == scores.topk(5).indices.tolist()
    assert [t for t, _ in edited[2].positive] == [t for t, _ in plain[2].negative]
    assert [sense.edited for sense in edited] == [False, False, True, False]
    assert [sense.edited for sense in plain] == [False] * K


def test_neighbours_are_the_words_whose_same_sense_is_nearest(model: Backpack, table: SenseTable) -> None:
    overlay = Overlay.compile(ReleaseContent((RevisionContent("ab" * 32, (ScaleEdit((Cell(9, 2),), -1.0),)),)), table)
    found = read_senses(model, table, 9, overlay, 1, neighbours=4)
    for sense in range(K):
        own = -table.rows[9, sense] if sense == 2 else table.rows[9, sense]
        cosines = {y: float(torch.cosine_similarity(own, table.rows[y, sense], dim=0)) for y in range(REAL) if y != 9}
        nearest = sorted(cosines, key=cosines.__getitem__, reverse=True)[:4]
        assert [y for y, _ in found[sense].neighbours] == nearest
        assert [c for _, c in found[sense].neighbours] == pytest.approx([cosines[y] for y in nearest], abs=1e-5)
    assert read_senses(model, table, 9, overlay, 1)[0].neighbours == ()
