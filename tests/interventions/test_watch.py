"""P6, where it begins: who follows the store sees every write once, in order, whole, and never goes back.

Readers follow here as the service's streams do, page by page, while others write: slow ones, ones that stop and go
on with what they had, through another process of the service, and through a new epoch.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import pytest
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.ledger import IdempotencyKey, raise_epoch
from backpack_serving.interventions.records import EventRecord, visible
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.store import Store
from backpack_serving.references import LIVE, Position

from tests.interventions.conftest import ADMIN, SHAPE, releaser
from tests.interventions.crashes import patiently, request

WRITERS = 4


class Follower:
    """A reader and its validator: every assertion is about what it was told, as it is told."""

    def __init__(self, services: Sequence[Interventions], seed: int, pause: float) -> None:
        self._services, self._chance, self._pause = services, random.Random(seed), pause
        self.at = Position(0, 0)
        self.known: dict[tuple[str, ...], dict[str, Any]] = {}
        self.seen: list[EventRecord] = []
        self.resets = 0

    def step(self) -> bool:
        """One page; whether there was anything. Each is asked of a service chosen at random."""
        service = self._chance.choice(self._services)
        now, events = service.events.events_after(self.at.revision, limit=1 + self._chance.randrange(5))
        if now.epoch != self.at.epoch or now.revision < self.at.revision:
            assert now.epoch > self.at.epoch, f"from {self.at} back to {now}"
            self.at, records = service.events.snapshot()
            self.known = {_key(visible(record)): visible(record) for record in records}
            self.resets += 1
            return True
        for event in events:
            assert event.revision == self.at.revision + 1, f"{event.revision} comes after {self.at.revision}"
            self.at = Position(now.epoch, event.revision)
            self.seen.append(event)
            for change in json.loads(event.changes):
                self.known[_key(change)] = change
        if not events:  # the bookmark of a stream: nothing up to here is missing
            assert now == self.at, f"nothing after {self.at}, but the store is at {now}"
        time.sleep(self._pause * self._chance.random())
        return bool(events)


def _key(change: dict[str, Any]) -> tuple[str, ...]:
    return change["kind"], change["tenant"], change.get("key", ""), change.get("channel", "")


def check_watch(stores: Sequence[Store], writes: int) -> int:
    """Writers and followers at once, then a new epoch, then more; how many events were seen in all."""
    services = [Interventions(store, SHAPE) for store in stores]
    followers = [Follower(services, seed, pause) for seed, pause in enumerate((0, 0, 0.005, 0.02))]
    done, failures = threading.Event(), []

    def write(number: int, phase: int) -> None:
        service, who = services[number % len(services)], releaser(f"t{number}")
        try:
            for n in range(writes):
                # A disk that stalls is Unavailable to those who wait for it: they ask again, as clients do.
                etag, first, second = service.channels.get_channel(who, LIVE).etag, request(), request()
                patiently(lambda etag=etag, again=first: service.channels.activate(who, LIVE, 0, etag, again))
                patiently(lambda n=n, again=second: service.patches.create_patch(who, f"p{phase}-{n}", "", again))
        except BaseException as error:
            failures.append(error)

    def follow(follower: Follower) -> None:
        try:
            last = False
            while follower.step() or not last:
                last = done.is_set()  # asked before the step that finds nothing more
        except BaseException as error:
            failures.append(error)

    for number in range(WRITERS):
        services[0].tenants.create_tenant(ADMIN, f"t{number}", IdempotencyKey())
    for phase in range(2):
        done.clear()
        readers = [threading.Thread(target=follow, args=(follower,)) for follower in followers]
        writers = [threading.Thread(target=write, args=(number, phase)) for number in range(WRITERS)]
        for thread in (*readers, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        for thread in readers:
            thread.join()
        if failures:
            raise AssertionError(f"{type(failures[0]).__name__}: {failures[0]}") from failures[0]
        with stores[0].read() as tx:
            table = {event.revision: event for event in tx.list(EventRecord)}
            end = tx.position
        assert end.revision == len(table) == WRITERS + (phase + 1) * WRITERS * writes * 2 + phase
        position, records = services[0].events.snapshot()
        for follower in followers:
            assert follower.at == position == end
            assert all(table[event.revision] == event for event in follower.seen)
            assert follower.known == {_key(visible(record)): visible(record) for record in records}
            assert follower.resets == phase + 1, "a new epoch is everything anew, once"
        if not phase:
            assert raise_epoch(stores[0], datetime.now(UTC)) > end
    return sum(len(follower.seen) for follower in followers)


@pytest.mark.parametrize("writes", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_p6_followers_see_every_write_once_in_order(store: Store, writes: int) -> None:
    assert check_watch([store], writes) > 0


@pytest.mark.parametrize("writes", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_p6_followers_of_two_services_on_one_postgres(postgres_url: str, writes: int) -> None:
    with closing(open_store(postgres_url)) as one, closing(open_store(postgres_url)) as two:
        assert check_watch([one, two], writes) > 0


def test_p6_a_follower_goes_on_where_it_was_after_a_restart(url: str) -> None:
    store = open_store(url)
    service = Interventions(store, SHAPE)
    follower = Follower([service], 1, 0)
    for round_ in range(5):
        for n in range(round_ + 1):
            service.tenants.create_tenant(ADMIN, f"t{round_}-{n}", IdempotencyKey())
        if round_ % 2:
            follower.step()
        store.close()
        store = open_store(url)
        service = Interventions(store, SHAPE)
        follower._services = [service]
    while follower.step():
        pass
    assert follower.at == Position(1, 15)
    assert follower.resets == 1
    assert len({event.revision for event in follower.seen}) == len(follower.seen) > 0
    store.close()
