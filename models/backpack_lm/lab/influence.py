"""Which cells of the sense table influence an example: what sense finetuning may change, and where.

α doesn't depend on sense vectors. So deltas δ [cells, d] change a position's output to o + A·δ, where the
position's row of A is the α that it gives to each cell. Positions with A = 0 can't change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backpack_lm.lab.examples import CanonicalExample
from backpack_lm.lab.lab_model import LabModel, SteeredModel
from backpack_lm.patch import Cell


@dataclass(frozen=True, slots=True)
class Positions:
    """Positions that the chosen cells influence: weights A [N, cells], outputs o [N, d], next tokens [N].

    `total` positions were read; the others can't change.
    """

    weights: Tensor
    outputs: Tensor
    targets: Tensor
    total: int

    def loss(self, head: Tensor, deltas: Tensor) -> float:
        """Summed cross-entropy, in nats, in chunks."""
        loss = 0.0
        for at in range(0, len(self.targets), 512):
            part = slice(at, at + 512)
            logits = (self.outputs[part] + self.weights[part] @ deltas) @ head.t()
            loss += float(F.cross_entropy(logits, self.targets[part], reduction="sum"))
        return loss


@torch.inference_mode()
def choose_cells(
    subject: LabModel, examples: Sequence[CanonicalExample], background: Tensor, count: int, penalty: float
) -> list[Cell]:
    """For each example the `count` cells with the largest Σα on its targets minus `penalty` times the cell's mean
    Σα at a position of background rows [N, T + 1]; their union, in order."""
    ordinary = torch.zeros(subject.config.vocab_size, subject.config.num_senses)
    for row in background[:, :-1]:
        alpha = subject.model.sense_weights(row[None])[0].sum(1).t()  # [T, k]: over all predictions
        ordinary.index_add_(0, row, alpha)
    ordinary /= background[:, :-1].numel()
    chosen: set[Cell] = set()
    for example in examples:
        ids, first = example.ids(subject)
        alpha = subject.model.sense_weights(torch.tensor([ids[:-1]]))[0][:, first - 1 :].sum(1).t()  # [T, k]
        score = torch.zeros_like(ordinary).index_add_(0, torch.tensor(ids[:-1]), alpha)
        present = torch.zeros(len(score), dtype=torch.bool)
        present[ids[:-1]] = True
        score = (score - penalty * ordinary).masked_fill(~present[:, None], float("-inf"))
        best = score.flatten().topk(min(count, int(present.sum()) * score.shape[1])).indices.tolist()
        chosen.update(Cell(*divmod(at, score.shape[1])) for at in best)
    return sorted(chosen)


@torch.no_grad()
def positions_of(subject: LabModel, rows: Sequence[Tensor], firsts: Sequence[int], cells: Sequence[Cell]) -> Positions:
    """The positions in rows of ids that the chosen cells influence; of each row, those from index `first` on."""
    tokens = sorted({cell.token for cell in cells})
    column = {cell: at for at, cell in enumerate(cells)}
    model, weights, outputs, targets, total = SteeredModel(subject, subject.overlay()), [], [], [], 0
    for row, first in zip(rows, firsts, strict=True):
        ids = row[:-1]
        total += len(ids) - first
        here = [token for token in tokens if bool((ids == token).any())]
        if not here:
            continue
        alpha = subject.model.sense_weights(ids[None])  # [1, k, T, T]
        influence = torch.zeros(len(ids), len(cells))
        for token in here:
            given = alpha[0][:, :, ids == token].sum(-1)  # [k, T]
            for sense in range(len(given)):
                if (at := column.get(Cell(token, sense))) is not None:
                    influence[:, at] = given[sense]
        kept = influence.any(1)
        kept[:first] = False
        weights.append(influence[kept])
        outputs.append(model.mix_by(alpha, ids[None])[0, kept])
        targets.append(row[1:][kept])
    if not weights:
        width = subject.config.n_embd
        return Positions(torch.empty(0, len(cells)), torch.empty(0, width), torch.empty(0, dtype=torch.long), total)
    return Positions(torch.cat(weights), torch.cat(outputs), torch.cat(targets), total)
