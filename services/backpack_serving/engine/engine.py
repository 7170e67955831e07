"""The engine: requests in, tokens out, one step at a time. No threads and no asyncio here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from backpack_lm.counted import counted

from backpack_serving.engine.executor import Executor
from backpack_serving.engine.pages import PagePool
from backpack_serving.engine.scheduler import Scheduler
from backpack_serving.engine.sequence import Finish, GenerationRequest, LogProbability, Output, Sequence
from backpack_serving.engine.slots import OverlayRows, Slots


class QueueFull(Exception):
    """The queue is full."""


class TooManyRows(Exception):
    """A release replaces more cells than the table has overlay rows in all."""


class TooManyTokens(Exception):
    """A request's prompt and new tokens are more than the caches can hold in all."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is, in sequences and tokens; the last three count since its start.

    `cached_tokens` and `cache_capacity` are positions of the pages that running sequences use, each page once, and
    of all pages.
    """

    slots: int
    running: int
    queued: int
    tokens_in_flight: int
    cached_tokens: int
    cache_capacity: int
    reused_tokens: int
    prefix_hits: int
    preemptions: int


class Engine:
    """Continuous batching of steered sequences.

    A request holds one slot, pages for its tokens and one use of its release's overlay rows from admission to its
    last token. If pages run out, the sequence that was admitted last is pre-empted: it waits again, and what it had
    is read again.
    Prompts that begin alike share what was computed for the beginning, whatever their releases: within a tenant,
    or with `share_prefixes` among all (how fast an answer comes tells that somebody asked alike before).
    """

    def __init__(
        self,
        executor: Executor,
        slots: Slots,
        rows: OverlayRows,
        scheduler: Scheduler,
        share_prefixes: bool = False,
        end_tokens: Collection[int] | None = None,
    ) -> None:
        """`end_tokens` are the ids that end a text; the config's if None."""
        self._executor, self._slots, self._rows, self._scheduler = executor, slots, rows, scheduler
        self._pages = PagePool(executor.pages, executor.page_size)
        self._share_prefixes = share_prefixes
        self.reused_tokens = self.prefix_hits = self.preemptions = 0
        self._sequences: dict[str, Sequence] = {}
        given = executor.config.eos_token_id
        self._end_tokens = end_tokens if end_tokens is not None else () if given is None else (given,)

    @property
    def heartbeat(self) -> float | None:
        """Seconds after which `check` wants to be called while there is nothing to step; None: never."""
        return self._executor.heartbeat

    def check(self) -> None:
        """Raise what a step would, if steps can't be computed any more."""
        self._executor.check()

    def close(self) -> None:
        """End what the executor runs elsewhere."""
        self._executor.close()

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    @property
    def load(self) -> Load:
        scheduler, pages = self._scheduler, self._pages
        return Load(
            slots=self._slots.count,
            running=len(scheduler.running),
            queued=scheduler.waiting,
            tokens_in_flight=scheduler.tokens_in_flight,
            cached_tokens=(pages.count - pages.available) * pages.size,
            cache_capacity=pages.count * pages.size,
            reused_tokens=self.reused_tokens,
            prefix_hits=self.prefix_hits,
            preemptions=self.preemptions,
        )

    def add(self, request: GenerationRequest) -> str | None:
        """Queue a request. If the queue is full, evict one of the tenant with the most waiting, and return its id.

        Raises QueueFull if none can be evicted, TooManyRows if its release could never be loaded, or TooManyTokens
        if there could never be pages for it.
        """
        if len(request.overlay.rows) > self._rows.size:
            raise TooManyRows(
                f"release {request.overlay.digest[:12]} replaces {counted(len(request.overlay.rows), 'sense')}; "
                f"this replica has space for {self._rows.size}"
            )
        sequence = Sequence(request)
        if self._pages.needed(sequence.longest) > self._pages.count:
            raise TooManyTokens(
                f"{counted(len(request.prompt), 'prompt token')} and {request.sampling.max_tokens} new ones; "
                f"this replica's caches hold {self._pages.count * self._pages.size}"
            )
        crowding = None
        if not self._scheduler.can_add(self._slots.free):
            crowding = self._scheduler.crowding(request.tenant)
            if crowding is None:
                raise QueueFull(f"{counted(self._scheduler.waiting, 'request is', 'requests are')} waiting")
            self._finish(crowding)
        assert request.id not in self._sequences, f"request {request.id} is here already"
        context = self._executor.context
        assert 0 < len(request.prompt) <= context - request.sampling.max_tokens, "validated at admission"
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)
        return crowding.request.id if crowding else None

    def abort(self, request_id: str) -> None:
        """Drop a request and free its slot at once. A request that has ended, or is unknown, is no error."""
        if sequence := self._sequences.get(request_id):
            self._finish(sequence)

    def step(self) -> list[Output]:
        """Schedule, execute, commit. Returns the new tokens."""
        for sequence in self._scheduler.running:
            self._reuse_prefix(sequence)
        self._grow()
        self._scheduler.admit(self._start_sequence)
        batch = self._scheduler.plan()
        if not batch:
            return []
        choices = self._executor.execute(batch, self._end_tokens)
        for sequence in batch.decodes:
            sequence.computed = len(sequence.tokens)
        for chunk in batch.chunks:
            chunk.sequence.computed = chunk.end
        return [
            self._commit_token(sequence, token, log) if token is not None else self._end_without_token(sequence, finite)
            for sequence, (token, log, finite) in zip(batch.sampled, choices, strict=True)
        ]

    def _grow(self) -> None:
        """Give decoding sequences the pages that their next tokens need.

        Who was admitted first is never pre-empted, and alone fits: so it ends, and with it in the end all others do.
        """
        running = self._scheduler.running
        for sequence in tuple(running):
            while sequence.slot is not None and len(sequence.tokens) > len(sequence.pages) * self._pages.size:
                if self._pages.available:
                    self._pages.grow(sequence)
                    self._executor.set_pages(sequence.slot, len(sequence.pages) - 1, [sequence.pages[-1].number])
                else:
                    self._preempt(running[-1])

    def _start_sequence(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot, pages and its release's rows. False if none are free."""
        overlay = sequence.request.overlay
        if not self._slots.free or not self._rows.can_hold(overlay.digest, len(overlay.rows)):
            return False
        # A page is left for each that grows: to admit one that is pre-empted a step later would be work for nothing.
        growing = sum(self._pages.needed(s.longest) > len(s.pages) for s in self._scheduler.running)
        if not self._pages.begin(self._scope(sequence), sequence, growing):
            return False
        sequence.slot = self._slots.allocate()
        first_row, fill = self._rows.acquire(overlay.digest, len(overlay.rows))
        if fill:
            self._executor.load(overlay, first_row)
        self._executor.start(sequence.slot, overlay, first_row)
        self._executor.set_pages(sequence.slot, 0, [page.number for page in sequence.pages])
        self._reuse_prefix(sequence)
        return True

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Take over the prefix that a sequence waits for, once it is computed."""
        prefix, slot, size = sequence.pending_prefix, sequence.slot, self._pages.size
        if prefix is None or slot is None or not prefix.ready:
            return
        if donor := prefix.donor(size):
            page = sequence.pages[prefix.length // size]
            self._executor.copy_page(donor.number, page.number, prefix.length % size)
        self._pages.copied(sequence)
        self._executor.reuse(slot, sequence.tokens[: prefix.length])
        sequence.computed = prefix.length
        if not sequence.preempted:
            self.reused_tokens += prefix.length
            self.prefix_hits += 1

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence and let it wait: what it had will be read again."""
        self.preemptions += sequence.computed > 0
        self._scheduler.requeue(sequence)
        self._vacate(sequence)
        sequence.prefill, sequence.computed = len(sequence.tokens), 0

    def _vacate(self, sequence: Sequence) -> None:
        """Take back what a sequence that no longer runs holds. Who waits for its prefix takes over what is there, or
        waits again."""
        for other in reversed(tuple(self._scheduler.running)):
            if other.pending_prefix and other.pending_prefix.owner is sequence:
                self._reuse_prefix(other)
                if other.pending_prefix:
                    self._preempt(other)
        assert sequence.slot is not None
        self._executor.stop(sequence.slot)
        self._slots.release(sequence.slot)
        self._pages.release(sequence)
        self._rows.release(sequence.request.overlay.digest)
        sequence.slot = None

    def _scope(self, sequence: Sequence) -> str:
        """Whose prefixes a sequence may use."""
        return "" if self._share_prefixes else sequence.request.tenant

    def _end_without_token(self, sequence: Sequence, finite: bool) -> Output:
        """End a sequence that no token could be drawn for: by its grammar, if its logits are `finite`."""
        assert sequence.slot is not None
        digest, grammar = self._executor.digest(sequence.slot), sequence.grammar
        self._finish(sequence)
        if grammar is None or not finite:
            return Output(sequence.request.id, -1, digest, None, Finish.NON_FINITE)
        why = grammar.failure or "what it allows next is forbidden, by bad_words or otherwise"
        return Output(sequence.request.id, -1, digest, None, Finish.NO_TOKEN, why=why)

    def _commit_token(self, sequence: Sequence, token: int, logs: LogProbability | None) -> Output:
        request, slot = sequence.request, sequence.slot
        assert slot is not None
        digest = self._executor.digest(slot)
        sequence.append(token)
        self._scheduler.charge(sequence)
        finish = sequence.finish_after(token, self._end_tokens)
        if finish:
            self._finish(sequence)
        first = len(sequence.tokens) == len(request.prompt) + 1
        return Output(request.id, token, digest, logs, finish, first)

    def _finish(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.id]
        self._scheduler.remove(sequence)
        if sequence.slot is not None:
            self._vacate(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot, an overlay range or a sequence is lost, shared or left behind."""
        known = list(self._scheduler)
        assert {id(s) for s in known} == {id(s) for s in self._sequences.values()}
        in_use = [s.slot for s in self._scheduler.running if s.slot is not None]
        assert len(in_use) == len(set(in_use)) == len(self._scheduler.running), "a slot is shared"
        self._slots.check_integrity(set(in_use))
        self._pages.check_integrity(self._scheduler.running)
        self._rows.check_integrity(Counter(s.request.overlay.digest for s in self._scheduler.running))
