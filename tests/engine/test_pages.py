"""Pages run out, are shared and taken back: every request gets the tokens that it would get alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import ClassVar

import hypothesis.strategies as st
import pytest
from backpack_lm.model import Backpack
from backpack_lm.overlay import Overlay
from backpack_serving.engine.engine import Engine, QueueFull, TooManyTokens
from backpack_serving.engine.pages import PagePool
from backpack_serving.engine.sequence import GenerationRequest, Output, Sequence
from backpack_serving.sampling import SamplingParams
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.engine.conftest import MakeEngine, T, outputs_of
from tests.engine.test_oracle import oracle, prompt, run

SMALL_PAGES = {"page_size": 16}


def ask(
    name: str, overlay: Overlay, length: int, new: int, tenant: str = "t", start: int = 0, priority: int = 0
) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_end_of_text=True)
    return GenerationRequest(name, tenant, prompt(start, length), sampling, overlay, priority)


def test_short_requests_run_together_where_long_ones_would_not(make_engine, overlays) -> None:
    """Of one context's memory: three that need a page each, at once."""
    engine: Engine = make_engine(slots=3, step_tokens=64, cache_tokens=T, **SMALL_PAGES)
    for n in range(3):
        engine.add(ask(f"r{n}", overlays["none"], 8, 5, start=n))
    assert len(engine.step()) == 3
    assert (engine.load.cached_tokens, engine.load.cache_capacity) == (48, 48)


def test_whoever_came_last_is_preempted_and_nothing_is_lost(make_engine, model, overlays) -> None:
    """Four grow until pages run out. What was sent isn't sent again, and what wasn't comes later."""
    engine: Engine = make_engine(slots=4, cache_tokens=6 * 16, **SMALL_PAGES)
    requests = [ask(f"r{n}", overlays[name], 6, 40, start=n) for n, name in enumerate(("none", "topic", "swap", "add"))]
    assert run(engine, requests) == {request.id: oracle(model, request) for request in requests}
    assert engine.load.preemptions > 0
    assert engine.load.cached_tokens == 0


def test_drawn_tokens_are_those_of_a_pool_that_is_large(make_engine, overlays) -> None:
    sampling = SamplingParams(max_tokens=40, temperature=1.0, seed=4, log_probabilities=3, ignore_end_of_text=True)
    requests = [
        GenerationRequest(f"r{n}", f"t{n}", prompt(n, 6), sampling, overlays[name])
        for n, name in enumerate(("none", "topic", "swap", "two topics, one constant, on edited rows"))
    ]
    found: list[dict[str, list[Output]]] = []
    for memory in (5 * 16, 1000):
        engine: Engine = make_engine(slots=4, cache_tokens=memory, step_tokens=5, **SMALL_PAGES)
        found.append(outputs_of(engine, requests))
        assert bool(engine.preemptions) is (memory < 1000)
    assert found[0] == found[1]  # bit by bit, log-probabilities too


def test_a_preempted_request_can_be_aborted_and_is_not_crowded_out(make_engine, overlays) -> None:
    engine: Engine = make_engine(slots=2, queue=1, cache_tokens=3 * 16, **SMALL_PAGES)
    engine.add(ask("first", overlays["none"], 10, 30))
    engine.add(ask("second", overlays["none"], 10, 30, start=1))
    while not engine.preemptions:
        engine.step()
    assert [sequence.request.id for sequence in engine._scheduler.running] == ["first"]
    with pytest.raises(QueueFull):  # the queue is full with one that has an answer half sent
        for n in range(3):
            engine.add(ask(f"third {n}", overlays["none"], 10, 3, "another"))
    engine.abort("second")
    engine.check_integrity()
    made = [output.request_id for _ in range(60) for output in engine.step()]
    assert "second" not in made
    assert not engine.busy


def test_a_preempted_request_goes_before_its_tenants_others_and_costs_nothing_again(make_engine, overlays) -> None:
    engine: Engine = make_engine(slots=2, cache_tokens=4 * 16, **SMALL_PAGES)
    engine.add(ask("first", overlays["none"], 10, 30))
    engine.add(ask("second", overlays["none"], 10, 30, start=1, priority=-3))
    made: Counter[str] = Counter()
    while not engine.preemptions:
        made.update(output.request_id for output in engine.step())
    engine.add(ask("urgent", overlays["none"], 10, 30, start=2, priority=9))
    order = list(made)
    while not made["urgent"]:
        served, before = engine._scheduler._tenants["t"].served, made.total()
        for output in engine.step():
            made[output.request_id] += 1
            if output.request_id not in order:
                order.append(output.request_id)
        if all(sequence.request.id != "urgent" for sequence in engine._scheduler.running):
            assert engine._scheduler._tenants["t"].served - served == 2 * (made.total() - before)
    assert made["second"] >= 15, "it was running again before"
    assert order == ["first", "second", "urgent"]


def test_what_could_never_have_pages_is_refused(make_engine, overlays) -> None:
    engine: Engine = make_engine(slots=2, cache_tokens=32, **SMALL_PAGES)
    with pytest.raises(TooManyTokens, match="20 prompt tokens and 14 new ones; this replica's caches hold 32"):
        engine.add(ask("too long", overlays["none"], 20, 14))
    request = ask("just not", overlays["none"], 20, 13)  # the last token is never read
    assert len(run(engine, [request])["just not"]) == 13


def test_by_default_each_slot_has_a_thousand_positions_and_one_sequence_a_whole_context(make_engine) -> None:
    engine: Engine = make_engine(slots=3)
    assert engine.load.cache_capacity == 3 * 128  # the context, in whole pages
    engine = make_engine(slots=3, context=20, **SMALL_PAGES)
    assert engine.load.cache_capacity == 3 * 32
    assert engine._executor.context == 20


def test_a_beginning_is_in_the_same_pages_for_all_who_use_it(make_engine, model, overlays) -> None:
    """Two whole pages of it, and a copy of what is in the third: four sequences of 41 tokens in 2 + 4 pages."""
    engine: Engine = make_engine(slots=4, cache_tokens=6 * 16, share_prefixes=True, **SMALL_PAGES)
    three = SamplingParams(max_tokens=3, temperature=0.0)
    requests = [
        GenerationRequest(name, name, prompt(1, 38) + prompt(n, 3), three, overlay)
        for n, (name, overlay) in enumerate(list(overlays.items())[:4])
    ]
    for request in requests:
        engine.add(request)
    made: dict[str, list[int]] = {request.id: [] for request in requests}
    most = 0
    while engine.busy:
        for output in engine.step():
            made[output.request_id].append(output.token)
        engine.check_integrity()
        most = max(most, engine.load.cached_tokens)
    assert made == {request.id: oracle(model, request)[: len(made[request.id])] for request in requests}
    assert engine.reused_tokens >= 3 * 38
    assert most == 6 * 16
    assert engine.preemptions == 0


def test_what_a_finished_sequence_had_goes_last_page_first_and_the_oldest_first() -> None:
    def left(name: str, tokens: list[int]) -> Sequence:
        request = GenerationRequest(name, "t", tuple(tokens), SamplingParams(max_tokens=1), None)  # type: ignore[arg-type]
        sequence = Sequence(request)
        assert pool.begin("t", sequence, 0)
        pool.copied(sequence)
        sequence.computed = len(tokens)
        pool.release(sequence)
        pool.check_integrity([])
        return sequence

    def known(tokens: list[int]) -> int:
        prefix = pool.find_prefix("t", Sequence(GenerationRequest("", "t", (*tokens, 99), SamplingParams(), None)))  # type: ignore[arg-type]
        return prefix.length if prefix else 0

    pool = PagePool(6, 4)
    old, new = list(range(10)), list(range(20, 30))
    left("old", old)
    left("new", new)
    assert (known(old), known(new)) == (10, 10)
    left("a page", [50])
    assert (known(old), known(new)) == (8, 10)
    assert known(old[:5]) == 5
    left("another", [60])
    assert (known(old), known(new)) == (4, 10)
    left("third", [70, 71, 72, 73, 74])
    assert (known(old), known(new)) == (0, 8)


class PreemptingEngine(RuleBasedStateMachine):
    """Requests of a few beginnings, in a pool that holds one of the longest and little more."""

    make: MakeEngine
    model: Backpack
    overlays: dict[str, Overlay]
    expected: ClassVar[dict[tuple[object, ...], list[int]]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.engine: Engine | None = None
        self.requests: dict[str, GenerationRequest] = {}
        self.made: dict[str, list[int]] = {}
        self.ended: set[str] = set()

    @precondition(lambda self: self.engine is None)
    @rule(
        slots=st.integers(2, 5),
        pages=st.integers(3, 6),
        step_tokens=st.sampled_from([3, 16, 64]),
        share=st.booleans(),
    )
    def begin(self, slots: int, pages: int, step_tokens: int, share: bool) -> None:
        self.engine = self.make(
            slots, step_tokens, queue=8, share_prefixes=share, cache_tokens=pages * 16, **SMALL_PAGES
        )

    @precondition(lambda self: self.engine is not None)
    @rule(
        count=st.integers(1, 3),
        beginning=st.integers(0, 2),
        length=st.sampled_from([1, 6, 14, 17, 30]),
        new=st.sampled_from([1, 7, 18]),
        tenant=st.sampled_from("ab"),
        priority=st.integers(0, 1),
        drawn=st.booleans(),
        release=st.sampled_from(["none", "topic"]),
    )
    def add(
        self, count: int, beginning: int, length: int, new: int, tenant: str, priority: int, drawn: bool, release: str
    ) -> None:
        """Some that differ in their beginnings."""
        assert self.engine
        how = SamplingParams(max_tokens=new, temperature=1.0 if drawn else 0.0, seed=7, ignore_end_of_text=True)
        for n in range(beginning, beginning + count):
            name = f"r{len(self.requests)}"
            text = prompt(n % 3, length)
            request = GenerationRequest(name, tenant, text, how, self.overlays[release], priority)
            try:
                crowded_out = self.engine.add(request)
            except QueueFull:
                continue
            self.requests[name], self.made[name] = request, []
            if crowded_out:
                assert not self.made[crowded_out], "it has an answer half sent"
                self.ended.add(crowded_out)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 1000))
    def abort(self, which: int) -> None:
        assert self.engine
        name = list(self.requests)[which % len(self.requests)]
        self.engine.abort(name)
        self.ended.add(name)

    @precondition(lambda self: self.engine is not None)
    @rule(times=st.integers(1, 20))
    def step(self, times: int) -> None:
        assert self.engine
        for _ in range(times):
            for output in self.engine.step():
                name = output.request_id
                assert name not in self.ended
                self.made[name].append(output.token)
                assert self.made[name] == self._expected(name)[: len(self.made[name])]
                if output.finish:
                    self.ended.add(name)
                    assert len(self.made[name]) == self.requests[name].sampling.max_tokens
            self.engine.check_integrity()

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.engine:
            assert {sequence.request.id for sequence in self.engine._scheduler} == set(self.requests) - self.ended

    def teardown(self) -> None:
        """All that is left ends, in as many steps as their tokens alone would take, one after the other."""
        if self.engine:
            most = sum(len(r.prompt) + 2 * r.sampling.max_tokens + 2 for r in self.requests.values())
            for _ in range(most):
                self.step(1)
            assert not self.engine.busy
            assert self.engine.load.cached_tokens == 0

    def _expected(self, name: str) -> list[int]:
        """The oracle's tokens, as many as any of these requests has."""
        request = self.requests[name]
        longest = replace(request, sampling=replace(request.sampling, max_tokens=18))
        key = (longest.prompt, longest.sampling, longest.overlay.digest)
        if key not in self.expected:
            self.expected[key] = oracle(self.model, longest)
        return self.expected[key][: request.sampling.max_tokens]


def test_any_requests_aborts_and_preemptions_give_each_its_own_tokens(make_engine, model, overlays) -> None:
    PreemptingEngine.make, PreemptingEngine.model = staticmethod(make_engine), model  # type: ignore[assignment]
    PreemptingEngine.overlays = overlays
    run_state_machine_as_test(
        PreemptingEngine, settings=settings(max_examples=20, stateful_step_count=25, deadline=None)
    )
