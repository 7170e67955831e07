"""Many releases side by side: a text's probabilities, or the next token's, with one pass of the trunk.

The head is repeated only where a release changes the output, and in pieces: 512 positions × 50,257 words × 256
releases are never held at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.trunk_pass import TrunkPass

HEAD_BYTES = 32 * 2**20
"""Logits that are held at once."""

R_co = TypeVar("R_co", covariant=True)


class Comparison(Protocol[R_co]):
    """A text that was read once by the trunk."""

    def read(self, overlays: Sequence[Overlay]) -> Sequence[R_co]:
        """What is asked of the text, under each of these releases."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Next tokens with log p (natural logarithm): the likeliest, most likely first, and those asked for."""

    top: tuple[tuple[int, float], ...]
    targets: tuple[tuple[int, float], ...]


class Scoring:
    """log p of each token of ids [T ≥ 2] but the first, under any releases."""

    def __init__(self, model: Backpack, table: SenseTable, ids: Tensor) -> None:
        self._head = model.embedding.detach()[: model.config.tokens]
        self._next = ids[1:]
        self._pass = TrunkPass(model, table, ids[:-1])
        self._plain = torch.empty(0)

    @torch.inference_mode()
    def read(self, overlays: Sequence[Overlay]) -> list[list[float]]:
        """T − 1 numbers for each release."""
        return [self._under(overlay).tolist() for overlay in overlays]

    @torch.inference_mode()
    def likeliest(self, overlay: Overlay, top: int) -> list[list[tuple[int, float]]]:
        """The `top` likeliest tokens in the place of each of the T − 1, most likely first, with log p."""
        found = []
        for _, logits in logits_in_pieces(self._outputs(overlay), self._head):
            logits = overlay.biased(logits)
            values, tokens = logits.topk(top)
            logs = values - logits.logsumexp(1)[:, None]
            found += [list(zip(*row, strict=True)) for row in zip(tokens.tolist(), logs.tolist(), strict=True)]
        return found

    def _outputs(self, overlay: Overlay) -> Tensor:
        """o [T − 1, d]."""
        first, changed = self._pass.under(overlay)
        return torch.cat([self._pass.base[:first], changed])

    def _under(self, overlay: Overlay) -> Tensor:
        if overlay.bias:  # no position stays as the model has it
            return self._logs(self._outputs(overlay), self._next, overlay)
        first, changed = self._pass.under(overlay)
        return torch.cat([self._unpatched(first), self._logs(changed, self._next[first:])])

    def _unpatched(self, count: int) -> Tensor:
        """log p of the first `count` tokens as the model has them; each is computed once, and if it is wanted."""
        done = len(self._plain)
        if done < count:
            more = self._logs(self._pass.base[done:count], self._next[done:count])
            self._plain = torch.cat([self._plain, more])
        return self._plain[:count]

    def _logs(self, outputs: Tensor, tokens: Tensor, overlay: Overlay | None = None) -> Tensor:
        """log p of one token for each output [N, d], with an overlay's biases: [N]."""
        logs = [torch.empty(0)]
        for at, logits in logits_in_pieces(outputs, self._head):
            logits = overlay.biased(logits) if overlay else logits
            chosen = logits.gather(1, tokens[at : at + len(logits), None])[:, 0]
            logs.append(chosen - logits.logsumexp(1))
        return torch.cat(logs)


class Predicting:
    """The next token after ids [T], under any releases: the `top` likeliest, and `targets`."""

    def __init__(self, model: Backpack, table: SenseTable, ids: Tensor, top: int, targets: Sequence[int] = ()) -> None:
        self._head = model.embedding.detach()[: model.config.tokens]
        self._top, self._targets = top, torch.tensor(targets, dtype=torch.long)
        self._pass = TrunkPass(model, table, ids, start=len(ids) - 1)

    @torch.inference_mode()
    def read(self, overlays: Sequence[Overlay]) -> list[Distribution]:
        """One distribution for each release; those that leave the text alone share the unpatched one."""
        outputs, rows = [self._pass.base], []
        biased: dict[int, Overlay] = {}
        for overlay in overlays:
            first, changed = self._pass.under(overlay)
            if first and not overlay.bias:
                rows.append(0)
                continue
            rows.append(len(outputs))
            outputs.append(self._pass.base if first else changed)
            if overlay.bias:
                biased[rows[-1]] = overlay
        found: list[Distribution] = []
        for at, logits in logits_in_pieces(torch.cat(outputs), self._head):
            for row in biased.keys() & range(at, at + len(logits)):
                logits[row - at] = biased[row].biased(logits[row - at])
            found += self._distributions(logits)
        return [found[row] for row in rows]

    def _distributions(self, logits: Tensor) -> list[Distribution]:
        logs = logits.log_softmax(1)
        values, tokens = (part.tolist() for part in logs.topk(self._top))
        wanted, names = logs[:, self._targets].tolist(), self._targets.tolist()
        return [
            Distribution(tuple(zip(tokens[row], values[row], strict=True)), tuple(zip(names, wanted[row], strict=True)))
            for row in range(len(logits))
        ]


def logits_in_pieces(outputs: Tensor, head: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Logits [·, V] of outputs [N, d] under E [V, d], in pieces, each with the row that it begins at."""
    rows = max(1, HEAD_BYTES // (4 * len(head)))
    for at in range(0, len(outputs), rows):
        yield at, outputs[at : at + rows] @ head.t()
