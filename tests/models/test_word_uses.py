"""Where a word is used, and what its senses said there: against logits with and without the sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backpack_lm.installed import folder_of
from backpack_lm.ordinary_text import plain, shipped
from backpack_lm.overlay import Overlay
from backpack_lm.patch import Cell, CopyEdit, ReleaseContent, RevisionContent
from backpack_lm.word_uses import AFTER, BEFORE, ParagraphedText, spread
from backpack_serving.inference.served_model import ServedModel
from torch.overrides import TorchFunctionMode

TEXT = "A ship came.\n\n  \nThe ship of the king was a ship\n" + "the sea and " * 40 + "the ship sank in the sea.\nship"


@pytest.fixture(scope="module")
def ship(served: ServedModel) -> int:
    (token,) = served.tokenizer.word_ids("ship")
    return token


def test_words_are_found_where_a_token_of_the_paragraph_follows(served: ServedModel, ship: int) -> None:
    text = ParagraphedText(TEXT, served.tokenizer, served.model)
    assert len(text) == sum(len(served.tokenizer.encode(line)) for line in TEXT.splitlines() if line.strip())
    uses = [text.use(served.table, _plain(served), place) for place in text.places(ship)]
    read = [tuple(map(served.tokenizer.decode, (use.before, use.after))) for use in uses]
    assert read[:2] == [("A", " came."), ("The", " of the king was a ship")], "the last ship of a paragraph is left out"
    assert len(read) == 3
    assert read[2][0].endswith("the sea and the")
    assert (len(uses[2].before), read[2][1]) == (BEFORE, " sank in the sea.")
    assert ParagraphedText("\n \n", served.tokenizer, served.model).places(ship) == []


@pytest.mark.parametrize("edited", [False, True])
def test_contributions_are_what_the_logits_lose_without_the_sense(served: ServedModel, ship: int, edited: bool) -> None:
    """By the model's own forward pass, with the sense set to zero by hand."""
    overlay = _plain(served)
    if edited:
        edit = CopyEdit((Cell(ship, 3),), 100, 1)
        release = ReleaseContent((RevisionContent(served.manifest.fingerprint, (edit,)),))
        overlay = Overlay.compile(release, served.table)
    text = ParagraphedText(plain(shipped(folder_of("micro"))), served.tokenizer, served.model)
    place = next(p for p in text.places(ship))
    use = text.use(served.table, overlay, place)
    assert 0 < len(use.after) <= AFTER
    model, at = served.model, len(served.tokenizer.bos_ids) + len(use.before)
    ids = torch.tensor([*served.tokenizer.bos_ids, *use.before, ship, *use.after])
    alpha = model.sense_weights(ids[None, :-1])[0]  # [k, T, T]
    senses = overlay.replace(ids, served.table.vectors(ids))[at]  # [k, d]
    head = model.embedding[: model.config.tokens]
    for step, token in enumerate(use.after):
        added = alpha[:, at + step, at, None] * senses @ head.t()  # [k, V]
        expected = added[:, token] - added.mean(1)
        assert use.contributions[step].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


class Means(TorchFunctionMode):
    """Notes of what shapes means are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.mean, torch.Tensor.mean):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_the_mean_over_the_vocabulary_is_taken_once(served: ServedModel, ship: int) -> None:
    with Means() as means:
        text = ParagraphedText(TEXT, served.tokenizer, served.model)
        for place in text.places(ship):
            text.use(served.table, _plain(served), place)
    assert means.shapes.count((served.manifest.config.tokens, served.manifest.config.n_embd)) == 1


def test_uses_are_spread_evenly() -> None:
    assert spread([1, 5, 9], 8) == [1, 5, 9]
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread([], 4) == []


def _plain(served: ServedModel) -> Overlay:
    return Overlay.compile(ReleaseContent(), served.table)
