"""Processes that write to a store as fast as they can, to be killed; and what must be there afterwards.

A writer is a service of its own. Every request has an id and is repeated until it is answered, so the count of
effects is known, too: what was answered, and at most one more for each thread that was killed in the middle.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import threading
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
from backpack_lm.patch import Cell, ScaleEdit
from backpack_serving.errors import Unavailable
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.ledger import IdempotencyKey, WriteResult, verify_chain
from backpack_serving.interventions.records import (
    ChannelRecord,
    EventRecord,
    PatchRecord,
    ReleaseRecord,
    RevisionRecord,
    TenantRecord,
)
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.store import Store
from backpack_serving.references import LIVE

from tests.interventions.conftest import ADMIN, SHAPE, releaser

THREADS = 4
PATIENCE = 60.0
"""Seconds. Counted in sleeps where something is tried again: a machine may be suspended meanwhile."""

Acknowledged = tuple[str, str, str, int]
"""Method, resource, what it became, and the store's revision."""

Fault = Callable[[pytest.MonkeyPatch], None]
"""Breaks the product on purpose: see `faults.py`."""

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.interventions.crashes"])


class Writers:
    """Some writers on one database, and what they were told. `fault`, run in each, breaks the product."""

    def __init__(self, url: str, name: str, count: int = 1, fault: Fault | None = None) -> None:
        self.acknowledged: list[Acknowledged] = []
        self._stop = processes.Event()
        self._running, self._readers = [], []
        for number in range(count):
            ours, theirs = processes.Pipe(duplex=False)
            process = processes.Process(target=_write, args=(url, f"{name}-{number}", theirs, self._stop, fault))
            process.start()
            theirs.close()
            reader = threading.Thread(target=self._read, args=(ours,))
            reader.start()
            self._running.append(process)
            self._readers.append(reader)

    def wait_for(self, count: int) -> None:
        """Until so many more writes were acknowledged."""
        wanted = len(self.acknowledged) + count
        for _ in range(int(PATIENCE / 0.002)):
            if len(self.acknowledged) >= wanted:
                return
            assert any(process.is_alive() for process in self._running), "the writers ended"
            time.sleep(0.002)
        raise AssertionError(f"{len(self.acknowledged)} writes, {wanted} awaited")

    def kill(self) -> None:
        for process in self._running:
            process.kill()
        self._end()

    def finish(self) -> None:
        """Let every thread finish the request that it is at."""
        self._stop.set()
        self._end()
        assert all(code == 0 for code in self.codes), self.codes

    def _end(self) -> None:
        for process in self._running:
            process.join(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        self.codes = [process.exitcode for process in self._running]
        for process in self._running:
            process.close()

    def _read(self, source: Connection) -> None:
        with source:
            try:
                while True:
                    self.acknowledged.append(tuple(json.loads(source.recv_bytes())))
            except (EOFError, OSError):
                pass


def _write(url: str, name: str, told: Connection, stop: Any, fault: Fault | None) -> None:
    if fault:
        fault(pytest.MonkeyPatch())
    store = patiently(lambda: open_store(url))
    service = Interventions(store, SHAPE)
    lock = threading.Lock()

    def tell(method: str, written: WriteResult[Any], became: str) -> None:
        entry = [method, written.record.name, became, written.position.revision]
        with lock:
            told.send_bytes(json.dumps(entry).encode())

    threads = [threading.Thread(target=_one_tenant, args=(service, f"t{name}-{n}", tell, stop)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.close()
    store.close()


def _one_tenant(service: Interventions, tenant: str, tell: Callable[..., None], stop: Any) -> None:
    who, chance = releaser(tenant), random.Random(tenant)

    def do(method: str, became: str, *arguments: Any) -> Any:
        again = request()
        written = patiently(lambda: rule(service, method)(*arguments, again))
        tell(method, written, str(getattr(written.record, became)))
        return written.record

    do("create_tenant", "tenant", ADMIN, tenant)
    do("create_patch", "patch", who, "p", "")
    etag = patiently(lambda: service.channels.get_channel(who, LIVE)).etag
    while not stop.is_set():
        edit = ScaleEdit((Cell(chance.randrange(50), 1),), chance.uniform(2, 8))
        revision = do("create_revision", "digest", who, "p", [edit])
        release = do("create_release", "digest", who, [("p", revision.number)], "")
        etag = do("activate", "etag", who, LIVE, release.number, etag).etag


def rule(service: Interventions, method: str) -> Callable[..., Any]:
    """The method of this name, of whichever rules of the service have it."""
    return next(getattr(rules, method) for rules in vars(service).values() if hasattr(rules, method))


def request() -> IdempotencyKey:
    """One that may be repeated."""
    return IdempotencyKey(str(uuid.uuid4()), "body")


def patiently(act: Callable[[], Any]) -> Any:
    """Do it again until the database is there. The request has an id, so it happens once."""
    for _ in range(int(PATIENCE / 0.02)):
        try:
            return act()
        except Unavailable:
            time.sleep(0.02)
    return act()


def check_kept(store: Store, acknowledged: list[Acknowledged], in_doubt: int) -> None:
    """All that was acknowledged is there, once, as it was; and of what wasn't, at most so many writes."""
    names = {
        "create_tenant": "CreateTenant",
        "create_patch": "CreatePatch",
        "create_revision": "CreateRevision",
        "create_release": "CreateRelease",
        "activate": "Activate",
    }
    made: dict[type[Any], str] = {
        TenantRecord: "CreateTenant",
        PatchRecord: "CreatePatch",
        RevisionRecord: "CreateRevision",
    }
    with store.read() as tx:
        events = {event.revision: event for event in tx.list(EventRecord)}
        for kind, method in made.items():
            told = [event.resource for event in events.values() if event.method == method]
            assert sorted(record.name for record in tx.list(kind)) == sorted(told), f"{method}s and their entries"
        count, broken = verify_chain(tx)
        assert broken is None, f"the chain breaks at {broken}"
        assert count == tx.position.revision == len(events), "revisions have no gaps"
        for method, resource, became, at in acknowledged:
            assert at in events, f"{method} of {resource} was acknowledged at {at}, and is lost"
            event = events[at]
            assert (event.method, event.resource) == (names[method], resource), f"{at} became another write"
            _, tenant, *rest = resource.split("/")
            if method == "create_revision":
                kept = tx.get(RevisionRecord, tenant, rest[1], int(rest[3]))
                assert kept is not None, f"{resource} is lost"
                assert kept.digest == became
            elif method == "create_release":
                release = tx.get(ReleaseRecord, tenant, int(rest[1]))
                assert release is not None, f"{resource} is lost"
                assert release.digest == became
            elif method == "activate":
                channel = tx.get(ChannelRecord, tenant, rest[1])
                assert channel is not None, f"{resource} is lost"
                assert channel.generation >= int(became.split("-")[0]), f"{resource} went back"
    positions = [at for *_, at in acknowledged]
    assert len(set(positions)) == len(positions), "two writes were told the same revision"
    extra = len(events) - len(positions)
    assert 0 <= extra <= in_doubt, f"{extra} effects that nobody asked for or was told of; at most {in_doubt}"


def check_service_killed(url: str, rounds: int, writers: int = 1, fault: Fault | None = None) -> int:
    """P1: SIGKILL to writers at any moment, again and again; how many writes had been acknowledged."""
    chance, acknowledged = random.Random(rounds), []
    for number in range(rounds):
        running = Writers(url, str(number), writers, fault)
        try:
            running.wait_for(3)
            time.sleep(chance.uniform(0, 0.1))
        finally:
            running.kill()
        acknowledged += running.acknowledged
        if number % 10 == 9 or number == rounds - 1:
            store = open_store(url)
            try:
                check_kept(store, acknowledged, in_doubt=(number + 1) * writers * THREADS)
            finally:
                store.close()
    return len(acknowledged)


def check_database_killed(postgres: Any, rounds: int, fault: Fault | None = None) -> int:
    """P1 and P3: SIGKILL to PostgreSQL while two services write; nothing is lost and nothing happens twice."""
    url, chance = postgres.migrated(), random.Random(rounds)
    running = Writers(url, "w", 2, fault)
    try:
        for _ in range(rounds):
            running.wait_for(20)
            time.sleep(chance.uniform(0, 0.05))
            postgres.kill()
            postgres.start()
        running.wait_for(20)
        running.finish()
    except BaseException:
        running.kill()
        raise
    store = open_store(url)
    try:
        check_kept(store, running.acknowledged, in_doubt=0)
    finally:
        store.close()
    return len(running.acknowledged)
