"""Who runs next, what is shared while it is made, and what an abort frees."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from itertools import count
from zlib import crc32

import pytest
from backpack_lm.overlay import Overlay
from backpack_lm.patch import Cell, ReleaseContent, RevisionContent, ScaleEdit
from backpack_serving.engine.engine import Engine, QueueFull
from backpack_serving.engine.sequence import GenerationRequest
from backpack_serving.sampling import SamplingParams

from tests.engine.test_oracle import GREEDY, oracle, prompt, run


def ask(name: str, overlay, tenant: str = "t", length: int = 8, new: int = 6, priority: int = 0) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_end_of_text=True)
    return GenerationRequest(name, tenant, prompt(crc32(name.encode()) % 7, length), sampling, overlay, priority)


def order_of_first_tokens(engine: Engine) -> list[str]:
    seen: list[str] = []
    while engine.busy:
        seen += [o.request_id for o in engine.step() if o.request_id not in seen]
        engine.check_integrity()
    return seen


def test_a_higher_priority_goes_first_within_its_tenant(make_engine, overlays) -> None:
    engine = make_engine(slots=1)
    for name, priority in (("first", 0), ("low", -1), ("high", 5), ("second", 0), ("high too", 5)):
        engine.add(ask(name, overlays["none"], priority=priority))
    assert order_of_first_tokens(engine) == ["high", "high too", "first", "second", "low"]


def test_a_flood_of_one_tenant_does_not_starve_another(make_engine, overlays) -> None:
    """100 requests of one, 5 of another that came last: it has its turn every other time all the same."""
    engine = make_engine(slots=2, queue=200)
    for n in range(100):
        engine.add(ask(f"flood {n}", overlays["none"], "flood", priority=9))
    for n in range(5):
        engine.add(ask(f"small {n}", overlays["none"], "small"))
    places = [n for n, name in enumerate(order_of_first_tokens(engine)) if name.startswith("small")]
    assert max(places) <= 12


def test_a_full_queue_makes_room_for_who_has_less_in_it(make_engine, overlays) -> None:
    """Who fills it gives up what it asked for last, until both have as much; then both are refused."""
    engine = make_engine(slots=1, queue=6)
    for n in range(7):
        engine.add(ask(f"flood {n}", overlays["none"], "flood"))
    engine.step()
    gone = [engine.add(ask(f"small {n}", overlays["none"], "small")) for n in range(3)]
    assert gone == ["flood 6", "flood 5", "flood 4"]
    for tenant in ("flood", "small"):
        with pytest.raises(QueueFull):
            engine.add(ask("one too many", overlays["none"], tenant))
    assert set(order_of_first_tokens(engine)) == {
        f"{t} {n}" for t, most in (("flood", 4), ("small", 3)) for n in range(most)
    }


def test_a_tenant_that_always_runs_something_saves_nothing_up(make_engine, overlays) -> None:
    """One keeps a single stream while another floods; then it floods, too, and they share from the first step."""
    engine, made = make_engine(slots=4), Counter[str]()

    def keep(tenant: str, many: int, new: int) -> None:
        for _ in range(many - sum(s.request.tenant == tenant for s in engine._scheduler)):
            engine.add(ask(f"{tenant} {next(numbers)}", overlays["none"], tenant, length=4, new=new))

    numbers = count()
    for step in range(600):
        keep("flood", 12, new=10)
        if step % 20 == 0:
            keep("quiet", 2 if step else 1, new=24)  # beside the one before, which will soon end
        engine.step()
    for _ in range(100):
        keep("flood", 12, new=10)
        keep("quiet", 12, new=10)
        made.update(o.request_id.split()[0] for o in engine.step())
    assert made["flood"] > 130, "of 400"


def test_a_long_prompt_never_stalls_a_running_stream(make_engine, overlays) -> None:
    engine = make_engine(slots=2, step_tokens=4)
    engine.add(ask("stream", overlays["none"], length=4, new=20))
    engine.step()
    engine.add(ask("long", overlays["none"], length=40, new=1))
    for _ in range(10):  # ten chunks of four
        assert "stream" in [o.request_id for o in engine.step()]


def test_samples_of_one_prompt_compute_it_once(make_engine, model, overlays) -> None:
    """Four at once, before any of it is there: three wait for the first and copy; all get the oracle's tokens."""
    engine = make_engine(slots=4, step_tokens=10)
    requests = [
        GenerationRequest(f"s{n}", "t", prompt(1, 28), GREEDY, overlays[name])
        for n, name in enumerate(("none", "swap", "topic", "none"))
    ]
    assert run(engine, requests) == {r.id: oracle(model, r) for r in requests}
    assert engine.reused_tokens == 3 * 27


def test_a_sequence_whose_prefix_is_aborted_goes_on_alone(make_engine, model, overlays) -> None:
    engine = make_engine(slots=3, step_tokens=10)
    requests = [GenerationRequest(f"s{n}", "t", prompt(1, 28), GREEDY, overlays["none"]) for n in range(3)]
    for request in requests:
        engine.add(request)
    engine.step()  # ten tokens of the first
    engine.abort("s0")
    made: dict[str, list[int]] = {"s1": [], "s2": []}
    while engine.busy:
        for output in engine.step():
            made[output.request_id].append(output.token)
        engine.check_integrity()
    assert made == {name: oracle(model, requests[1]) for name in made}
    assert engine.reused_tokens == 10 + 27


def test_an_abort_frees_the_slot_at_once_for_whoever_waits(make_engine, overlays) -> None:
    engine = make_engine(slots=1)
    engine.add(ask("runs", overlays["none"], new=30))
    engine.step()
    engine.add(ask("waits", overlays["topic"]))
    assert engine.load.queued == 1
    engine.abort("runs")
    assert "waits" in [o.request_id for o in engine.step()]
    engine.check_integrity()


def test_the_queue_is_bounded(make_engine, overlays) -> None:
    engine = make_engine(slots=1, queue=2)
    for n in range(3):
        engine.add(ask(f"r{n}", overlays["none"]))
    with pytest.raises(QueueFull):
        engine.add(ask("one too many", overlays["none"]))
    assert len(order_of_first_tokens(engine)) == 3


def test_a_free_slot_keeps_the_tokens_of_a_prompt_and_nothing_of_its_release(make_engine, table) -> None:
    """Releases are kept within bounds, by others; the slots' last ones would come on top of them."""
    engine = make_engine()
    overlay = Overlay.compile(ReleaseContent((RevisionContent("00" * 32, (ScaleEdit((Cell(5, 1),), 0.5),)),)), table)
    kept = weakref.ref(overlay)
    engine.add(ask("steered", overlay, length=20))
    order_of_first_tokens(engine)
    del overlay
    gc.collect()
    assert kept() is None
    engine.add(ask("steered", Overlay.compile(ReleaseContent(), table), length=20))
    order_of_first_tokens(engine)
    assert engine.prefix_hits == 1
