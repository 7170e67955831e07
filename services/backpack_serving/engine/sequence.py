"""What the engine is asked for, what it is working on, and what it gives back."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
from backpack_lm.overlay import Overlay

from backpack_serving.engine.seen_tokens import SeenTokens
from backpack_serving.sampling import SamplingParams


class Finish(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    NON_FINITE = "not numbers"
    NO_TOKEN = "no token may come next"


class GrammarState(Protocol):
    """How far one text is in its grammar."""

    complete: bool
    """The text is all that the grammar wants, and nothing may follow."""

    failure: str
    """Why the grammar can't be followed any further; empty while it can."""

    def allowed(self) -> np.ndarray:
        """Which tokens may come next [V] bool: those that end texts exactly where the text may end. None at all if the
        grammar can't be followed any further."""

    def add(self, token: int) -> None:
        """Go on by a token that was allowed."""


class Grammar(Protocol):
    """A compiled grammar: what texts are held to."""

    def start(self) -> GrammarState:
        """The state of a text of no token."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation. It carries its overlay by value: nothing that happens later changes what it means.

    Of a tenant's waiting requests, those of the highest priority go first.
    """

    id: str
    tenant: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    overlay: Overlay
    priority: int = 0
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class LogProbability:
    """Natural logarithm of a token's probability at temperature 1, and of the likeliest alternatives'."""

    chosen: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """One new token of one request, or that there is none, and `token` is −1: logits that aren't numbers end it, and
    so does a grammar that leaves no token, for the reason `why`.

    `digest` is read from the slot that the token was computed in. `first`: of its request.
    """

    request_id: str
    token: int
    digest: str
    log_probability: LogProbability | None = None
    finish: Finish | None = None
    first: bool = False
    why: str = ""


@dataclass(slots=True, eq=False)
class Page:
    """A page of the caches that holds something: positions from `start` on, filled by `owner`, or `tokens` once that
    has left. `key` is the page that it follows, or the scope that it begins a text in, and its first token."""

    number: int
    key: tuple[Page | str, int]
    start: int
    owner: Sequence | None
    tokens: list[int] = field(default_factory=list)
    users: int = 1

    def held(self, size: int) -> tuple[list[int], list[int]]:
        """What is there, and what is there or will be without waiting for others."""
        if self.owner is None:
            return self.tokens, self.tokens
        owner, start = self.owner, self.start
        sure = owner.computed if owner.pending_prefix else max(owner.computed, owner.prefill)
        tokens = owner.tokens[start : min(start + size, sure)]
        return tokens[: max(0, owner.computed - start)], tokens


@dataclass(frozen=True, slots=True)
class Prefix:
    """A sequence's beginning, the first `length` tokens, in pages that hold it, or will when `owner` has computed it.

    Whole pages are used in common; what is in the last one, if it isn't needed whole, is copied.
    """

    pages: tuple[Page, ...]
    length: int
    owner: Sequence | None

    @property
    def ready(self) -> bool:
        return self.owner is None or self.owner.computed >= self.length

    def donor(self, size: int) -> Page | None:
        """The page to copy from, of pages of that size."""
        return self.pages[-1] if self.length % size else None

    def whole_pages(self, size: int) -> Prefix | None:
        """What can be used without copying."""
        count = self.length // size
        return Prefix(self.pages[:count], count * size, self.owner) if count else None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in progress. `computed` of its `tokens` are in its pages.

    `prefill`: tokens that are read in chunks before it makes the next: its prompt; all that it had if it was
    pre-empted since. `pending_prefix`: its beginning in the pages of others, until it has been taken over.
    """

    request: GenerationRequest
    tokens: list[int] = field(init=False)
    prefill: int = field(init=False)
    computed: int = 0
    slot: int | None = None
    pages: list[Page] = field(default_factory=list)
    pending_prefix: Prefix | None = None
    preempted: bool = False
    grammar: GrammarState | None = None
    _seen: SeenTokens | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.prefill = len(self.tokens)
        if self.request.grammar:
            self.grammar = self.request.grammar.start()

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self.grammar:
            self.grammar.add(token)

    def seen_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Its distinct tokens [n], and how often each was generated [n]."""
        if self._seen is None:
            self._seen = SeenTokens(self.request.prompt)
        return self._seen.of(self.tokens)

    @property
    def longest(self) -> int:
        """Tokens that have to be in pages before it has made all that it may: the last one is never read."""
        return len(self.request.prompt) + self.request.sampling.max_tokens - 1

    @property
    def reused(self) -> int:
        """Tokens, right after its start, that it has from another sequence or will have."""
        return self.pending_prefix.length if self.pending_prefix else self.computed

    @property
    def remaining_tokens(self) -> int:
        """Tokens that this sequence may still cost: those to read and those to make."""
        return max(0, self.prefill - self.computed) + (self.request.sampling.max_tokens - self.generated)

    def finish_after(self, token: int, end_tokens: Container[int]) -> Finish | None:
        """Whether a token that was just appended ends the sequence."""
        sampling = self.request.sampling
        if token in end_tokens and not sampling.ignore_end_of_text:
            return Finish.STOP
        if self.grammar and self.grammar.complete:
            return Finish.STOP
        return Finish.LENGTH if self.generated >= sampling.max_tokens else None
