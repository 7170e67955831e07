"""The intervention service: acknowledged writes on both stores, and a store with 1,000 tenants × 20 revisions.

    python -m tests.bench.interventions [--store sqlite|postgresql] [--tenants N] [--revisions N] [--seconds S]

Writes are activations (the smallest real write: a channel, an event, a reply, the head) from 1 and from 16
threads, with request ids, through the rules, committed with fsync. The large store is filled through them as well.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from backpack_lm.patch import Cell, ModelShape, ScaleEdit
from backpack_serving.auth.keys import SYSTEM, ApiKeySecret, Principal, Role
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.event_history import EventHistory
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.store import Store
from backpack_serving.references import LIVE
from backpack_serving.sync.messages import Snapshot
from backpack_serving.sync.wire import write_to_reader
from rich.progress import track

from tests.bench.report import console, write
from tests.interventions.postgres import Postgres

SHAPE = ModelShape("ab" * 32, vocab_size=50, num_senses=4, width=8, sense_rms=(1.0,) * 4)
ADMIN = Principal(SYSTEM, "bench", frozenset({Role.ADMIN}))


STORES = {"sqlite": "SQLite", "postgresql": "PostgreSQL 18"}


def releaser(tenant: str) -> Principal:
    return Principal(tenant, "bench", frozenset({Role.RELEASER}))


@contextmanager
def opened(url: str) -> Iterator[Store]:
    store = open_store(url)
    yield store
    store.close()


@contextmanager
def databases(store: str) -> Iterator[Callable[[], str]]:
    """Makes URLs of new databases."""
    with tempfile.TemporaryDirectory() as folder:
        if store == "sqlite":
            names = itertools.count()
            yield lambda: f"sqlite:///{folder}/{next(names)}.db"
            return
        postgres = Postgres()
        try:
            yield postgres.migrated
        finally:
            postgres.remove()


def writes(url: str, threads: int, seconds: float) -> dict[str, float]:
    """Activations per second that were acknowledged, and how long one took."""
    with opened(url) as store:
        service = Interventions(store, SHAPE)
        took: list[float] = []
        end = [0.0]

        def work(tenant: str) -> None:
            who = releaser(tenant)
            etag = service.channels.get_channel(who, LIVE).etag
            while time.perf_counter() < end[0]:
                begun = time.perf_counter()
                request = IdempotencyKey(str(uuid.uuid4()), "body")
                etag = service.channels.activate(who, LIVE, 0, etag, request).record.etag
                took.append(time.perf_counter() - begun)

        names = [f"t{threads}-{n}" for n in range(threads)]
        for name in names:
            service.tenants.create_tenant(ADMIN, name, IdempotencyKey())
        running = [threading.Thread(target=work, args=(name,)) for name in names]
        begun = time.perf_counter()
        end[0] = begun + seconds
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        elapsed = time.perf_counter() - begun
    cuts = statistics.quantiles(took, n=100)
    return {
        "threads": threads,
        "per_second": len(took) / elapsed,
        "p50_ms": cuts[49] * 1e3,
        "p99_ms": cuts[98] * 1e3,
    }


def fill(url: str, tenants: int, revisions: int, name: str) -> float:
    """Tenants with a key, a patch, its revisions, and the last one released and live; how many seconds it took."""
    begun = time.perf_counter()
    with opened(url) as store:
        service = Interventions(store, SHAPE)
        for number in track(range(tenants), f"filling {name}", console=console, transient=True):
            tenant = f"t{number}"
            who = releaser(tenant)
            service.tenants.create_tenant(ADMIN, tenant, IdempotencyKey())
            service.tenants.create_key(ADMIN, tenant, [Role.CALLER], IdempotencyKey())
            service.patches.create_patch(who, "p", "", IdempotencyKey())
            for revision in range(revisions):
                edit = ScaleEdit((Cell(revision % 50, 1), Cell(number % 50, 2)), 0.5)
                service.patches.create_revision(who, "p", [edit], IdempotencyKey())
            release = service.releases.create_release(who, [("p", revisions)], "", IdempotencyKey()).record
            service.channels.activate(
                who, LIVE, release.number, service.channels.get_channel(who, LIVE).etag, IdempotencyKey()
            )
    return time.perf_counter() - begun


def large(url: str, told: Any) -> None:
    """In a process of its own: start the service on a filled store, and what that costs."""
    process = psutil.Process()
    before = process.memory_info().rss
    begun = time.perf_counter()
    with opened(url) as store:
        service = Interventions(store, SHAPE)
        service.channels.check_model("")
        service.tenants.bootstrap(ApiKeySecret.mint(), [Role.ADMIN])
        started = time.perf_counter() - begun
        begun = time.perf_counter()
        page = EventHistory(service).snapshot()
        messages = write_to_reader(Snapshot(1, page.position, page.changes))
        size = sum(message.ByteSize() for message in messages)
        snapshot = time.perf_counter() - begun
        after = process.memory_info().rss
        begun = time.perf_counter()
        entries, broken = service.events.verify_chain(ADMIN)
        verified = time.perf_counter() - begun
        assert broken is None
    told.send(
        {
            "revision": page.position.revision,
            "start_s": started,
            "snapshot_s": snapshot,
            "snapshot_bytes": size,
            "changes": len(page.changes),
            "memory_mib": (after - before) / 2**20,
            "entries": entries,
            "verify_chain_s": verified,
        }
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--store", choices=STORES, help="only this one; its results are a file of their own")
    options.add_argument("--tenants", type=int, default=1000)
    options.add_argument("--revisions", type=int, default=20)
    options.add_argument("--seconds", type=float, default=4.0)
    chosen = options.parse_args()
    results: dict[str, Any] = {}
    for store in [chosen.store] if chosen.store else STORES:
        with databases(store) as database:
            with console.status(f"writes on {STORES[store]}"):
                url = database()
                speed = [writes(url, threads, chosen.seconds) for threads in (1, 16)]
            filled = database()
            seconds = fill(filled, chosen.tenants, chosen.revisions, STORES[store])
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=large, args=(filled, theirs))
            child.start()
            results[STORES[store]] = {"writes": speed, "filled_s": seconds, "large": ours.recv()}
            child.join()
    rows = []
    for name, found in results.items():
        one, many, big = *found["writes"], found["large"]
        rows.append(
            [
                name,
                *(f"{speed['per_second']:.0f} (p50 {speed['p50_ms']:.2f} ms, p99 {speed['p99_ms']:.2f} ms)"
                  for speed in (one, many)),
                f"{big['start_s']:.2f} s, {big['memory_mib']:.0f} MiB",
                f"{big['snapshot_s']:.2f} s, {big['snapshot_bytes'] / 1024:.0f} KiB",
                f"{big['verify_chain_s']:.2f} s for {big['entries']}",
            ]
        )  # fmt: skip
    columns = ["store", "acknowledged writes/s, 1 thread", "16 threads", "start", "snapshot", "VerifyChain"]
    title = f"Intervention service: writes, and a store of {chosen.tenants} tenants × {chosen.revisions} revisions"
    name, command = "interventions", "python -m tests.bench.interventions"
    if chosen.store:
        name, command = f"{name}-{chosen.store}", f"{command} --store {chosen.store}"
    write(name, title, command, columns, rows, results)


if __name__ == "__main__":
    main()
