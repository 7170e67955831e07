"""The engine gives the oracle's tokens, whatever shares the batch."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay
from backpack_serving.engine.engine import Engine
from backpack_serving.engine.sampler import choose
from backpack_serving.engine.sequence import GenerationRequest
from backpack_serving.sampling import SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.conftest import outputs_of

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_end_of_text=True)


def run(engine: Engine, requests: list[GenerationRequest]) -> dict[str, list[int]]:
    """The tokens of all requests, run together; each is computed under its release."""
    made = outputs_of(engine, requests)
    for request in requests:
        assert {output.digest for output in made[request.id]} <= {request.overlay.digest}
    return {name: [output.token for output in outputs] for name, outputs in made.items()}


def oracle(model: Backpack, request: GenerationRequest) -> list[int]:
    """The same request on the reference model, without any cache."""
    made: list[int] = []
    tokens = model.config.tokens

    def pick(logits: object) -> int:
        return choose(logits[:tokens], request.sampling, len(request.prompt) + len(made))  # type: ignore[index]

    for token in islice(model.generate(request.prompt, request.overlay, pick), request.sampling.max_tokens):
        made.append(token)
    return made


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple((seed * 31 + i * 17) % 93 for i in range(length))


def test_a_different_patch_on_every_row_of_one_batch(make_engine, model, overlays) -> None:
    requests = [
        GenerationRequest(name, "t", prompt(n, 5 + 2 * n), GREEDY, overlay)
        for n, (name, overlay) in enumerate(overlays.items())
    ]
    tokens = run(make_engine(slots=len(requests)), requests)
    for request in requests:
        assert tokens[request.id] == oracle(model, request), request.id


def test_every_patch_changes_what_is_generated(make_engine, overlays) -> None:
    """Of one text or another."""
    cases = [(n, name) for n in range(3) for name in overlays]
    requests = [GenerationRequest(f"{name} {n}", "t", prompt(n, 9), GREEDY, overlays[name]) for n, name in cases]
    tokens = run(make_engine(slots=len(overlays)), requests)
    changed = {name for n, name in cases if tokens[f"{name} {n}"] != tokens[f"none {n}"]}
    assert changed == set(overlays) - {"none"}


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=25, temperature=1.0, seed=5, ignore_end_of_text=True),
        SamplingParams(max_tokens=25, temperature=0.7, top_k=9, seed=6, ignore_end_of_text=True),
        SamplingParams(max_tokens=25, temperature=1.3, top_p=0.8, seed=7, ignore_end_of_text=True),
    ],
)
def test_sampled_tokens_are_the_oracles(make_engine, model, overlays, sampling) -> None:
    requests = [
        GenerationRequest(name, name, prompt(n, 4 + n), sampling, overlay)
        for n, (name, overlay) in enumerate(overlays.items())
    ]
    tokens = run(make_engine(slots=3), requests)
    for request in requests:
        assert tokens[request.id] == oracle(model, request), request.id


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_mix_of_requests_and_aborts_gives_each_its_own_tokens(seed, make_engine, model, overlays):
    draw = Random(seed)
    engine: Engine = make_engine(
        slots=draw.randint(1, 5), step_tokens=draw.choice([1, 3, 16, 64]), share_prefixes=draw.random() < 0.5
    )
    waiting = [
        GenerationRequest(
            f"r{n}",
            draw.choice("ab"),
            prompt(draw.randint(0, 2), draw.randint(1, 30)),  # many begin alike
            SamplingParams(max_tokens=draw.randint(1, 12), temperature=0.0),
            overlays[draw.choice(list(overlays))],
        )
        for n in range(draw.randint(1, 7))
    ]
    everyone, aborted = list(waiting), set()
    tokens: dict[str, list[int]] = {request.id: [] for request in everyone}
    while waiting or engine.busy:
        if waiting and draw.random() < 0.5:
            engine.add(waiting.pop())
        if draw.random() < 0.05:
            aborted.add(victim := draw.choice(everyone).id)
            engine.abort(victim)
        for output in engine.step():
            tokens[output.request_id].append(output.token)
        engine.check_integrity()
    for request in everyone:
        expected = oracle(model, request)
        if 0 in expected:  # end of text
            expected = expected[: expected.index(0) + 1]
        made = tokens[request.id]
        assert made == (expected[: len(made)] if request.id in aborted else expected)


def test_an_overlay_of_another_request_never_leaks(make_engine, overlays) -> None:
    """The same request alone and among others, in slots that others have used before."""
    engine = make_engine(slots=2)
    alone = run(make_engine(slots=1), [GenerationRequest("x", "t", prompt(1, 8), GREEDY, overlays["none"])])["x"]
    for name, overlay in overlays.items():
        tokens = run(
            engine,
            [
                GenerationRequest("other", "u", prompt(2, 11), GREEDY, overlay),
                GenerationRequest("x", "t", prompt(1, 8), GREEDY, overlays["none"]),
            ],
        )
        assert tokens["x"] == alone, name


def test_empty_release_is_the_model_itself(model, overlays) -> None:
    import torch

    ids = torch.tensor([prompt(4, 20)])
    empty: Overlay = overlays["none"]
    assert torch.equal(model(ids), model(ids, empty))


@pytest.mark.parametrize("shared", [False, True])
def test_a_prefix_is_reused_whatever_the_patches_and_within_its_scope(make_engine, model, overlays, shared) -> None:
    """One prompt after another, each under another release, for two tenants in turn; then all at once."""
    engine: Engine = make_engine(slots=12, share_prefixes=shared)
    requests = [
        GenerationRequest(f"{name} {n}", "ab"[n % 2], prompt(1, 24) + prompt(n, 3), GREEDY, overlay)
        for n, (name, overlay) in enumerate(overlays.items())
    ]
    cold = engine.reused_tokens
    for request in requests:
        assert run(engine, [request])[request.id] == oracle(model, request), request.id
    reused = engine.reused_tokens - cold
    assert reused >= 24 * (len(requests) - (1 if shared else 2))
    together = run(
        engine, [GenerationRequest(r.id, "ab"[n % 2], r.prompt, GREEDY, r.overlay) for n, r in enumerate(requests)]
    )
    assert together == {r.id: oracle(model, r) for r in requests}


def test_another_tenants_prefix_is_not_reused(make_engine, overlays) -> None:
    engine: Engine = make_engine(slots=4)
    for tenant in "abc":
        run(engine, [GenerationRequest(tenant, tenant, prompt(1, 24), GREEDY, overlays["none"])])
    assert engine.reused_tokens == 0
    run(engine, [GenerationRequest("again", "a", prompt(1, 24), GREEDY, overlays["topic"])])
    assert engine.reused_tokens == 23
