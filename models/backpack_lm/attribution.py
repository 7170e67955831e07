"""Why a token is predicted, and what a sense means: exact readings of a Backpack's linear output.

The logit of word y at position i is Σ_{j,l} α[l,i,j] · m[i,j,l] · (E[y]·C(x_j)_l) (paper, section 2.2), with m
the multipliers of an overlay's topics. Every term below is one of that sum, none is estimated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable


@dataclass(frozen=True, slots=True)
class Attribution:
    """The terms of one logit: weights α, multipliers and contributions, each [T, k]; they sum to `logit`."""

    target: int
    log_probability: float
    weights: Tensor
    multipliers: Tensor
    contributions: Tensor

    @property
    def logit(self) -> float:
        return float(self.contributions.sum())


@torch.inference_mode()
def attribute(
    model: Backpack, table: SenseTable, ids: Tensor, overlay: Overlay, target: int | None = None
) -> Attribution:
    """Explain the token after ids [T]; by default the likeliest one."""
    alpha = model.sense_weights(ids[None])[0, :, -1].t()  # [T, k]
    senses = overlay.replace(ids[None], table.rows[ids][None].float())
    multipliers = overlay.multipliers(ids[None], senses, model.embedding)[0, -1].expand(alpha.shape)
    mixed = torch.einsum("jl,jld->jld", alpha * multipliers, senses[0]).double()
    head = model.embedding[: model.config.tokens].double()
    logits = head @ mixed.sum((0, 1))
    target = int(logits.argmax()) if target is None else target
    return Attribution(
        target,
        float(logits.log_softmax(-1)[target]),
        alpha,
        multipliers,
        mixed @ head[target],
    )


@torch.inference_mode()
def token_log_probabilities(model: Backpack, ids: Tensor, overlay: Overlay) -> Tensor:
    """log p(x_i | x_<i) for i ≥ 1 of ids [T]: [T − 1], natural logarithm."""
    if len(ids) < 2:
        return torch.empty(0)
    logits = model(ids[None, :-1], overlay)[0, :, : model.config.tokens]
    logs: Tensor = logits.double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return logs


@dataclass(frozen=True, slots=True)
class SenseReading:
    """What one sense of a word predicts: tokens whose logit it raises most and lowers most, with E[y]·C(x)_l; and
    the words whose same sense lies nearest in the unedited model, with the cosine."""

    norm: float
    edited: bool
    positive: tuple[tuple[int, float], ...]
    negative: tuple[tuple[int, float], ...]
    neighbours: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def read_senses(
    model: Backpack, table: SenseTable, token: int, overlay: Overlay, limit: int, neighbours: int = 0
) -> list[SenseReading]:
    """Every sense of a token as it stands under an overlay (paper, section 3.3 and table 2)."""
    ids = torch.tensor([token])
    vectors = overlay.replace(ids, table.rows[ids].float())[0]  # [k, d]
    edited = (overlay.row_index(ids)[0] >= 0).tolist()
    scores = vectors @ model.embedding[: model.config.tokens].t()  # [k, V]
    high, low = scores.topk(limit), scores.topk(limit, largest=False)
    norms = vectors.norm(dim=-1).tolist()
    near = _nearest(table.rows[: model.config.tokens], vectors, token, neighbours)
    return [
        SenseReading(
            norms[sense],
            edited[sense],
            tuple(zip(high.indices[sense].tolist(), high.values[sense].tolist(), strict=True)),
            tuple(zip(low.indices[sense].tolist(), low.values[sense].tolist(), strict=True)),
            tuple(zip(near.indices[sense].tolist(), near.values[sense].tolist(), strict=True)),
        )
        for sense in range(len(vectors))
    ]


def _nearest(rows: Tensor, vectors: Tensor, token: int, count: int) -> torch.return_types.topk:
    """For each sense the `count` tokens, but not `token`, whose vectors [V, k, d] lie nearest to `vectors`."""
    if count == 0:
        return vectors[:, :0].topk(0)
    parts = [torch.cosine_similarity(part, vectors, dim=-1) for part in rows.split(4096)]
    cosines = torch.cat(parts)  # [V, k]
    cosines[token] = float("-inf")
    return cosines.t().topk(count)
