"""What requests ask of their logits: the definition by examples, a batch as each row, and in any company."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from backpack_lm.overlay import Overlay
from backpack_serving.engine.logits import change, change_all
from backpack_serving.engine.seen_tokens import SeenTokens
from backpack_serving.engine.sequence import GenerationRequest, Sequence
from backpack_serving.sampling import SamplingParams
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.conftest import MakeEngine

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -9.0])
NEVER = -math.inf


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingParams(), [2.0, 1.0, 0.5, 0.0, -1.0, -9.0]),
        (SamplingParams(logit_bias=((1, -3.0), (5, 20.0))), [2.0, -2.0, 0.5, 0.0, -1.0, 11.0]),
        # Of 0, 1 and 4, which stand in the prompt or the text: those above 0 are divided, others multiplied.
        (SamplingParams(repetition_penalty=2.0), [1.0, 0.5, 0.5, 0.0, -2.0, -9.0]),
        # The text has 1 twice and 4 once; the prompt doesn't count.
        (SamplingParams(frequency_penalty=0.5), [2.0, 0.0, 0.5, 0.0, -1.5, -9.0]),
        (SamplingParams(presence_penalty=0.25), [2.0, 0.75, 0.5, 0.0, -1.25, -9.0]),
        (SamplingParams(min_tokens=3), [2.0, 1.0, 0.5, 0.0, -1.0, -9.0]),
        (SamplingParams(min_tokens=4), [NEVER, 1.0, 0.5, NEVER, -1.0, -9.0]),
        # Alone; behind what the text ends with; behind what it doesn't.
        (SamplingParams(bad_words=((2,), (1, 4, 0), (4, 1, 5))), [NEVER, 1.0, NEVER, 0.0, -1.0, -9.0]),
        (SamplingParams(min_p=0.2), [2.0, 1.0, 0.5, NEVER, NEVER, NEVER]),  # e^-1.5 = .22, e^-2 = .14
        (SamplingParams(min_p=0.2, temperature=2.0), [2.0, 1.0, 0.5, 0.0, -1.0, NEVER]),  # e^(-3/2) = .22
        (SamplingParams(min_p=1.0, logit_bias=((1, 5.0),)), [NEVER, 6.0, NEVER, NEVER, NEVER, NEVER]),
    ],
    ids=str,
)
def test_what_each_does(sampling: SamplingParams, expected: list[float]) -> None:
    found = change(LOGITS, prompt=[0, 1], made=[1, 1, 4], sampling=sampling, ends={0, 3})
    torch.testing.assert_close(found, torch.tensor(expected))
    assert sampling.changes_logits is (found.tolist() != LOGITS.tolist() or sampling.min_tokens > 0)


@pytest.mark.parametrize(
    ("sampling", "allowed", "expected"),
    [
        (SamplingParams(), [1, 2, 5], [NEVER, 1.0, 0.5, NEVER, NEVER, -9.0]),
        (SamplingParams(logit_bias=((0, 100.0), (2, 3.0))), [2], [NEVER, NEVER, 3.5, NEVER, NEVER, NEVER]),
        # The share is of the likeliest that is allowed.
        (SamplingParams(min_p=0.2), [1, 2, 4], [NEVER, 1.0, 0.5, NEVER, NEVER, NEVER]),
        (SamplingParams(min_tokens=4), [0, 2], [NEVER, NEVER, 0.5, NEVER, NEVER, NEVER]),
        (SamplingParams(min_tokens=4), [0, 3], [2.0, NEVER, NEVER, 0.0, NEVER, NEVER]),  # nothing else may follow
        (SamplingParams(bad_words=((2,),)), [2], [NEVER] * 6),
        (SamplingParams(), [], [NEVER] * 6),
    ],
    ids=str,
)
def test_what_a_grammar_allows(sampling: SamplingParams, allowed: list[int], expected: list[float]) -> None:
    found = change(LOGITS, prompt=[0, 1], made=[1, 1, 4], sampling=sampling, ends={0, 3}, allowed=allowed)
    torch.testing.assert_close(found, torch.tensor(expected))


class FixedGrammar:
    """Allows these tokens, whatever was made."""

    complete, failure = False, ""

    def __init__(self, allowed: set[int]) -> None:
        self._allowed = allowed

    def start(self) -> FixedGrammar:
        return self

    def allowed(self) -> np.ndarray:
        return np.isin(np.arange(30), list(self._allowed))

    def add(self, token: int) -> None: ...


asked = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    logit_bias=st.dictionaries(st.integers(0, 29), st.floats(-100, 100, width=32), max_size=4).map(
        lambda biases: tuple(sorted(biases.items()))
    ),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.1, 0.5, 3.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -2.0]),
    presence_penalty=st.sampled_from([0.0, 0.7, -1.0]),
    min_tokens=st.integers(0, 6),
    bad_words=st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
)
tokens = st.lists(st.integers(0, 29), max_size=12)
allowed = st.one_of(st.none(), st.sets(st.sampled_from([0, 3]) | st.integers(0, 29), max_size=20))
text = st.tuples(tokens.filter(bool), tokens, st.one_of(st.just(SamplingParams()), asked), allowed)


@given(st.lists(text, min_size=1, max_size=5))
def test_a_batch_is_changed_as_each_row(
    texts: list[tuple[list[int], list[int], SamplingParams, set[int] | None]],
) -> None:
    torch.manual_seed(len(texts))
    logits = torch.randn(len(texts), 30) * 4
    before = logits.clone()
    overlay: Any = SimpleNamespace()
    sequences = []
    for prompt, _, sampling, some in texts:
        grammar = None if some is None else FixedGrammar(some)
        sequence = Sequence(GenerationRequest("", "", tuple(prompt), sampling, overlay, 0, grammar))
        sequences.append(sequence)
    for step in range(13):  # as they grow, token by token
        for sequence, (_, made, _, _) in zip(sequences, texts, strict=True):
            sequence.tokens += made[step - 1 : step] if step else []
        changed = change_all(logits, sequences, {0, 3})
        for row, (prompt, made, sampling, some) in enumerate(texts):
            assert torch.equal(changed[row], change(before[row], prompt, made[:step], sampling, {0, 3}, some))
        assert torch.equal(logits, before)  # log-probabilities are read from them
        if not any(sampling.changes_logits or some is not None for *_, sampling, some in texts):
            assert changed is logits


class ReadTokens(list[int]):
    """A text that counts the tokens that are read from it."""

    read = 0

    def __getitem__(self, where: Any) -> Any:
        found = super().__getitem__(where)
        self.read += len(found) if isinstance(where, slice) else 1
        return found


@given(st.lists(st.integers(0, 500), min_size=1, max_size=300), st.lists(st.integers(0, 500), max_size=300))
def test_each_token_of_a_text_is_counted_once(prompt: list[int], made: list[int]) -> None:
    text, seen = ReadTokens(prompt), SeenTokens(prompt)
    for token in made:
        text.append(token)
        tokens, counts = seen.of(text)
    if made:
        assert sorted(tokens.tolist()) == sorted({*prompt, *made})
        assert Counter(made) == +Counter(dict(zip(tokens.tolist(), counts.tolist(), strict=True)))
    assert text.read == len(made)


def test_requests_get_what_they_ask_for_in_any_company(make_engine: MakeEngine, overlays: dict[str, Overlay]) -> None:
    """Greedy texts under penalties: the same alone and beside others, and other ones than without."""
    plain = SamplingParams(max_tokens=12, temperature=0.0, ignore_end_of_text=True)
    kinds = [
        plain,
        replace(plain, repetition_penalty=1.8),
        replace(plain, frequency_penalty=2.0),
        replace(plain, logit_bias=((7, 100.0),)),
        replace(plain, temperature=1.0, seed=3, min_p=0.3),
    ]

    def texts(samplings: list[SamplingParams]) -> list[tuple[int, ...]]:
        engine = make_engine(slots=len(samplings))
        for number, sampling in enumerate(samplings):
            engine.add(GenerationRequest(str(number), "t", (5, 6, 9), sampling, overlays["scale"]))
        made: dict[str, list[int]] = {str(n): [] for n in range(len(samplings))}
        while engine.busy:
            for output in engine.step():
                made[output.request_id].append(output.token)
        return [tuple(each) for each in made.values()]

    together = texts(kinds)
    assert together == [texts([kind])[0] for kind in kinds]
    assert together[3] == (7,) * 12
    assert together[0] not in together[1:]
    (banned,) = texts([replace(plain, bad_words=tuple((token,) for token in set(together[0])))])
    assert not set(banned) & set(together[0])
