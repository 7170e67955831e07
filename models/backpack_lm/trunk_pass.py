"""One pass of the trunk over a text, to be read under any number of releases.

No release changes α, so what a release costs is the weighted sum where it differs from the model's own:

    o_i = o⁰_i + Σ_(j,l) α[i,j,l] · (C'(x_j)_l − C(x_j)_l)     over the edited cells (j, l) of the text

Positions before the first edited token stay as they are. A topic multiplies every cell, so it needs the whole sum.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable


class TrunkPass:
    """What the model makes of ids [T] for its predictions from position `start` on, P = T − start of them.

    `alpha` [P, T, k] are the sense weights, `senses` [T, k, d] the model's own vectors. All float32.
    """

    @torch.inference_mode()
    def __init__(self, model: Backpack, table: SenseTable, ids: Tensor, start: int = 0) -> None:
        self.ids, self.start = ids, start
        self.alpha = model.sense_weights(ids[None])[0, :, start:].permute(1, 2, 0).contiguous()
        self.senses = table.vectors(ids)
        self._embedded = model.embedding.detach()[ids].float()  # [T, d]

    @property
    def predictions(self) -> int:
        return len(self.alpha)

    @cached_property
    def base(self) -> Tensor:
        """o⁰ [P, d]: unpatched."""
        return self.alpha.flatten(1) @ self.senses.flatten(0, 1)

    def replaced(self, overlay: Overlay) -> Tensor:
        """The senses [T, k, d] as a release leaves them."""
        return overlay.replace(self.ids, self.senses)

    def multipliers(self, overlay: Overlay) -> Tensor:
        """What a release's topics multiply each cell by for each prediction, [P, T, k]; a one without topics."""
        if not any(topic.annealed for topic in overlay.topics):
            return overlay.annealed(self.ids, torch.zeros(1, 1, 1)).expand(self.alpha.shape)
        sums = self._own_sums
        cells, rows = self._edited(overlay)
        if len(cells):
            sums = sums.clone()
            sums.flatten(1)[:, cells] = self._sums(rows)
        return overlay.annealed(self.ids, sums)

    @torch.inference_mode()
    def under(self, overlay: Overlay) -> tuple[int, Tensor]:
        """The first of P predictions that a release changes, P if none, and o [·, d] from there on."""
        cells, rows = self._edited(overlay)
        if overlay.topics:
            weights = self.alpha * self.multipliers(overlay)
            return 0, weights.flatten(1) @ self.replaced(overlay).flatten(0, 1)
        if not len(cells):
            return self.predictions, self.base[:0]
        num_senses = self.senses.shape[1]
        first = max(0, int(cells[0]) // num_senses - self.start)
        changes = rows - self.senses.flatten(0, 1)[cells]
        return first, self.base[first:] + self.alpha.flatten(1)[first:, cells] @ changes

    @cached_property
    def _own_sums(self) -> Tensor:
        """a [P, T, k] of the model's own vectors."""
        return self._sums(self.senses.flatten(0, 1)).view(self.alpha.shape)

    def _sums(self, vectors: Tensor) -> Tensor:
        """Σ relu(E[x]·v) over the tokens x up to each prediction, for vectors v [n, d]: [P, n]."""
        return (self._embedded @ vectors.t()).relu().cumsum(0)[self.start :]

    def _edited(self, overlay: Overlay) -> tuple[Tensor, Tensor]:
        """The text's cells that a release replaces, ascending as j·k + l [n], and what by [n, d]."""
        index = overlay.row_index(self.ids).flatten()
        cells = (index >= 0).nonzero()[:, 0]
        return cells, overlay.rows[index[cells]]
