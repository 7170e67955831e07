"""What the engine has of the model: something that keeps its sequences and computes its steps, tokens included.

The engine schedules and commits. Where a step is computed, on one rank in this process (`runner.py`) or on several,
it doesn't know.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as Many
from typing import NamedTuple, Protocol

from backpack_lm.config import BackpackConfig
from backpack_lm.kernels import Kernels, TokenSpan
from backpack_lm.overlay import Overlay
from torch import Tensor

from backpack_serving.engine.logits import change_all
from backpack_serving.engine.sampler import choose_all, log_probabilities
from backpack_serving.engine.scheduler import Batch
from backpack_serving.engine.sequence import LogProbability, Sequence


class RankLost(ChildProcessError):
    """Another rank ended or hangs: which, and how that was found out. No step can be computed any more.

    Commands print a lost rank as one line, as they do any OSError.
    """


class Choice(NamedTuple):
    """The next token of a sequence, with its log-probability if that was asked for. None: nothing could be drawn,
    because the logits aren't `finite`, or because the sequence's grammar allows nothing."""

    token: int | None
    log_probability: LogProbability | None
    finite: bool


class Step(NamedTuple):
    """A batch as ranks are told of it: ids [N] of its new tokens; spans [S] of them, the decoding sequences' first;
    how many of those there are; and which of the spans get a token [B]."""

    ids: list[int]
    spans: list[TokenSpan]
    decodes: int
    sampled: list[int]

    @classmethod
    def of(cls, batch: Batch) -> Step:
        spans = [TokenSpan(n, _slot(s), len(s.tokens) - 1, 1) for n, s in enumerate(batch.decodes)]
        ids = [s.tokens[-1] for s in batch.decodes]
        sampled = list(range(len(spans)))
        for chunk in batch.chunks:
            if chunk.completes:
                sampled.append(len(spans))
            spans.append(TokenSpan(len(ids), _slot(chunk.sequence), chunk.start, chunk.end - chunk.start))
            ids += chunk.sequence.tokens[chunk.start : chunk.end]
        return cls(ids, spans, len(batch.decodes), sampled)


class Executor(Protocol):
    """The model's caches, and the steps over them. One thread calls it."""

    config: BackpackConfig
    context: int
    """Most positions of a sequence."""
    pages: int
    """Pages of the caches in all."""
    page_size: int
    heartbeat: float | None
    """Seconds after which an idle engine calls `check`; None if there is nothing to check."""

    def load(self, overlay: Overlay, first_row: int) -> None:
        """Copy a release's rows behind the table, from `first_row` of the space kept for them."""

    def start(self, slot: int, overlay: Overlay, first_row: int) -> None:
        """Give a slot to a sequence steered by an overlay whose rows are loaded at `first_row`."""

    def set_pages(self, slot: int, start: int, pages: Many[int]) -> None:
        """Say which pages hold a slot's positions, from its page `start` on."""

    def copy_page(self, donor: int, page: int, count: int) -> None:
        """Copy the first `count` positions of a page into another."""

    def reuse(self, slot: int, tokens: Many[int]) -> None:
        """Begin a slot with tokens whose keys and values are in its pages already."""

    def digest(self, slot: int) -> str:
        """Digest of the release that the slot's sequence is being computed with."""

    def stop(self, slot: int) -> None:
        """Free a slot."""

    def execute(self, batch: Batch, ends: Collection[int]) -> list[Choice]:
        """Compute a batch and draw a token for each of `batch.sampled`; `ends` are the ids that end a text."""

    def check(self) -> None:
        """Raise RankLost if steps can't be computed any more."""

    def close(self) -> None:
        """End what runs elsewhere."""


def choose_tokens(logits: Tensor, sequences: Many[Sequence], ends: Collection[int], kernels: Kernels) -> list[Choice]:
    """The next token of each of some sequences, by their logits [B, V]."""
    samplings, positions = [s.request.sampling for s in sequences], [len(s.tokens) for s in sequences]
    tokens = choose_all(change_all(logits, sequences, ends), samplings, positions, kernels.draw)
    logs = log_probabilities(logits, tokens, samplings, kernels.log_probabilities)
    return [
        Choice(token, log, token is not None or bool((logits[n] < math.inf).all()))
        for n, (token, log) in enumerate(zip(tokens, logs, strict=True))
    ]


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None, "a running sequence has a slot"
    return sequence.slot
