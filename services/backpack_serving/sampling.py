"""How a request wants its tokens chosen. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["json_schema", "regex", "grammar"]


@dataclass(frozen=True, slots=True)
class TextStructure:
    """What a new text has to be, whole: a JSON value that a schema describes, what a regular expression matches, or
    what a grammar in Lark's syntax or GBNF derives. Not compiled yet."""

    form: Form
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters, already validated.

    `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 leave the whole vocabulary. `log_probabilities` is how
    many alternatives to report with each token, None for no log-probabilities at all. `stop` strings are
    looked for in the text, so outside the engine, which knows only tokens. From `logit_bias` on, what changes the
    logits that are drawn from: `engine/logits.py`. So does a `structure`, which the engine is given compiled.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    log_probabilities: int | None = None
    ignore_end_of_text: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    structure: TextStructure | None = None

    @property
    def changes_logits(self) -> bool:
        penalties = self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1
        return bool(penalties or self.min_p or self.min_tokens or self.logit_bias or self.bad_words)
