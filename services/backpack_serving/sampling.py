"""How a request wants its tokens chosen. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters, already validated.

    `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 leave the whole vocabulary. `log_probabilities` is how
    many alternatives to report with each token, None for no log-probabilities at all. `stop` strings are
    looked for in the text, so outside the engine, which knows only tokens.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    log_probabilities: int | None = None
    ignore_end_of_text: bool = False
