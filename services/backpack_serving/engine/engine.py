"""The engine: requests in, tokens out, one step at a time. No threads and no asyncio here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from backpack_lm.counted import counted

from backpack_serving.engine.runner import Runner
from backpack_serving.engine.sampler import choose_all, log_probabilities
from backpack_serving.engine.scheduler import Scheduler
from backpack_serving.engine.sequence import Finish, GenerationRequest, LogProbability, Output, Sequence
from backpack_serving.engine.slots import OverlayRows, Slots


class QueueFull(Exception):
    """The queue is full."""


class TooManyRows(Exception):
    """A release replaces more cells than the table has overlay rows in all."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is, in sequences and tokens; the last two count since its start."""

    slots: int
    running: int
    queued: int
    tokens_in_flight: int
    cached_tokens: int
    cache_capacity: int
    reused_tokens: int
    prefix_hits: int


class Engine:
    """Continuous batching of steered sequences.

    A request holds one slot and one use of its release's overlay rows from admission to its last token.
    Prompts that begin alike share what was computed for the beginning, whatever their releases: within a tenant,
    or with `share_prefixes` among all (how fast an answer comes tells that somebody asked alike before).
    """

    def __init__(
        self,
        runner: Runner,
        slots: Slots,
        rows: OverlayRows,
        scheduler: Scheduler,
        share_prefixes: bool = False,
    ) -> None:
        self._runner, self._slots, self._rows, self._scheduler = runner, slots, rows, scheduler
        self._share_prefixes = share_prefixes
        self.reused_tokens = self.prefix_hits = 0
        self._sequences: dict[str, Sequence] = {}
        self._end_of_text = runner.config.eos_token_id

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    @property
    def load(self) -> Load:
        scheduler = self._scheduler
        return Load(
            slots=self._slots.count,
            running=len(scheduler.running),
            queued=scheduler.waiting,
            tokens_in_flight=scheduler.tokens_in_flight,
            cached_tokens=sum(sequence.computed for sequence in scheduler.running),
            cache_capacity=self._slots.count * self._runner.config.n_positions,
            reused_tokens=self.reused_tokens,
            prefix_hits=self.prefix_hits,
        )

    def add(self, request: GenerationRequest) -> str | None:
        """Queue a request. If the queue is full, evict one of the tenant with the most waiting, and return its id.

        Raises QueueFull if none can be evicted, or TooManyRows if its release could never be loaded.
        """
        if len(request.overlay.rows) > self._rows.size:
            raise TooManyRows(
                f"release {request.overlay.digest[:12]} replaces {counted(len(request.overlay.rows), 'sense')}; "
                f"this replica has space for {self._rows.size}"
            )
        crowding = None
        if not self._scheduler.can_add(self._slots.free):
            crowding = self._scheduler.crowding(request.tenant)
            if crowding is None:
                raise QueueFull(f"{counted(self._scheduler.waiting, 'request is', 'requests are')} waiting")
            self._finish(crowding)
        assert request.id not in self._sequences, f"request {request.id} is here already"
        context = self._runner.config.n_positions
        assert 0 < len(request.prompt) <= context - request.sampling.max_tokens, "validated at admission"
        sequence = Sequence(request)
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)
        return crowding.request.id if crowding else None

    def abort(self, request_id: str) -> None:
        """Drop a request and free its slot at once. A request that has ended, or is unknown, is no error."""
        if sequence := self._sequences.get(request_id):
            self._finish(sequence)

    def step(self) -> list[Output]:
        """Schedule, run, sample, commit. Returns the new tokens."""
        for sequence in self._scheduler.running:
            self._reuse_prefix(sequence)  # before a slot that somebody wants to copy from is given away
        self._scheduler.admit(self._start_sequence)
        batch = self._scheduler.plan()
        if not batch:
            return []
        logits = self._runner.run(batch)
        for sequence in batch.decodes:
            sequence.computed = len(sequence.tokens)
        for chunk in batch.chunks:
            chunk.sequence.computed = chunk.end
        sampled = batch.sampled
        samplings, positions = [s.request.sampling for s in sampled], [len(s.tokens) for s in sampled]
        kernels = self._runner.kernels
        tokens = choose_all(logits, samplings, positions, kernels.draw)
        logs = log_probabilities(logits, tokens, samplings, kernels.log_probabilities)
        return [self._commit_token(*made) for made in zip(sampled, tokens, logs, strict=True)]

    def _start_sequence(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and its release's rows. False if none are free."""
        overlay = sequence.request.overlay
        if not self._slots.free or not self._rows.can_hold(overlay.digest, len(overlay.rows)):
            return False
        scope = self._scope(sequence)
        prefix = self._slots.find_prefix(scope, sequence)
        sequence.slot = self._slots.allocate(scope, sequence, prefix.slot if prefix else None)
        first_row, fill = self._rows.acquire(overlay.digest, len(overlay.rows))
        if fill:
            self._runner.load(overlay, first_row)
        self._runner.start(sequence.slot, overlay, first_row)
        sequence.pending_prefix = prefix
        self._reuse_prefix(sequence)
        return True

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Copy the prefix that a sequence waits for, once it is computed. If its owner ended first, find another."""
        prefix, slot = sequence.pending_prefix, sequence.slot
        if prefix is not None and not prefix.ready and prefix.owner.slot is None:
            sequence.pending_prefix = None
            sequence.pending_prefix = prefix = self._slots.find_prefix(self._scope(sequence), sequence)
        if prefix is None or slot is None or not prefix.ready:
            return
        self._runner.reuse(prefix.slot, slot, sequence.tokens[: prefix.length])
        sequence.computed, sequence.pending_prefix = prefix.length, None
        self.reused_tokens += prefix.length
        self.prefix_hits += 1

    def _scope(self, sequence: Sequence) -> str:
        """Whose prefixes a sequence may use."""
        return "" if self._share_prefixes else sequence.request.tenant

    def _commit_token(self, sequence: Sequence, token: int | None, logs: LogProbability | None) -> Output:
        request, slot = sequence.request, sequence.slot
        assert slot is not None
        digest = self._runner.digest(slot)
        if token is None:
            self._finish(sequence)
            return Output(request.id, -1, digest, None, Finish.NON_FINITE)
        sequence.tokens.append(token)
        self._scheduler.charge(sequence)
        finish = sequence.finish_after(token, self._end_of_text)
        if finish:
            self._finish(sequence)
        first = len(sequence.tokens) == len(request.prompt) + 1
        return Output(request.id, token, digest, logs, finish, first)

    def _finish(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.id]
        self._scheduler.remove(sequence)
        if sequence.slot is not None:
            self._runner.stop(sequence.slot)
            self._slots.release(sequence.slot)
            self._rows.release(sequence.request.overlay.digest)
            sequence.slot = None
            del sequence.request  # the slot keeps its tokens for who begins alike, but no release in memory

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot, an overlay range or a sequence is lost, shared or left behind."""
        known = list(self._scheduler)
        assert {id(s) for s in known} == {id(s) for s in self._sequences.values()}
        in_use = [s.slot for s in self._scheduler.running if s.slot is not None]
        assert len(in_use) == len(set(in_use)) == len(self._scheduler.running), "a slot is shared"
        self._slots.check_integrity(set(in_use))
        self._rows.check_integrity(Counter(s.request.overlay.digest for s in self._scheduler.running))
