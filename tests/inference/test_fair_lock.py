"""A fair lock: tenants in turn, and those who leave before theirs."""

from __future__ import annotations

import asyncio

from backpack_serving.inference.fair_lock import FairLock


async def _work(lock: FairLock, ran: list[str], tenant: str) -> None:
    async with lock.acquire(tenant):
        ran.append(tenant)
        await asyncio.sleep(0)


async def test_who_has_much_waiting_keeps_nobody_else_waiting() -> None:
    lock, ran = FairLock(), list[str]()
    await asyncio.gather(*(_work(lock, ran, tenant) for tenant in "aaaaaabbc"))
    assert "".join(ran) == "aabcabaaa"


async def test_one_has_its_turn_at_a_time_and_who_leaves_passes_it_on() -> None:
    lock, inside, ran = FairLock(), 0, 0

    async def work(tenant: str) -> None:
        nonlocal inside, ran
        async with lock.acquire(tenant):
            inside += 1
            assert inside == 1
            try:
                await asyncio.sleep(0)
            finally:
                inside -= 1
            ran += 1

    running = [asyncio.create_task(work("abc"[number % 3])) for number in range(60)]
    for number in (0, 7, 8, 20, 59):  # one that has its turn, and others that wait
        running[number].cancel()
        await asyncio.sleep(0)
    for one in running[10:30]:  # as they come, also in the moment in which one is given its turn
        one.cancel()
        await asyncio.sleep(0)
    await asyncio.wait(running, timeout=60)
    assert all(one.done() for one in running)
    assert ran == sum(not one.cancelled() for one in running) > 20
    await asyncio.wait_for(work("a"), 60)


async def test_a_turn_that_is_given_to_who_is_cancelled_in_that_moment_goes_on() -> None:
    lock, ran = FairLock(), list[str]()

    async def work(tenant: str) -> None:
        await _work(lock, ran, tenant)
        if tenant == "a":
            second.cancel()  # it has been given its turn, and hasn't run since

    first, second, third = (asyncio.create_task(work(tenant)) for tenant in "abc")
    await asyncio.wait([first, second, third], timeout=60)
    assert third.done()
    assert second.cancelled()
    assert ran == ["a", "c"]
