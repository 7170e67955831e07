"""One step of the model over a mixed batch, with caches: the only file that touches device memory.

Linear layers run over all new tokens at once, flattened [N, d]; attention reads of each sequence's pages what is
valid. The sense mix is a lookup: every position of a slot keeps the k rows of the sense table that are its senses, and
a release's rows lie behind the table, so a patched sense costs what any sense costs. Releases' biases are added to the
logits of a whole batch at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from backpack_lm.config import BackpackConfig
from backpack_lm.int8 import store
from backpack_lm.kernels import Caches, Kernels, MixSpan, StepInput, TokenSpan, choose
from backpack_lm.kernels.caches import PAGE
from backpack_lm.kernels.cuda import CudaKernels
from backpack_lm.kernels.trunk import CachedTrunk
from backpack_lm.model import Backpack
from backpack_lm.overlay import LogitBias, Overlay, TopicMultipliers
from backpack_lm.sharding import Shard
from torch import Tensor

from backpack_serving.engine.collectives import Collectives
from backpack_serving.engine.executor import Choice, Step, choose_tokens
from backpack_serving.engine.graphs import Graphs, Record
from backpack_serving.engine.scheduler import Batch

SLOT_TOKENS = 512
"""Positions for each slot, by default: few sequences are longer, and those that are take what others leave."""


@dataclass(frozen=True, slots=True)
class Rank:
    """What makes a runner one of several: its part of the model `whole`, and how it meets the others."""

    shard: Shard
    whole: BackpackConfig
    collectives: Collectives


@dataclass(frozen=True, slots=True)
class _Occupant:
    """What a slot holds: the overlay it was started with, where its rows begin in the table, its topics on the
    device."""

    overlay: Overlay
    first_row: int
    edited: frozenset[int]
    topics: tuple[TopicMultipliers, ...]


@dataclass(frozen=True, slots=True)
class _BatchBias:
    """The biases of a batch's rows, together, at their places in its flattened logits. Kept until other sequences are
    in the batch: most steps only add them."""

    biases: tuple[LogitBias | None, ...]
    places: Tensor
    amounts: Tensor

    @classmethod
    def of(cls, biases: tuple[LogitBias | None, ...], logits: Tensor) -> _BatchBias:
        """For logits [B, tokens], on their device."""
        some = [bias for bias in biases if bias]
        starts = torch.tensor([row * logits.shape[1] for row, bias in enumerate(biases) if bias], dtype=torch.long)
        sizes = torch.tensor([len(bias.tokens) for bias in some], dtype=torch.long)
        none = torch.empty(0)  # a step may have no row with a bias
        places = torch.cat([none.long(), *(bias.tokens for bias in some)]) + starts.repeat_interleave(sizes)
        amounts = torch.cat([none, *(bias.amounts for bias in some)])
        return cls(biases, places.to(logits.device), amounts.to(logits.device))


class Runner:
    """The tensors of one replica: an `Executor` by itself.

    `table` [V·k + R, d] holds the model's sense vectors, as int8.py stores them, and has room for R rows of releases
    behind them; its device and dtype are those of the computation, wherever the model is. On a CUDA device decode
    steps are captured graphs; `record` is for tests without one.

    As one of several ranks, `model` is its part, and `table` that of all senses, of which only its own are read; on a
    CUDA device, `table` has its own senses alone. Overlays are its parts of them.

    `context` positions at most a sequence (0: as many as the model has), `cache_tokens` all of them together (0:
    512 for each slot, or the context if it is shorter, and one whole context in any case).
    """

    def __init__(
        self,
        model: Backpack,
        table: Tensor,
        slots: int,
        kernels: Callable[[Caches], Kernels] = choose,
        record: Record | None = None,
        *,
        context: int = 0,
        cache_tokens: int = 0,
        page_size: int = PAGE,
        rank: Rank | None = None,
    ) -> None:
        config = self.config = model.config
        self.table, device = table, table.device
        senses, self._each = range(config.num_senses), config.num_senses
        if rank and device.type == "cpu":
            senses, self._each = rank.shard.senses(rank.whole), rank.whole.num_senses
        self._senses = np.arange(senses.start, senses.stop, dtype=np.int32)
        self.base_rows = config.vocab_size * self._each
        self._rank = rank
        self.context = min(context or config.n_positions, config.n_positions)
        self.pages = -(-cache_tokens // page_size) or max(
            slots * -(-min(self.context, SLOT_TOKENS) // page_size), -(-self.context // page_size)
        )
        recorded = record is not None or (device.type == "cuda" and rank is None)
        # One slot and one page more, which no sequence gets, for graphs to fill up with.
        self.caches = Caches.empty(
            config,
            slots + recorded,
            table,
            model.embedding.detach(),
            context=self.context,
            pages=self.pages + recorded,
            page_size=page_size,
        )
        self.caches.page_table[slots:] = self.pages
        self.kernels = kernels(self.caches)
        tokens = rank.shard.vocabulary(rank.whole) if rank else range(config.tokens)  # padding is never sampled
        self._trunk = CachedTrunk(self.kernels, model, rank.collectives.sum) if rank else self.kernels.trunk(model)
        self._head = self.kernels.head(model.embedding[tokens.start : tokens.stop])
        self._occupants: list[_Occupant | None] = [None] * slots
        self._biases: dict[int, LogitBias] = {}  # by slot
        self._batch_bias = _BatchBias((), torch.empty(0, dtype=torch.long), torch.empty(0))
        self.page_size = page_size
        self.heartbeat: float | None = None
        self._graphs: Graphs | None = None
        if recorded and isinstance(self.kernels, CudaKernels):
            with torch.inference_mode():
                self._graphs = Graphs(self._decode, self.kernels, slots, record)

    def load(self, overlay: Overlay, first_row: int) -> None:
        """Copy a release's rows behind the table, from `first_row` of the space kept for them."""
        self.load_rows(overlay.rows, first_row)

    def load_rows(self, rows: Tensor, first_row: int) -> None:
        """As `load`, of rows [n, d] float32."""
        start = self.base_rows + first_row
        self.table[start : start + len(rows)] = store(rows, self.table.dtype)

    def start(self, slot: int, overlay: Overlay, first_row: int) -> None:
        """Give a slot to a sequence steered by an overlay whose rows are loaded at `first_row`."""
        edited = frozenset(overlay.tokens.tolist())
        same = next((o for o in self._occupants if o and o.overlay is overlay), None)
        topics = same.topics if same else tuple(topic.to(self.table.device) for topic in overlay.topics)
        self._occupants[slot] = _Occupant(overlay, self.base_rows + first_row, edited, topics)
        if overlay.bias:
            self._biases[slot] = overlay.bias
        else:
            self._biases.pop(slot, None)

    def set_pages(self, slot: int, start: int, pages: Many[int]) -> None:
        """Say which pages hold a slot's positions, from its page `start` on."""
        self.caches.page_table[slot, start : start + len(pages)] = torch.tensor(pages, dtype=torch.int32)

    @torch.inference_mode()
    def copy_page(self, donor: int, page: int, count: int) -> None:
        """Copy the first `count` positions of a page into another."""
        self.caches.copy_page(donor, page, count)

    @torch.inference_mode()
    def reuse(self, slot: int, tokens: Many[int]) -> None:
        """Begin a slot with tokens whose keys and values are in its pages already. Rows and annealing, which depend
        on the release, are made here."""
        spans = [TokenSpan(0, slot, 0, len(tokens))]
        self.kernels.append_tokens(self._new(spans, tokens).to(self.table.device), spans)
        self._update_annealing(slot, 0, len(tokens))

    def digest(self, slot: int) -> str:
        """Digest of the release that the slot's sequence is being computed with."""
        return self.overlay(slot).digest

    def overlay(self, slot: int) -> Overlay:
        """What the slot's sequence is steered by."""
        return self._occupant(slot).overlay

    def stop(self, slot: int) -> None:
        self._occupants[slot] = None
        self._biases.pop(slot, None)

    def execute(self, batch: Batch, ends: Collection[int]) -> list[Choice]:
        """Compute a batch and draw a token for each of `batch.sampled`."""
        return choose_tokens(self.run(Step.of(batch)), batch.sampled, ends, self.kernels)

    def check(self) -> None:
        """Nothing can be lost in one process."""

    def close(self) -> None:
        """Nothing runs elsewhere."""

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """Compute a step; logits [B, tokens] float32 of the next token of each of `step.sampled`, or none at ranks but
        the first.

        They are valid until the next step is computed.
        """
        spans = step.spans
        sampled = [(spans[n], n < step.decodes) for n in step.sampled]
        predictions = [self._prediction(s.slot, s.position + s.size, fresh=decoding) for s, decoding in sampled]
        new = self._new(spans, step.ids)
        if self._graphs and step.decodes == len(spans):
            return self._biased(self._graphs.run(new, spans, predictions), predictions)
        new = new.to(self.table.device)
        self.kernels.append_tokens(new, spans)
        queries = self._trunk(new, spans)
        for span in spans[step.decodes :]:
            self._update_annealing(span.slot, span.position, span.position + span.size)
        if not predictions:
            return torch.empty(0, self.config.tokens)
        if len(predictions) < len(step.ids):
            queries = queries[[s.token + s.size - 1 for s, _ in sampled]]
        logits = self._logits(self.kernels.mix(queries, predictions))
        return self._biased(logits, predictions) if len(logits) else logits

    def _logits(self, mixed: Tensor) -> Tensor:
        """Logits [B, tokens] of what this rank's senses mix [B, d]; at ranks that don't draw none, [0, tokens]."""
        if self._rank is None:
            return self._head(mixed)
        together = self._rank.collectives
        return together.gather_logits(self._head(together.sum(mixed)), self.config.tokens)

    def _biased(self, logits: Tensor, predictions: Many[MixSpan]) -> Tensor:
        """Add the releases' biases to logits [B, tokens], in place and all together."""
        if not self._biases:
            return logits
        biases = tuple(self._biases.get(prediction.slot) for prediction in predictions)
        if biases != self._batch_bias.biases:
            self._batch_bias = _BatchBias.of(biases, logits)
        logits.view(-1).index_add_(0, self._batch_bias.places, self._batch_bias.amounts)
        return logits

    def _decode(self, new: StepInput, spans: Many[TokenSpan], predictions: Many[MixSpan]) -> Tensor:
        """A step of one new token a slot, from beginning to end on the device."""
        self.kernels.append_tokens(new, spans)
        return self._head(self.kernels.mix(self._trunk(new, spans), predictions))

    def _new(self, spans: Many[TokenSpan], ids: Many[int]) -> StepInput:
        """New tokens as the step reads them, on the CPU."""
        tokens, sizes = np.array(ids, np.int64), [span.size for span in spans]
        slots = np.repeat([span.slot for span in spans], sizes)
        positions = np.arange(len(ids)) + np.repeat([span.position - span.token for span in spans], sizes)
        rows = (tokens * self._each).astype(np.int32)[:, None] + self._senses  # [N, k]
        new = StepInput(*map(torch.from_numpy, (tokens, slots, positions, rows)))
        for span in spans:
            occupant = self._occupant(span.slot)
            if occupant.edited:
                edited = [n for n in range(span.token, span.token + span.size) if ids[n] in occupant.edited]
                if edited:
                    index = occupant.overlay.row_index(new.tokens[edited]).int()
                    new.rows[edited] = torch.where(index >= 0, occupant.first_row + index, new.rows[edited])
        return new

    def _prediction(self, slot: int, length: int, fresh: bool) -> MixSpan:
        return MixSpan(slot, length, fresh, self._occupant(slot).topics)

    def _update_annealing(self, slot: int, start: int, end: int) -> None:
        """Bring a slot's annealing up to date with its tokens [start, end)."""
        prediction = self._prediction(slot, end, fresh=False)
        if prediction.topics:
            self.kernels.update_annealing(prediction, start)

    def _occupant(self, slot: int) -> _Occupant:
        occupant = self._occupants[slot]
        assert occupant is not None, f"slot {slot} is free"
        return occupant
