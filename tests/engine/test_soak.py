"""Thousands of requests, with aborts, priorities and a release each: nothing is left behind."""

from __future__ import annotations

import gc
import os
from random import Random

import psutil
import pytest
from backpack_lm.overlay import Overlay
from backpack_lm.patch import AddEdit, Cell, ReleaseContent, RevisionContent, TopicEdit
from backpack_serving.engine.engine import QueueFull
from backpack_serving.engine.sequence import GenerationRequest
from backpack_serving.sampling import SamplingParams

from tests.engine.conftest import K, _vector

MIB = 2**20


def _release(n: int, table) -> Overlay:  # type: ignore[no-untyped-def]
    edits = (AddEdit((Cell(1 + n % 80, n % K),), _vector(n)), *((TopicEdit((n % 90, 7), 1),) if n % 3 == 0 else ()))
    return Overlay.compile(ReleaseContent((RevisionContent("00" * 32, edits),)), table)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_nothing_is_left_behind(count: int, make_engine, table) -> None:
    draw, engine = Random(count), make_engine(slots=8, step_tokens=32, queue=32, overlay_rows=40)
    process = psutil.Process(os.getpid())
    alive: set[str] = set()
    finished = aborted = refused = 0
    memory = 0

    def step() -> None:
        nonlocal finished
        for output in engine.step():
            if output.finish:
                alive.discard(output.request_id)
                finished += 1
        engine.check_integrity()

    for n in range(count):
        if n == count // 4:  # everything that grows to a bound has grown to it
            gc.collect()
            memory = process.memory_info().rss
        sampling = SamplingParams(
            max_tokens=draw.randint(1, 6), temperature=draw.choice([0.0, 1.0]), seed=n, ignore_end_of_text=True
        )
        ids = tuple(draw.randrange(1, 93) for _ in range(draw.randint(1, 12)))
        tenant, priority = f"t{draw.randrange(20)}", draw.randint(-3, 3)
        request = GenerationRequest(f"r{n}", tenant, ids, sampling, _release(n, table), priority)
        try:
            crowded_out = engine.add(request)
            alive.add(request.id)
            if crowded_out:
                alive.remove(crowded_out)
                refused += 1
        except QueueFull:
            refused += 1
        if draw.random() < 0.1 and alive:
            victim = draw.choice(sorted(alive))
            engine.abort(victim)
            alive.discard(victim)
            aborted += 1
        step()
    while engine.busy:
        step()
    assert not alive
    assert finished + aborted + refused == count
    assert (engine.load.running, engine.load.queued, engine.load.tokens_in_flight) == (0, 0, 0)
    assert engine._slots.free == engine._slots.count
    assert not engine._scheduler._tenants
    gc.collect()
    assert process.memory_info().rss - memory < 16 * MIB
