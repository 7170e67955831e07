"""How tokens get from the engine's thread to their readers: the first at once, then together, never late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch
from backpack_lm.kernels.build import library
from backpack_lm.overlay import Overlay
from backpack_serving.engine.engine import Engine, QueueFull
from backpack_serving.engine.loop import EngineLoop, EngineStopped
from backpack_serving.engine.sequence import GenerationRequest, Output
from backpack_serving.sampling import SamplingParams

from tests.engine.conftest import MakeEngine


@asynccontextmanager
async def _loop(engine: Engine, pace: Callable[[int], float]) -> AsyncIterator[tuple[EngineLoop, list[float]]]:
    """An engine whose step n takes at least so many seconds, and when each of its steps was over."""
    step, over = engine.step, []

    def paced() -> list[Output]:
        time.sleep(pace(len(over)))
        outputs = step()
        over.append(time.monotonic())
        return outputs

    engine.step = paced  # type: ignore[method-assign]
    loop = EngineLoop(engine)
    try:
        yield loop, over
    finally:
        await loop.stop()


def _request(overlays: dict[str, Overlay], tokens: int, name: str = "r") -> GenerationRequest:
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_end_of_text=True)
    return GenerationRequest(name, "t", (1, 2, 3), sampling, overlays["none"])


async def test_tokens_are_gathered_between_the_first_and_the_last(
    make_engine: MakeEngine, overlays: dict[str, Overlay]
) -> None:
    async with _loop(make_engine(), lambda n: 0.001) as (loop, _):
        batches = {
            gather: [len(outputs) async for outputs in loop.generate(_request(overlays, 40), gather)]
            for gather in (600.0, 0.0)
        }
    assert sum(batches[600.0]) == sum(batches[0.0]) == 40
    assert len(batches[600.0]) == 2, "the first, and all others when the last is there"
    assert len(batches[0.0]) > 2


class _SteadyLoop:
    """The event loop as the engine's loop sees it, where half a second goes by with each step, and no timer ends."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._now = loop, 0.0

    def time(self) -> float:
        return self._now

    def call_soon(self, callback: Callable[..., object]) -> None:
        self._loop.call_soon(callback)

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: object) -> None:
        def pass_on() -> None:
            self._now += 0.5
            callback(*args)

        self._loop.call_soon_threadsafe(pass_on)

    def call_at(self, when: float, callback: Callable[..., object], *args: object) -> asyncio.TimerHandle:
        return self._loop.call_later(3600, callback, *args)


async def test_no_token_waits_for_a_step_that_comes_too_late(
    make_engine: MakeEngine, overlays: dict[str, Overlay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of half a second, and gathering for almost as long: waiting for the time to be over would gain nothing."""
    steady, count = _SteadyLoop(asyncio.get_running_loop()), 0

    def once_read(step: int) -> float:
        for _ in range(500):
            if count >= step:  # what the steps before have made
                return 0.0
            time.sleep(0.01)
        raise AssertionError(f"{count} tokens were read before step {step}")

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "get_running_loop", lambda: steady)
        context = _loop(make_engine(), once_read)
        loop, _ = await context.__aenter__()
    try:
        async for outputs in loop.generate(_request(overlays, 6), 0.4):
            count += len(outputs)
    finally:
        await context.__aexit__(None, None, None)
    assert count == 6


async def test_a_step_that_takes_unexpectedly_long_holds_nobody_up(
    make_engine: MakeEngine, overlays: dict[str, Overlay]
) -> None:
    """Six quick steps, then one that ends only when what was being gathered has gone out."""
    count, had = 0, -1

    def pace(step: int) -> float:
        nonlocal had
        if step != 6:
            return 0.0
        for _ in range(6000):
            if count == 6:
                break
            time.sleep(0.01)
        had = count
        return 0.0

    async with _loop(make_engine(), pace) as (loop, _):
        async for outputs in loop.generate(_request(overlays, 10), 0.3):
            count += len(outputs)
    assert had == 6


async def test_readers_of_one_step_are_woken_together(make_engine: MakeEngine, overlays: dict[str, Overlay]) -> None:
    """Whatever they ask for, and although one leaves early."""
    async with _loop(make_engine(), lambda n: 0.002) as (loop, _):

        async def read(name: str, gather: float, most: int = 30) -> int:
            count = 0
            stream = loop.generate(_request(overlays, 30, name), gather)
            async for outputs in stream:
                count += len(outputs)
                if count >= most:
                    break
            await stream.aclose()
            return count

        made = await asyncio.gather(read("a", 0.0), read("b", 0.02), read("c", 600.0), read("d", 0.0, most=1))
    assert made[:3] == [30, 30, 30]
    assert made[3] < 30


async def test_an_engine_whose_last_request_was_aborted_says_that_it_is_idle(
    make_engine: MakeEngine, overlays: dict[str, Overlay]
) -> None:
    """No step comes after it; a load that was told until the next request would keep requests away for ever."""
    async with _loop(make_engine(), lambda n: 0.02) as (loop, _):
        stream = loop.generate(_request(overlays, 40))
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(60):
            while loop.load.running or loop.load.tokens_in_flight:
                await asyncio.sleep(0.01)


async def test_a_request_that_is_crowded_out_is_told_so(make_engine: MakeEngine, overlays: dict[str, Overlay]) -> None:
    async with _loop(make_engine(slots=1, queue=2), lambda n: 0.01) as (loop, _):

        async def ask(tenant: str, name: str) -> str:
            request = replace(_request(overlays, 20, name), tenant=tenant)
            try:
                async for _ in loop.generate(request):
                    pass
            except QueueFull:
                return "refused"
            return "made"

        async with asyncio.TaskGroup() as together:
            flood = [together.create_task(ask("flood", f"flood {n}")) for n in range(3)]
            await asyncio.sleep(0)  # they have asked
            small = together.create_task(ask("small", "small"))
    assert [task.result() for task in (*flood, small)] == ["made", "made", "refused", "made"]


async def test_a_step_that_fails_ends_every_stream(make_engine: MakeEngine, overlays: dict[str, Overlay]) -> None:
    def pace(step: int) -> float:
        if step == 5:
            raise RuntimeError("out of luck")
        return 0.0

    async with _loop(make_engine(), pace) as (loop, _):
        for gather in (0.0, 600.0):
            with pytest.raises(EngineStopped, match="out of luck"):
                async for _ in loop.generate(_request(overlays, 30), gather):
                    pass
        assert not loop.healthy


async def test_the_librarys_threads_are_as_many_as_torchs(
    make_engine: MakeEngine, overlays: dict[str, Overlay]
) -> None:
    """The engine had all cores, whatever `BACKPACK_THREADS` said, until something of torch needed several."""
    before, engine = torch.get_num_threads(), make_engine()
    step, threads = engine.step, set()

    def counted() -> list[Output]:
        threads.add(library().omp_get_max_threads())
        return step()

    engine.step = counted  # type: ignore[method-assign]
    torch.set_num_threads(before + 2)
    try:
        loop = EngineLoop(engine)
        assert [outputs async for outputs in loop.generate(_request(overlays, 2))]
        await loop.stop()
    finally:
        torch.set_num_threads(before)
    assert threads == {before + 2}
