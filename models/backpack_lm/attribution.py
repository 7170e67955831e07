"""Why a token is predicted, and what a sense means: exact readings of a Backpack's linear output.

The logit of word y at position i is Σ_{j,l} α[l,i,j] · m[i,j,l] · (E[y]·C(x_j)_l) + b[y] (paper, section 2), with m
the multipliers of an overlay's topics and b its biases. Every term below is one of that sum, none is estimated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.trunk_pass import TrunkPass


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a logit: α · multiplier · (E[y]·C(x_position)_sense)."""

    position: int
    sense: int
    weight: float
    multiplier: float
    contribution: float


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of one logit: weights α, multipliers and contributions, each [T, k], which sum to `logit` with the
    release's bias on the word."""

    weights: Tensor
    multipliers: Tensor
    contributions: Tensor
    bias: float = 0.0

    @property
    def logit(self) -> float:
        return float(self.contributions.sum()) + self.bias

    def largest(self, limit: int) -> tuple[list[Term], float]:
        """The terms of largest magnitude, largest first, and the sum of the others."""
        flat, num_senses = self.contributions.flatten(), self.contributions.shape[1]
        order = flat.abs().argsort(descending=True)
        listed = order[:limit]
        columns = (part.flatten()[listed].tolist() for part in (self.weights, self.multipliers, flat))
        terms = [
            Term(at // num_senses, at % num_senses, *values)
            for at, *values in zip(listed.tolist(), *columns, strict=True)
        ]
        return terms, float(flat[order[limit:]].sum())


@dataclass(frozen=True, slots=True)
class Attribution:
    """The terms of the logit of `target`, a next token, and its log p."""

    terms: Terms
    target: int
    log_probability: float


@torch.inference_mode()
def attribute(
    model: Backpack, table: SenseTable, ids: Tensor, overlay: Overlay, target: int | None = None
) -> Attribution:
    """Explain the token after ids [T]; by default the likeliest one."""
    read = TrunkPass(model, table, ids, start=len(ids) - 1)
    weights, multipliers, mixed = _mixed_senses(read, overlay)
    head = model.embedding[: model.config.tokens]
    logs = overlay.biased(head @ mixed.sum((0, 1)).float()).log_softmax(-1)
    target = int(logs.argmax()) if target is None else target
    terms = Terms(weights, multipliers, mixed @ head[target].double(), overlay.bias_of(target))
    return Attribution(terms, target, float(logs[target]))


@torch.inference_mode()
def attribute_along(model: Backpack, table: SenseTable, ids: Tensor, overlay: Overlay, direction: Tensor) -> Terms:
    """Explain o·direction after ids [T], direction [d]: of a mean of embeddings, the mean of those words' logits."""
    read = TrunkPass(model, table, ids, start=len(ids) - 1)
    weights, multipliers, mixed = _mixed_senses(read, overlay)
    return Terms(weights, multipliers, mixed @ direction.double())


def _mixed_senses(read: TrunkPass, overlay: Overlay) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first prediction: weights and multipliers, each [T, k], and α·m·C, whose sum is o, [T, k, d] float64."""
    weights, multipliers = read.alpha[0], read.multipliers(overlay)[0]
    return weights, multipliers, (weights * multipliers).double()[..., None] * read.replaced(overlay)


@torch.inference_mode()
def attribute_text(model: Backpack, table: SenseTable, ids: Tensor, overlay: Overlay, start: int) -> list[Terms]:
    """Explain each token of ids [T] from position `start` ≥ 1 on, as what stands before it predicted it.

    One pass of the trunk for all of them.
    """
    read = TrunkPass(model, table, ids[:-1], start - 1)
    multipliers = read.multipliers(overlay)  # [P, T − 1, k]
    senses, embedded = read.replaced(overlay).double(), model.embedding[ids[start:]].double()
    terms = (read.alpha * multipliers).double() * torch.einsum("pd,jld->pjl", embedded, senses)
    return [
        Terms(read.alpha[at, :end], multipliers[at, :end], terms[at, :end], overlay.bias_of(int(ids[end])))
        for at, end in enumerate(range(start, len(ids)))
    ]


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
    """Every sense of a token as it stands under an overlay (paper, section 5 and table 2)."""
    ids = torch.tensor([token])
    vectors = overlay.replace(ids, table.vectors(ids))[0]  # [k, d]
    edited = (overlay.row_index(ids)[0] >= 0).tolist()
    scores = vectors @ model.embedding[: model.config.tokens].t()  # [k, V]
    high, low = scores.topk(limit), scores.topk(limit, largest=False)
    norms = vectors.norm(dim=-1).tolist()
    near = _nearest(table, model.config.tokens, vectors, token, neighbours)
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


def _nearest(table: SenseTable, tokens: int, vectors: Tensor, token: int, count: int) -> torch.return_types.topk:
    """For each sense the `count` of so many tokens, but not `token`, whose vectors lie nearest to `vectors` [k, d]."""
    if count == 0:
        return vectors[:, :0].topk(0)
    slices = (slice(at, min(at + 4096, tokens)) for at in range(0, tokens, 4096))
    cosines = torch.cat([_cosines_by_sense(table.vectors(part), vectors) for part in slices])  # [V, k]
    cosines[token] = float("-inf")
    return cosines.t().topk(count)


def _cosines_by_sense(some: Tensor, vectors: Tensor) -> Tensor:
    """Of some [n, k, d] with vectors [k, d], sense by sense: [n, k]; 0 for zeros."""
    # Not torch.cosine_similarity, which writes the products [n, k, d] into memory.
    cosines: Tensor = torch.einsum("nkd,kd->nk", some, vectors)
    return cosines.div_((some.norm(dim=-1) * vectors.norm(dim=-1)).clamp_min(1e-12))
