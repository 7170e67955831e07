"""Which replica gets a request."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest
from backpack_proto.v1.directory_pb2 import Replica
from backpack_serving.errors import Unavailable
from backpack_serving.gateway.routing import LOST_SECONDS, Router

from tests.conftest import Clock

MODEL = "ab" * 32


def _replica(name: str, load: int = 0, **more: object) -> Replica:
    return Replica(
        id=name, address=f"127.0.0.1:{name}", model_fingerprint=MODEL, slots=4, tokens_in_flight=load, **more
    )


@pytest.fixture
async def router(clock: Clock) -> Router:
    router = Router(MODEL, clock=clock)
    router.update([_replica("1"), _replica("2")])
    return router


def _pick(router: Router, tokens: int = 1) -> str:
    with router.lease(tokens) as target:
        return target.replica.id


async def test_the_less_loaded_of_two_wins(router: Router) -> None:
    router.update([_replica("1", load=500), _replica("2", load=10)])
    assert {_pick(router) for _ in range(20)} == {"2"}


async def test_what_was_sent_counts_before_it_is_reported(router: Router) -> None:
    with router.lease(100) as first, router.lease(1) as second:
        assert first is not second
    assert (first.sent, second.sent) == (0, 0)


async def test_draining_replicas_and_other_models_get_nothing(router: Router) -> None:
    other = Replica(id="3", address="127.0.0.1:3", model_fingerprint="cd" * 32)
    router.update([_replica("1", draining=True), _replica("2"), other])
    assert {_pick(router) for _ in range(20)} == {"2"}
    assert router.size == 1


async def test_a_lost_replica_is_left_alone_until_it_reports_something_new(router: Router) -> None:
    with router.lease(1) as target:
        router.lost(target)
    router.update([_replica("1"), _replica("2")])  # the same reports as before
    assert target.replica.id not in {_pick(router) for _ in range(20)}
    router.update([_replica("1", running=1), _replica("2", running=1)])
    assert target.replica.id in {_pick(router) for _ in range(50)}


async def test_a_lost_replica_with_nothing_new_to_report_is_tried_again(router: Router, clock: Clock) -> None:
    for _ in range(2):
        with router.lease(1) as target:
            router.lost(target)
        clock.now += LOST_SECONDS / 4
        router.update([_replica("1"), _replica("2")])
    with pytest.raises(Unavailable):
        _pick(router)
    clock.now = LOST_SECONDS
    assert router.size == 1
    clock.now = 2 * LOST_SECONDS
    assert {_pick(router) for _ in range(50)} == {"1", "2"}


async def test_no_replica_is_said_with_when_to_retry(router: Router) -> None:
    router.update([])
    with pytest.raises(Unavailable, match="try again shortly") as refused:
        _pick(router)
    assert refused.value.retry_after == 1.0


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


async def test_replicas_are_counted_while_they_come_and_go(router: Router, hasty: None) -> None:
    """A scrape does that, from a thread of its own."""
    many = [_replica(str(number)) for number in range(1, 100)]
    counted: set[int] = set()
    over = threading.Event()

    def scrape() -> None:
        try:
            while not over.is_set():
                counted.add(router.size)
        except RuntimeError:
            counted.add(-1)

    scrapes = threading.Thread(target=scrape)
    scrapes.start()
    until = time.monotonic() + 1
    while time.monotonic() < until and -1 not in counted:
        router.update(many)
        router.update(many[:-1])
    over.set()
    scrapes.join()
    assert counted
    assert -1 not in counted
