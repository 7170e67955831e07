"""Searches find what a dense computation over the whole table finds, in one pass over it as it is stored."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from backpack_lm.attribution import attribute
from backpack_lm.int8 import restore, store
from backpack_lm.kernels import build, scan
from backpack_lm.kernels.build import NotBuilt
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import Cell, Edit, ReleaseContent, RevisionContent, ScaleEdit, TopicEdit
from backpack_lm.sense_search import CellSearch, Effect, RankedCell
from torch import Tensor

from tests.models.conftest import REAL, K

WORDS, AGAINST = (7, 8), (30,)
PROMPTS = ([3, 9, 9, 12], [5], [9, 41, 3, 3, 3])
SCALED = ScaleEdit((*(Cell(9, sense) for sense in range(K)), Cell(12, 1), Cell(3, 0)), -3.0)
TOPIC = TopicEdit((7, 40), 3)
RELEASES: dict[str, tuple[Edit, ...]] = {
    "none": (),
    "rows": (SCALED,),
    "topic": (TOPIC,),
    "both": (ScaleEdit((Cell(12, 2),), 0.0), SCALED, TOPIC),
}
FREQUENCIES = torch.rand(REAL, generator=torch.Generator().manual_seed(1)) * 1000


def _overlay(table: SenseTable, edits: tuple[Edit, ...]) -> Overlay:
    return Overlay.compile(ReleaseContent((RevisionContent("ab" * 32, edits),)) if edits else ReleaseContent(), table)


def _dense(model: Backpack, table: SenseTable, overlay: Overlay, against: Sequence[int] | None) -> Tensor:
    """E[y] · C(x)_l of every cell, word by word: [V, k] float64. Against None, which is all words, or some."""
    ids = torch.arange(REAL)
    vectors = overlay.replace(ids[None], table.vectors(ids)[None])[0].double()
    of_words = vectors @ model.embedding[:REAL].double().t()  # [V, k, V]
    for topic in overlay.topics:
        of_words *= topic.targets(ids)[..., None]
    scores, others = of_words[..., list(WORDS)].mean(-1), range(REAL) if against is None else against
    return scores - of_words[..., list(others)].mean(-1) if others else scores


def _order(values: Tensor, effect: Effect) -> list[tuple[int, int]]:
    sizes = {(t, s): float(effect.size(values[t, s])) for t in range(REAL) for s in range(K)}
    return sorted((cell for cell in sizes if sizes[cell] > 0), key=lambda cell: -sizes[cell])


def _places(cells: Sequence[RankedCell]) -> list[tuple[int, int]]:
    return [(cell.token, cell.sense) for cell in cells]


@pytest.mark.parametrize("effect", Effect)
@pytest.mark.parametrize("against", [(), AGAINST, None])
@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_cells_are_those_of_a_dense_computation(
    model: Backpack, table: SenseTable, name: str, against: tuple[int, ...] | None, effect: Effect, dtype: torch.dtype
) -> None:
    stored = SenseTable(store(table.rows, dtype), table.embedding, table.unscored)
    overlay = _overlay(stored, RELEASES[name])
    dense, plain = _dense(model, stored, overlay, against), _dense(model, stored, _overlay(stored, ()), against)
    search = CellSearch(model, stored, overlay, WORDS, against, effect, FREQUENCIES)
    for by_use in (False, True):
        found = search.cells(0, REAL * K, by_use)
        assert _places(found) == _order(dense * FREQUENCIES[:, None] if by_use else dense, effect)
        for cell in found:
            assert cell.score == pytest.approx(float(dense[cell.token, cell.sense]), abs=1e-5)
            assert cell.frequency == float(FREQUENCIES[cell.token])
            assert (cell.contribution, cell.prompts) == (None, 0)
            if not cell.edited:
                assert cell.score == pytest.approx(float(plain[cell.token, cell.sense]), abs=1e-5)
    if name == "rows":
        rows = set(SCALED.cells)
        assert {Cell(cell.token, cell.sense) for cell in found if cell.edited} == rows & {
            Cell(*place) for place in _places(found)
        }
    assert any(cell.edited for cell in found) == (name != "none")


def test_pages_fit_together_where_scores_are_equal(model: Backpack, table: SenseTable) -> None:
    """Copies of a row have the same score; what has none of the effect is on no page."""
    rows = table.rows.clone()
    rows[10:30] = rows[9]
    rows[40:50] = 0
    equal = SenseTable(rows, table.embedding)
    search = CellSearch(model, equal, _overlay(equal, ()), WORDS, effect=Effect.BOTH)
    whole = search.cells(0, REAL * K)
    assert _places(whole) == _order(_dense(model, equal, _overlay(equal, ()), ()).float(), Effect.BOTH)
    assert len(whole) == (REAL - 10) * K
    assert [cell for start in range(0, REAL * K, 7) for cell in search.cells(start, 7)] == whole


@pytest.mark.parametrize("effect", Effect)
@pytest.mark.parametrize("name", RELEASES)
def test_in_prompts_cells_add_what_explanations_say(
    model: Backpack, table: SenseTable, name: str, effect: Effect
) -> None:
    overlay = _overlay(table, RELEASES[name])
    added, prompts = torch.zeros(REAL, K, dtype=torch.float64), torch.zeros(REAL, K, dtype=torch.long)
    search = CellSearch(model, table, overlay, WORDS, AGAINST, effect)
    for ids in PROMPTS:
        search.read(ids)
        here = torch.zeros(REAL, K, dtype=torch.float64)
        for word, share in [(word, 1 / len(WORDS)) for word in WORDS] + [(word, -1.0) for word in AGAINST]:
            terms = attribute(model, table, torch.tensor(ids), overlay, word).terms
            for position, token in enumerate(ids):
                here[token] += share * terms.contributions[position]
        added += here
        prompts += effect.size(here) > 0
    found = search.cells(0, REAL * K)
    assert _places(found) == _order(added, effect)
    assert {cell.token for cell in found} <= {token for ids in PROMPTS for token in ids}
    dense = _dense(model, table, overlay, AGAINST)
    for cell in found:
        assert cell.contribution == pytest.approx(float(added[cell.token, cell.sense]), abs=1e-6)
        assert cell.prompts == int(prompts[cell.token, cell.sense])
        assert cell.score == pytest.approx(float(dense[cell.token, cell.sense]), abs=1e-5)
        assert cell.frequency is None
    assert max(cell.prompts for cell in found) == 2, "token 3 and token 9 are in two prompts"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("width", [1, 15, 16, 60, 64, 65, 130, 192])
@pytest.mark.parametrize("rows", [1, 3, 4, 1027])
def test_the_library_scans_as_torch_does(dtype: torch.dtype, width: int, rows: int) -> None:
    build.library()  # or this would compare torch with itself
    torch.manual_seed(0)
    exact, direction = torch.randn(rows, width), torch.randn(width)
    stored = store(exact, dtype).view(rows, 1, -1)
    found = scan.project(stored, direction)
    assert found.shape == (rows, 1)
    exactly = restore(stored)[:, 0].double() @ direction.double()
    for one in (found, scan.project_plainly(stored, direction)):
        torch.testing.assert_close(one[:, 0].double(), exactly, rtol=1e-5, atol=1e-5)


def test_without_a_library_torch_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise NotBuilt("no C++ compiler")

    monkeypatch.setattr(scan, "library", none)
    monkeypatch.setattr(scan, "CHUNK", 3)
    rows, direction = torch.randn(5, 2, 8), torch.randn(8)
    torch.testing.assert_close(scan.project(rows, direction), rows @ direction)
