"""Where one sense of many words lies: a map of the vectors C(x)_l of words x, and what its two axes speak for.

Without words to lie towards, the axes are the two directions of most variance (principal components). With some, x is
what the sense adds to their logits, v · r with r as in sense_search.py, and y is the direction of most variance of
what r leaves of the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.sense_search import direction_of


@dataclass(frozen=True, slots=True)
class MappedDirection:
    """A direction u of length 1: its share of the vectors' variance, and the tokens y whose logit rises most towards
    its positive and its negative end, with E[y]·u less the mean over the vocabulary."""

    share: float
    positive: tuple[tuple[int, float], ...]
    negative: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class MapReading:
    """`points` [n, 2] are the words' places, `norms` [n] the lengths of their vectors; `edited`: replaced by the
    release."""

    points: list[list[float]]
    norms: list[float]
    edited: list[bool]
    axes: tuple[MappedDirection, MappedDirection]


@torch.inference_mode()
def map_sense(
    model: Backpack,
    table: SenseTable,
    overlay: Overlay,
    words: Sequence[int],
    sense: int,
    toward: Sequence[int] = (),
    against: Sequence[int] = (),
    limit: int = 8,
) -> MapReading:
    """Map one sense of at least three words under an overlay. `against` () is all words of the vocabulary.

    Signs of principal components are chosen so that the word farthest out lies on the positive side. Raises
    ArithmeticError for vectors that aren't finite.
    """
    ids = torch.tensor(words)
    vectors = overlay.replace(ids, table.vectors(ids))[:, sense].double()  # [n, d]
    if not vectors.isfinite().all():
        raise ArithmeticError(f"sense {sense} of some of the words isn't finite")
    centred = vectors - vectors.mean(0)
    if toward:
        r = direction_of(model, toward, against or None).double()
        first = r / r.norm().clamp_min(1e-12)
        (second,) = _principal_directions(centred - torch.outer(centred @ first, first), 1)
        points = torch.stack([vectors @ r, centred @ second], 1)
    else:
        first, second = _principal_directions(centred, 2)
        points = centred @ torch.stack([first, second], 1)
    axes = _axis(model, centred, first, limit), _axis(model, centred, second, limit)
    return MapReading(
        points.tolist(), vectors.norm(dim=1).tolist(), (overlay.row_index(ids)[:, sense] >= 0).tolist(), axes
    )


def _principal_directions(centred: Tensor, count: int) -> Tensor:
    """The `count` directions of most variance of rows [n, d], each of length 1: [count, d]."""
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:count]
    places = centred @ directions.t()  # [n, count]
    farthest = places.gather(0, places.abs().argmax(0)[None])[0]
    signs: Tensor = torch.where(farthest < 0, -1.0, 1.0)
    signed: Tensor = directions * signs[:, None]
    return signed


def _axis(model: Backpack, centred: Tensor, direction: Tensor, limit: int) -> MappedDirection:
    total = float(centred.square().sum())
    share = float((centred @ direction).square().sum()) / total if total else 0.0
    scores = model.embedding[: model.config.tokens].float() @ direction.float()
    scores -= scores.mean()
    high, low = scores.topk(limit), scores.topk(limit, largest=False)
    ends = (tuple(zip(end.indices.tolist(), end.values.tolist(), strict=True)) for end in (high, low))
    return MappedDirection(share, *ends)
