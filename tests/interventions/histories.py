"""Clients that write and read at once, what they were told, and whether one order of events explains it all.

A write whose answer never came (a failed call, a lost reply, a killed database) may have happened, once, at any
time since, or never. The search for an order is detangle's (Wing and Gong, with Lowe's memory); the models of what
a store may answer are here. `test_histories.py` shows that they refuse histories that can't be explained.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from backpack_lm.patch import Cell, ScaleEdit
from backpack_serving.errors import Conflict, Unavailable
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.store import Store
from backpack_serving.references import LIVE
from detangle import lin

from tests.interventions.conftest import ADMIN, SHAPE, releaser

RELEASES = 4


class Positions(lin.Model):
    """The store's revision: a write answers with the next one, a read with the one that is."""

    def __init__(self, start: int = 0) -> None:
        self._start = start

    def init(self) -> int:
        return self._start

    def step(self, state: int, op: lin.Operation) -> tuple[bool, int]:
        if op.f == "read":
            return op.status != lin.OK or op.output == state, state
        return op.status != lin.OK or op.output == state + 1, state + 1


class Pointer(lin.Model):
    """A channel, as (generation, release): moved only by who knows the generation, and one at a time."""

    def init(self) -> tuple[int, int]:
        return 1, 0

    def step(self, state: Any, op: lin.Operation) -> tuple[bool, Any]:
        known = op.status == lin.OK
        if op.f == "read":
            return not known or op.output == state, state
        expected, release = op.arg
        if state[0] != expected:
            return not known or op.output == "stale", state
        return not known or op.output == expected + 1, (expected + 1, release)


class Numbers(lin.Model):
    """A patch's revisions: each gets the next number, and a list shows all of them."""

    def init(self) -> int:
        return 0

    step = Positions.step


@dataclass
class Histories:
    """Three views of one run; each must have an order of its own, and every call is in the ones it concerns."""

    start: int
    positions: lin.History = field(default_factory=lin.History)
    pointer: lin.History = field(default_factory=lin.History)
    numbers: lin.History = field(default_factory=lin.History)

    def check(self) -> int:
        """How many calls there were. Raises AssertionError if no order explains what they were told."""
        self.positions.assert_linearizable(Positions(self.start))
        self.pointer.assert_linearizable(Pointer())
        self.numbers.assert_linearizable(Numbers())
        return len(self.positions)


class LostAnswer(Exception):
    """What a client sees of a write whose answer never comes."""


class Loser:
    """Called by a service after each commit: now and then, the answer is lost."""

    def __init__(self, seed: int, share: float) -> None:
        self._chance, self._share = random.Random(seed), share

    def __call__(self) -> None:
        if self._chance.random() < self._share:
            raise LostAnswer


class Recorder:
    """Calls of one client at a time, into the histories that they concern."""

    def __init__(self, histories: Histories) -> None:
        self._histories, self._lock = histories, threading.Lock()

    def call(self, client: int, act: Callable[[], Any], *views: tuple[str, str, Any, Callable[[Any], Any]]) -> Any:
        """`views`: name of a history, what the operation is there, its argument, what its answer says of it."""
        with self._lock:
            begun = [(getattr(self._histories, v), getattr(self._histories, v).invoke(client, f, a), read)
                     for v, f, a, read in views]  # fmt: skip
        try:
            answer: Any = act()
        except Conflict as error:
            answer = error
        except (Unavailable, LostAnswer):
            with self._lock:
                for history, operation, _ in begun:
                    history.info(operation)
            return None
        with self._lock:
            for history, operation, read in begun:
                if isinstance(answer, Conflict) and history is self._histories.positions:
                    history.fail(operation)  # a refused write moves nothing
                else:
                    history.ok(operation, read(answer))
        return answer


def _client(service: Interventions, tenant: str, recorder: Recorder, number: int, calls: int) -> None:
    acme, chance = releaser(tenant), random.Random(number)
    at = lambda written: written.position.revision  # noqa: E731
    channel: Any = None
    for _ in range(calls):
        time.sleep(chance.random() * 0.002)  # else a client on a fast store is through before the next one begins
        kind = chance.choice(["activate", "activate", "revise", "look", "list", "position"])
        if kind == "look" or (kind == "activate" and channel is None):
            found = recorder.call(
                number,
                lambda: service.channels.get_channel(acme, LIVE),
                ("pointer", "read", None, lambda c: (c.generation, c.release)),
            )
            channel = found or channel
        elif kind == "activate":
            release, known = chance.randrange(RELEASES), channel
            done = recorder.call(
                number,
                lambda known=known, release=release: service.channels.activate(
                    acme, LIVE, release, known.etag, IdempotencyKey()
                ),
                ("positions", "write", None, at),
                (
                    "pointer",
                    "move",
                    (known.generation, release),
                    lambda w: "stale" if isinstance(w, Conflict) else w.record.generation,
                ),
            )
            channel = None if done is None or isinstance(done, Conflict) else done.record
        elif kind == "revise":
            edit = ScaleEdit((Cell(chance.randrange(50), 1),), chance.uniform(2, 8))
            recorder.call(
                number,
                lambda edit=edit: service.patches.create_revision(acme, "p", [edit], IdempotencyKey()),
                ("positions", "write", None, at),
                ("numbers", "add", None, lambda w: w.record.number),
            )
        elif kind == "list":
            recorder.call(
                number,
                lambda: service.patches.list_revisions(acme, "p", None, 10_000),
                ("numbers", "read", None, lambda found: len(found)),
            )
        else:
            recorder.call(
                number,
                lambda: service.events.snapshot()[0].revision,
                ("positions", "read", None, lambda revision: revision),
            )


def record(
    stores: Sequence[Store],
    clients: int,
    calls: int,
    seed: int,
    lost: float = 0.05,
    meanwhile: Callable[[], None] = lambda: None,
) -> Histories:
    """Let clients loose on services that share what they write; `meanwhile` something else happens."""
    first, tenant = Interventions(stores[0], SHAPE), f"t{seed}"
    first.tenants.create_tenant(ADMIN, tenant, IdempotencyKey())
    first.patches.create_patch(releaser(tenant), "p", "", IdempotencyKey())
    for _ in range(RELEASES):
        first.releases.create_release(releaser(tenant), [], "", IdempotencyKey())
    histories = Histories(first.events.snapshot()[0].revision)
    services = [Interventions(store, SHAPE, on_write=Loser(seed + n, lost)) for n, store in enumerate(stores)]
    recorder = Recorder(histories)
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            _client(services[number % len(services)], tenant, recorder, seed * 100 + number, calls)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    with suppress(StopIteration):
        meanwhile()
    for thread in threads:
        thread.join()
    if failures:
        raise AssertionError(f"a client was told nonsense: {failures[0]!r}") from failures[0]
    return histories
