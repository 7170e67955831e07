"""Seeded faults, and the check of the promise that must catch each: one that lives is a hole in the tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from backpack_serving.interventions.database import open_store

from tests.interventions import faults
from tests.interventions.crashes import Fault, check_database_killed, check_service_killed
from tests.interventions.histories import record
from tests.interventions.memory import MemoryStore
from tests.interventions.postgres import Postgres
from tests.interventions.power import Disk, driver
from tests.interventions.test_chain import check_flips
from tests.interventions.test_database import check_changed_bytes, check_restores, check_row_level_security
from tests.interventions.test_durability import check_a_failed_sync_stops_the_service, check_power_cuts
from tests.interventions.test_repeats import Opened, check_repeats
from tests.interventions.test_service import check_force
from tests.interventions.test_store import check_tenants_apart
from tests.interventions.test_validation import check_bad_edits, check_model
from tests.interventions.test_watch import check_watch

FAILED = (AssertionError, pytest.fail.Exception)


class Where:
    """What checks need: a folder, a SQLite file, a PostgreSQL."""

    def __init__(self, folder: Path, sqlite_url: str, postgres: Postgres) -> None:
        self.folder, self.sqlite, self.postgres = folder, sqlite_url, postgres

    def on_sqlite(self, check: Callable[..., Any], *arguments: Any) -> None:
        with closing(open_store(self.sqlite)) as store:
            check(store, *arguments)

    def on_postgres(self, check: Callable[..., Any], *arguments: Any, stores: int = 1) -> None:
        url = self.postgres.clean()
        opened = [open_store(url) for _ in range(stores)]
        try:
            check(opened if stores > 1 else opened[0], *arguments)
        finally:
            for store in opened:
                store.close()

    def failing_disk(self, ending: str, writes: int) -> None:
        disk = Disk(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("backpack_serving.interventions.sqlite.pysqlite3.dbapi2", driver(disk))
            check_a_failed_sync_stops_the_service(disk, f"sqlite:///{self.folder}/failing/i.db", ending, writes)


# Of every promise, the check that its own test makes, with less to do. P1's run in processes of their own, or on a
# disk of their own, so they put the fault in themselves.
GALLERY: list[tuple[Fault, str, Callable[[Where], object]]] = [
    (faults.relaxed_fsync, "P1", lambda w: check_power_cuts(w.folder, 60)),
    (faults.relaxed_commit, "P1", lambda w: check_database_killed(w.postgres, 8, faults.relaxed_commit)),
    (faults.checkpoints_of_sqlite, "P1", lambda w: w.failing_disk("i.db", 50)),
    (faults.failed_fsync_ignored, "P1", lambda w: w.failing_disk("-wal", 3)),
    (
        faults.acknowledged_before_commit,
        "P1",
        lambda w: check_service_killed(w.sqlite, 10, fault=faults.acknowledged_before_commit),
    ),
    (faults.event_apart, "P13", lambda w: check_service_killed(w.sqlite, 20, fault=faults.event_apart)),
    (faults.stale_reads, "P2", lambda w: record([MemoryStore()], 6, 40, 1).check()),
    (faults.head_not_locked, "P2", lambda w: w.on_postgres(lambda s: record(s, 6, 20, 1).check(), stores=2)),
    (faults.serial_ids, "P6", lambda w: w.on_postgres(check_watch, 10, stores=2)),
    (faults.reply_apart, "P3", lambda w: check_repeats(lambda: Opened(MemoryStore), 200, True)),
    (faults.request_ids_of_everybody, "P3", lambda w: check_repeats(lambda: Opened(MemoryStore), 200, True)),
    (faults.etag_unchecked, "P4", lambda w: record([MemoryStore()], 6, 40, 1).check()),
    (faults.digests_unchecked, "P5", lambda w: w.on_sqlite(check_changed_bytes, w.postgres)),
    (faults.events_from_before, "P6", lambda w: check_watch([MemoryStore()], 5)),
    (faults.epoch_kept, "P6", lambda w: check_watch([MemoryStore()], 5)),
    (faults.epoch_counted, "P6", lambda w: check_restores(w.sqlite)),
    (faults.no_tenant_filter, "P8", lambda w: w.on_sqlite(check_tenants_apart)),
    (faults.row_level_security_lifted, "P8", lambda w: w.on_postgres(check_row_level_security)),
    (faults.chain_without_changes, "P13", lambda w: w.on_sqlite(check_flips, w.postgres, 40)),
    (faults.force_unchecked, "P15", lambda w: check_force(MemoryStore())),
    (faults.model_unchecked, "P15", lambda w: check_model(MemoryStore())),
    (faults.edits_unchecked, "P14", lambda w: check_bad_edits(MemoryStore(), 200)),
]


@pytest.mark.parametrize(
    ("fault", "promise", "check"), GALLERY, ids=[f"{promise}-{fault.__name__}" for fault, promise, _ in GALLERY]
)
def test_the_suite_catches(
    fault: Fault,
    promise: str,
    check: Callable[[Where], object],
    tmp_path: Path,
    sqlite_url: str,
    postgres: Postgres,
) -> None:
    where = Where(tmp_path, sqlite_url, postgres)
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises((AssertionError, pytest.fail.Exception)) as caught,
        ):
            fault(patch)
            check(where)
    finally:
        postgres.start()
    print(f"{promise} {fault.__name__}: {str(caught.value).splitlines()[0]}")


def test_the_documentation_has_every_fault() -> None:
    text = (Path(__file__).parents[2] / "services/backpack_serving/interventions/README.md").read_text()
    missing = [fault.__name__ for fault, _, _ in GALLERY if f"`{fault.__name__}`" not in text]
    assert not missing
