"""Who runs next: which sequences decode, which prompts are read, who waits. Arithmetic only.

Tenants share by the virtual token counter (Sheng et al., OSDI 2024): each has a counter of the tokens it was
served; the waiting tenant with the least goes first; one that had nothing waiting is lifted to the least of those
that wait, so that nobody saves up. Within a tenant, the higher priority goes first, then who came first.
"""

from __future__ import annotations

import math
from bisect import insort, insort_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from backpack_serving.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of a sequence's prompt, or of all that it had, to be read in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def completes(self) -> bool:
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: sequences that decode one token, and chunks of prompts."""

    decodes: tuple[Sequence, ...] = ()
    chunks: tuple[Chunk, ...] = ()

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that get a token in this step: decodes, then the prompts that are complete."""
        return self.decodes + tuple(c.sequence for c in self.chunks if c.completes)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)


@dataclass(slots=True)
class _TenantQueue:
    waiting: list[Sequence] = field(default_factory=list)  # in the order in which they will run
    running: int = 0
    served: float = 0.0


def _place(sequence: Sequence) -> float:
    """By which its tenant's waiting sequences are in order."""
    return -math.inf if sequence.preempted else -sequence.request.priority


def _cost(sequence: Sequence) -> int:
    """What a sequence is charged at its start: what is reused of its prompt costs nothing."""
    return len(sequence.request.prompt) - sequence.reused


class Scheduler:
    """Decides every step within `step_tokens` prompt tokens; at most `queue` sequences wait."""

    def __init__(self, step_tokens: int, queue: int) -> None:
        self.step_tokens, self.queue = step_tokens, queue
        self.running: list[Sequence] = []
        self._tenants: dict[str, _TenantQueue] = {}
        self._level = 0.0  # the counter of the tenant that was admitted last, as it was before

    @property
    def waiting(self) -> int:
        return sum(len(tenant.waiting) for tenant in self._tenants.values())

    @property
    def tokens_in_flight(self) -> int:
        """Tokens that all sequences, waiting ones included, may still cost."""
        return sum(sequence.remaining_tokens for sequence in self)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        for tenant in self._tenants.values():
            yield from tenant.waiting

    def can_add(self, free_slots: int) -> bool:
        """Whether one more may wait, beside those for which a slot is free."""
        return self.waiting < self.queue + free_slots

    def crowding(self, tenant: str) -> Sequence | None:
        """The last waiting sequence of the tenant with the most waiting, if those are more than this tenant's own.
        Those that were pre-empted don't count: they have an answer half sent."""

        def new(tenant: _TenantQueue) -> list[Sequence]:
            return [sequence for sequence in tenant.waiting if not sequence.preempted]

        own = len(new(self._tenants[tenant])) if tenant in self._tenants else 0
        most = max((new(other) for other in self._tenants.values()), key=len, default=[])
        return most[-1] if len(most) > own + 1 else None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Ask `can_add` first."""
        insort(self._queue_of(sequence), sequence, key=_place)

    def requeue(self, sequence: Sequence) -> None:
        """Let a running sequence wait again, before its equals; before all of its tenant if it has computed anything.

        Then it isn't charged for its prompt again; otherwise it gets back what it was charged.
        """
        tenant = self._tenants[sequence.request.tenant]
        self.running.remove(sequence)
        tenant.running -= 1
        if sequence.computed:
            sequence.preempted = True
        elif not sequence.preempted:
            tenant.served -= _cost(sequence)
        insort_left(self._queue_of(sequence), sequence, key=_place)

    def _queue_of(self, sequence: Sequence) -> list[Sequence]:
        """Where a sequence of its tenant waits."""
        tenant = self._tenants.setdefault(sequence.request.tenant, _TenantQueue())
        if not tenant.waiting:
            least = min((t.served for t in self._tenants.values() if t.waiting), default=self._level)
            tenant.served = max(tenant.served, least)
        return tenant.waiting

    def admit(self, start: Callable[[Sequence], bool]) -> None:
        """Start waiting sequences, fairest first, until `start` says that one can't be."""
        while candidates := [t for t in self._tenants.values() if t.waiting]:
            tenant = min(candidates, key=lambda t: t.served)
            if not start(tenant.waiting[0]):
                return
            sequence = tenant.waiting.pop(0)
            tenant.running += 1
            self._level = tenant.served
            # The prompt is charged when it is admitted: what matters is who gets the next slot.
            if not sequence.preempted:
                tenant.served += _cost(sequence)
            self.running.append(sequence)

    def plan(self) -> Batch:
        """The next step: every sequence whose prompt is read decodes; prompts share the token budget.

        A sequence that waits for another's prefix is left out.
        """
        decodes, chunks, budget = [], [], self.step_tokens
        for sequence in self.running:
            if sequence.pending_prefix is not None:
                continue
            left = len(sequence.tokens) - sequence.computed
            if sequence.computed >= sequence.prefill:
                decodes.append(sequence)
            elif budget:
                size = min(left, budget)
                budget -= size
                chunks.append(Chunk(sequence, sequence.computed, sequence.computed + size))
        return Batch(tuple(decodes), tuple(chunks))

    def charge(self, sequence: Sequence) -> None:
        """Count a token that was made for its tenant. A made token weighs as two read ones, as in VTC."""
        self._tenants[sequence.request.tenant].served += 2

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, waiting or running."""
        name = sequence.request.tenant
        tenant = self._tenants[name]
        if sequence.slot is None:
            tenant.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            tenant.running -= 1
        if not tenant.waiting and not tenant.running:
            del self._tenants[name]
