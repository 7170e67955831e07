"""What the engine is asked for, what it is working on, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from backpack_lm.overlay import Overlay

from backpack_serving.sampling import SamplingParams


class Finish(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    NON_FINITE = "not numbers"


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


@dataclass(frozen=True, slots=True)
class LogProbability:
    """Natural logarithm of a token's probability at temperature 1, and of the likeliest alternatives'."""

    chosen: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """One new token of one request, or that there is none: logits that aren't numbers end it, and `token` is −1.

    `digest` is read from the slot that the token was computed in. `first`: of its request.
    """

    request_id: str
    token: int
    digest: str
    log_probability: LogProbability | None = None
    finish: Finish | None = None
    first: bool = False


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a slot holds, or will soon, of a sequence's beginning: the first `length` tokens."""

    slot: int
    owner: Sequence
    length: int

    @property
    def ready(self) -> bool:
        return self.owner.computed >= self.length


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in progress; once it has ended, what its slot still holds. `computed` of its `tokens` are in the
    slot's cache.

    `pending_prefix`: the beginning that another sequence is about to compute, and that this one will copy.
    """

    request: GenerationRequest
    tokens: list[int] = field(init=False)
    computed: int = 0
    slot: int | None = None
    pending_prefix: Prefix | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def reused(self) -> int:
        """Tokens, right after its start, that it has from another sequence or will have."""
        return self.pending_prefix.length if self.pending_prefix else self.computed

    @property
    def remaining_tokens(self) -> int:
        """Tokens that this sequence may still cost: prompt tokens to read and tokens to make."""
        return max(0, len(self.request.prompt) - self.computed) + (self.request.sampling.max_tokens - self.generated)

    def finish_after(self, token: int, end_of_text: int | None) -> Finish | None:
        """Whether a token that was just appended ends the sequence."""
        sampling = self.request.sampling
        if token == end_of_text and not sampling.ignore_end_of_text:
            return Finish.STOP
        return Finish.LENGTH if self.generated >= sampling.max_tokens else None
