"""Drawing tokens: the distribution is the one asked for, and a batch draws what each row would alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from backpack_lm.kernels import Caches, Kernels
from backpack_lm.kernels.native import NativeKernels
from backpack_lm.kernels.plain import PlainKernels
from backpack_lm.model import Backpack
from backpack_lm.overlay import SenseTable
from backpack_serving.engine.sampler import choose, choose_all, log_probabilities, log_probability
from backpack_serving.engine.sequence import LogProbability
from backpack_serving.sampling import SamplingParams
from hypothesis import given
from hypothesis import strategies as st

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -9.0])


def _expected(sampling: SamplingParams) -> torch.Tensor:
    """From the definition: scale, keep the k likeliest, of those the smallest set of mass top_p, renormalise."""
    probabilities = (LOGITS.double() / sampling.temperature).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    kept = order[: sampling.top_k or len(order)]
    mass, total, inside = sum(float(probabilities[t]) for t in kept), 0.0, []
    for token in kept:
        if total >= sampling.top_p:
            break
        inside.append(token)
        total += float(probabilities[token]) / mass
    out = torch.zeros(len(order), dtype=torch.float64)
    out[inside] = probabilities[inside]
    return out / out.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.7),
        SamplingParams(top_k=4, top_p=0.8, temperature=1.5),
    ],
    ids=str,
)
def test_frequencies_are_the_distribution(sampling: SamplingParams) -> None:
    draws, expected = 4000, _expected(sampling)
    seeded = SamplingParams(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, seed=7)
    counts = Counter(choose(LOGITS, seeded, position) for position in range(draws))
    for token, probability in enumerate(expected.tolist()):
        sigma = (draws * probability * (1 - probability)) ** 0.5
        assert abs(counts[token] - draws * probability) <= 4.5 * sigma + 1e-9, (token, counts)


samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([1.0, 0.5, 0.01]),
    seed=st.integers(0, 2**64 - 1),
)


@pytest.fixture(scope="session")
def both(model: Backpack, table: SenseTable) -> list[Kernels]:
    """The compiled library, and torch."""
    caches = Caches.empty(model.config, 1, table.with_room(0), model.embedding.detach())
    return [NativeKernels(caches), PlainKernels(caches)]


@given(rows=st.lists(st.tuples(samplings, st.integers(0, 511)), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_a_batch_draws_what_each_row_draws_alone(
    rows: list[tuple[SamplingParams, int]], seed: int, both: list[Kernels]
) -> None:
    logits = 3 * torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(seed))
    chosen, places = [s for s, _ in rows], [p for _, p in rows]
    alone = [choose(row, s, p) for row, s, p in zip(logits, chosen, places, strict=True)]
    for kernels in both:
        assert choose_all(logits, chosen, places, kernels.draw) == alone


@pytest.mark.parametrize("tie", [False, True], ids=["", "with ties"])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_of_a_large_vocabulary_the_same_tokens_may_be_drawn(spread: float, tie: bool, both: list[Kernels]) -> None:
    """At the size that counts, where few tokens have most of the probability, and where all have some."""
    logits = spread * torch.randn(4100, generator=torch.Generator().manual_seed(1))
    logits[7:2000:9] = float("-inf")
    if tie:
        logits = logits.bfloat16().float()
    counts, shares = (0, 1, 40, 1000, 4000, 5000), (1.0, 1 - 1e-9, 0.999, 0.9, 0.3, 1e-9)
    chosen = [
        SamplingParams(temperature=temperature, top_k=count, top_p=share, seed=3)
        for temperature in (0.2, 1.0, 3.0)
        for count in counts
        for share in shares
        for _ in range(4)
    ]
    rows, places = logits.expand(len(chosen), -1), range(len(chosen))
    alone = [choose(logits, sampling, place) for sampling, place in zip(chosen, places, strict=True)]
    for kernels in both:
        assert choose_all(rows, chosen, places, kernels.draw) == alone


def test_neighbouring_seeds_of_64_bits_draw_differently() -> None:
    logits = torch.zeros(1000)
    for seed in (0, 2**63, 2**64 - 10):
        assert len({choose(logits, SamplingParams(seed=seed + n), 0) for n in range(10)}) > 7


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.tensor([0.0, float("-inf"), 0.0, float("-inf")])
    drawn = {choose(logits, SamplingParams(seed=1), position) for position in range(200)}
    assert drawn == {0, 2}


def test_log_probabilities_are_at_temperature_one() -> None:
    logs = LOGITS.double().log_softmax(-1)
    found = log_probability(LOGITS, 3, alternatives=2)
    assert found.chosen == pytest.approx(float(logs[3]))
    assert [token for token, _ in found.alternatives] == [0, 1]
    assert len(log_probability(LOGITS, 3, alternatives=20).alternatives) == len(LOGITS)


@given(
    rows=st.lists(
        st.tuples(st.none() | st.integers(0, 299), st.sampled_from([None, 0, 1, 5, 20])), min_size=1, max_size=8
    ),
    seed=st.integers(0, 1000),
)
def test_a_batch_has_the_log_probabilities_of_each_row_alone(
    rows: list[tuple[int | None, int | None]], seed: int, both: list[Kernels]
) -> None:
    """Also where there is no token, and where nothing was asked for."""
    logits = 3 * torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(seed))
    tokens, counts = [token for token, _ in rows], [count for _, count in rows]
    for kernels in both:
        samplings = [SamplingParams(log_probabilities=count) for count in counts]
        found = log_probabilities(logits, tokens, samplings, kernels.log_probabilities)
        for row, token, count, one in zip(logits, tokens, counts, found, strict=True):
            if token is None or count is None:
                assert one is None
            else:
                assert one is not None
                _same(one, log_probability(row, token, count))


@pytest.mark.parametrize("size", [3, 16, 4100, 50257])
def test_log_probabilities_are_exact_at_any_size(size: int, both: list[Kernels]) -> None:
    """For likely tokens, unlikely and impossible ones, with large logits, and asked for more than there are."""
    logits = 100 + 5 * torch.randn(4, size, generator=torch.Generator().manual_seed(2))
    logits[1] *= 30
    logits[2, ::2] = float("-inf")
    tokens, how = [size - 1, int(logits[1].argmin()), 0, size // 2], [SamplingParams(log_probabilities=20)] * 4
    for kernels in both:
        for row, token, one in zip(
            logits, tokens, log_probabilities(logits, tokens, how, kernels.log_probabilities), strict=True
        ):
            assert one is not None
            _same(one, log_probability(row, token, 20))


def _same(found: LogProbability, expected: LogProbability) -> None:
    assert found.chosen == pytest.approx(expected.chosen, abs=1e-6)
    assert [log for _, log in found.alternatives] == pytest.approx([log for _, log in expected.alternatives], abs=1e-6)
    possible = sum(log > float("-inf") for _, log in expected.alternatives)
    assert [token for token, _ in found.alternatives[:possible]] == [
        token for token, _ in expected.alternatives[:possible]
    ]
