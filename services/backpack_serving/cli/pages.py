"""Pages of a word and of a generation, from what a server answers: files that open without one."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from pathlib import Path

from backpack_lm.reports.generation import GenerationPage, TermRow, TokenStep
from backpack_lm.reports.word import SensePage, WordPage

from backpack_serving.cli.client import bare_text
from backpack_serving.cli.experiment import ProgressWatch
from backpack_serving.client import Client, Conflict, Explained, Generation, Sampling, Senses, Served, Token

TERMS = 1000  # as many as an answer may list; the rest is summed up


def write_word(word: str, answer: Senses, file: Path) -> None:
    """The page of a word's senses; of one that is zero no words, as all scores and cosines are 0."""

    def scored(some: Sequence[tuple[Token, float]]) -> tuple[tuple[str, float], ...]:
        return tuple((bare_text(token), score) for token, score in some)

    senses = tuple(
        SensePage(s.norm, s.edited, *(scored(some if s.norm else ()) for some in (s.raises, s.lowers, s.neighbours)))
        for s in answer.senses
    )
    file.write_text(WordPage(word, senses, _served_note(answer.served)).html(), "utf-8")


def write_generation(
    client: Client, prompt: str, channel: str, release: int | None, sampling: Sampling, file: Path
) -> Generation:
    """Generate, then ask for the terms of every token that was made; the page of both.

    Raises Conflict if another release was activated in between: a token is explained by what made it.
    """
    before = client.tokenize(prompt)
    one = uuid.uuid4().hex  # during a canary, the same key is served by the same release
    made = client.generate(prompt, sampling, channel=channel, release=release, request_key=one)
    ids, steps = [token.id for token in before], []
    with ProgressWatch() as watch:
        for token in watch(made.tokens, "explaining", len(made.tokens)):
            answer = client.explain(ids, token.id, TERMS, channel=channel, release=release, request_key=one)
            if answer.served.digest != made.served.digest:
                raise Conflict(
                    "RELEASE_CHANGED",
                    f"{channel} moved to another release while the text was explained; try again",
                )
            steps.append(_step(token.text, answer))
            ids.append(token.id)
    senses = client.model().senses
    words = tuple(token.text for token in before)
    file.write_text(GenerationPage(words, tuple(steps), senses, _served_note(made.served)).html(), "utf-8")
    return made


def _step(token: str, answer: Explained) -> TokenStep:
    terms = tuple(TermRow(c.position, c.sense, c.weight, c.multiplier, c.contribution) for c in answer.contributions)
    probability = math.exp(answer.target.log_probability or 0.0)
    return TokenStep(token, probability, answer.logit, answer.unlisted, terms, answer.bias)


def _served_note(served: Served) -> str:
    return (
        f"Model {served.model[:12]}, {served.tenant}/{served.channel}, release {served.release} ({served.digest[:12]})."
    )
