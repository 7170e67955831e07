"""What a release does to ordinary text, against the model's slow oracle."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backpack_lm.installed import folder_of
from backpack_lm.ordinary_text import EXCERPT_TOKENS, EXCERPTS, OrdinaryText, excerpts, plain, rows_of, shipped
from backpack_lm.overlay import Overlay
from backpack_lm.patch import BiasEdit, Cell, CopyEdit, Edit, ReleaseContent, RevisionContent, ScaleEdit, TopicEdit
from backpack_serving.errors import PreconditionFailed
from backpack_serving.inference.served_model import ServedModel


def _overlay(served: ServedModel, *edits: Edit) -> Overlay:
    revisions = (RevisionContent(served.manifest.fingerprint, edits),) if edits else ()
    return Overlay.compile(ReleaseContent(revisions), served.table)


@pytest.fixture(scope="module")
def rows(served: ServedModel) -> list[torch.Tensor]:
    text = plain(shipped(folder_of("micro")))
    return [row[:40] for row in excerpts(text, served.tokenizer, 64)[:3]]


def _edits(served: ServedModel, rows: list[torch.Tensor], kind: str) -> tuple[Edit, ...]:
    common = int(torch.cat(rows).mode().values)
    cells = tuple(Cell(common, sense) for sense in range(served.manifest.config.num_senses))
    match kind:
        case "scaled":
            return (ScaleEdit(cells, 0.0),)
        case "copied":
            return (CopyEdit(cells, served.tokenizer.word_ids("king")[0]),)
        case "biased":
            return (BiasEdit((common,), -2.0), BiasEdit(served.tokenizer.word_ids("king"), 3.0))
        case "forbidden":
            return (BiasEdit((common,), -math.inf), ScaleEdit(cells, 0.5))
        case "topic":
            return (TopicEdit(served.tokenizer.word_ids("sea"), 3),)
    return ()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["none", "scaled", "copied", "biased", "forbidden", "topic"])
def test_side_effects_are_the_models_own(served: ServedModel, rows: list[torch.Tensor], kind: str, keep: bool) -> None:
    overlay, count = _overlay(served, *_edits(served, rows, kind)), sum(len(row) - 1 for row in rows)
    sums, logs = {}, {}
    with torch.inference_mode():
        for name, given in (("before", _overlay(served)), ("after", overlay)):
            found = [served.model(row[None, :-1], given)[0].double().log_softmax(-1) for row in rows]
            logs[name] = torch.cat([log.gather(1, row[1:, None]) for log, row in zip(found, rows, strict=True)])
            sums[name] = sum(log.exp().sum(0) for log in found) / count
    forbidden = logs["after"] == -math.inf
    assert bool(forbidden.any()) is (kind == "forbidden")
    logs["after"] = logs["after"].masked_fill(forbidden, -math.log(served.manifest.config.tokens))
    text = OrdinaryText(served.model, served.table, rows, keep)
    for _ in range(2):  # the second time, what was kept
        effects = text.under(overlay, limit=10)
        assert effects.tokens == count
        assert effects.before == pytest.approx(float((-logs["before"].mean()).exp()), rel=1e-5)
        assert effects.after == pytest.approx(float((-logs["after"].mean()).exp()), rel=1e-5)
        assert effects.change == pytest.approx(effects.after / effects.before - 1)
        if kind == "none":
            assert not effects.moved
            assert effects.after == effects.before
            continue
        moves = (sums["after"] - sums["before"]).abs()
        assert moves[effects.moved[0].token] == pytest.approx(float(moves.max()), rel=1e-4)
        for word in effects.moved:
            assert word.before == pytest.approx(float(sums["before"][word.token]), rel=1e-4, abs=1e-9)
            assert word.after == pytest.approx(float(sums["after"][word.token]), rel=1e-4, abs=1e-9)


def test_excerpts_are_spread_over_the_text_and_begin_at_lines(served: ServedModel) -> None:
    lines = [f"The ship number {n} sailed over the sea to the land." for n in range(3000)]
    found = excerpts("\n".join(lines), served.tokenizer, 512)
    assert [len(row) for row in found] == [EXCERPT_TOKENS] * EXCERPTS
    begins = [served.tokenizer.decode(row[:4].tolist()) for row in found]
    assert all(text.startswith("The ship number") for text in begins)
    assert len({str(row.tolist()) for row in found}) == EXCERPTS, "of different places"
    assert len(excerpts("One short line.", served.tokenizer, 512)) == 1
    assert not excerpts("", served.tokenizer, 512)


def test_rows_of_a_stream_share_a_token() -> None:
    assert [row.tolist() for row in rows_of(torch.arange(8), 3)] == [[0, 1, 2, 3], [3, 4, 5, 6]]


def test_a_folder_without_text_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="held_out"):
        shipped(tmp_path)


def test_a_model_without_text_of_its_own_judges_nothing(served: ServedModel, tmp_path: Path) -> None:
    for content in (None, b"no xz"):
        if content:
            (tmp_path / "held_out.txt.xz").write_bytes(content)
        with pytest.raises(PreconditionFailed, match=r"put some .* into held_out\.txt\.xz") as refused:
            replace(served, folder=tmp_path).ordinary_text()
        assert refused.value.reason == "NO_HELD_OUT_TEXT"


def test_to_forbid_what_every_text_has_makes_it_worse_and_a_rare_word_hardly(served: ServedModel) -> None:
    rows = excerpts(plain(shipped(folder_of("micro"))), served.tokenizer, served.manifest.config.n_positions)
    ids = [int(token) for row in rows for token in row]
    common = sorted(set(ids), key=ids.count, reverse=True)
    text = OrdinaryText(served.model, served.table, rows)
    for tokens, bounds in ((common[1:200], (1.0, math.inf)), (common[-2:], (-0.01, 0.02))):
        change = text.under(_overlay(served, BiasEdit(tuple(tokens), -math.inf)), 4).change
        assert bounds[0] <= change <= bounds[1]
