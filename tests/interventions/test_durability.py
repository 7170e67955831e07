"""P1: what was acknowledged is there after a kill, a power cut and the end of the database, or nobody says OK."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from backpack_lm.patch import Cell, ScaleEdit
from backpack_proto.v1 import interventions_pb2, interventions_pb2_grpc
from backpack_serving import rpc
from backpack_serving.cli.main import app
from backpack_serving.errors import ServiceError, Unavailable
from backpack_serving.interventions import sqlite
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.store import Store
from backpack_serving.settings import Settings
from typer.testing import CliRunner

from tests.conftest import free_port
from tests.interventions.conftest import ADMIN, SHAPE, releaser
from tests.interventions.crashes import (
    Acknowledged,
    check_database_killed,
    check_kept,
    check_service_killed,
    patiently,
)
from tests.interventions.postgres import Postgres
from tests.interventions.power import Disk, driver

LONG = pytest.mark.slow


@pytest.mark.parametrize("kills", [20, pytest.param(300, marks=LONG)])
def test_p1_sigkill_of_the_service_on_sqlite(sqlite_url: str, kills: int) -> None:
    assert check_service_killed(sqlite_url, kills) >= 3 * kills


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=LONG)])
def test_p1_sigkill_of_two_services_on_postgres(postgres: Postgres, kills: int) -> None:
    assert check_service_killed(postgres.migrated(), kills, writers=2) >= 3 * kills


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=LONG)])
def test_p1_sigkill_of_postgres_under_two_services(postgres: Postgres, kills: int) -> None:
    assert check_database_killed(postgres, kills) >= 20 * kills


def check_power_cuts(folder: Path, cuts: int, seed: int = 1) -> int:
    """One writer, and now and then, in mid-write too, a copy of what a power cut leaves: each must be whole."""
    disk, chance = Disk(seed), random.Random(seed)
    acknowledged: list[Acknowledged] = []
    left: list[tuple[Path, int]] = []
    countdown = itertools.count(1)

    def moment() -> None:
        if len(left) < cuts and next(countdown) % 13 == 0 and chance.random() < 0.5:
            place = folder / f"cut{len(left)}"
            place.mkdir()
            left.append((disk.cut(place), len(acknowledged)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite, "CHECKPOINT_WRITES", 7)
        patch.setattr(sqlite.pysqlite3, "dbapi2", driver(disk))
        (folder / "live").mkdir()
        path = folder / "live" / "i.db"
        store = open_store(f"sqlite:///{path}")
        disk.moments.append(moment)
        service = Interventions(store, SHAPE)
        service.tenants.create_tenant(ADMIN, "acme", IdempotencyKey())
        acknowledged.append(("create_tenant", "tenants/acme", "acme", 1))
        acme = releaser("acme")
        acknowledged.append(
            ("create_patch", service.patches.create_patch(acme, "p", "", IdempotencyKey()).record.name, "p", 2)
        )
        while len(left) < cuts:
            edits = [ScaleEdit((Cell(chance.randrange(50), 1),), chance.uniform(2, 8))] * chance.choice([1, 1, 1, 60])
            made = service.patches.create_revision(acme, "p", edits, IdempotencyKey())
            written = made.record.name, made.record.digest, made.position.revision
            acknowledged.append(("create_revision", *written))
        disk.moments.clear()
        store.close()
    for database, told in left:
        again = open_store(f"sqlite:///{database}")
        try:
            check_kept(again, acknowledged[:told], in_doubt=1)
        finally:
            again.close()
        shutil.rmtree(database.parent)
    return len(left)


@pytest.mark.parametrize("cuts", [100, pytest.param(1000, marks=LONG)])
def test_p1_power_cut(tmp_path: Path, cuts: int) -> None:
    assert check_power_cuts(tmp_path, cuts) == cuts


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(1)
    monkeypatch.setattr(sqlite.pysqlite3, "dbapi2", driver(disk))
    return disk


def check_a_failed_sync_stops_the_service(disk: Disk, url: str, failing: str, writes: int) -> None:
    """After `writes` more writes at most, the one that can't be synced is refused, and so is all that follows."""
    with closing(open_store(url)) as store:
        _check_it_stops(store, disk, failing, writes)


def _check_it_stops(store: Store, disk: Disk, failing: str, writes: int) -> None:
    stopped: list[str] = []
    store.listen(lambda: None, stopped.append)
    service = Interventions(store, SHAPE)
    service.tenants.create_tenant(ADMIN, "before", IdempotencyKey())
    disk.failing = failing
    names = iter(f"t{n}" for n in range(writes))
    with pytest.raises(Unavailable, match="the disk says no"):
        for name in names:
            service.tenants.create_tenant(ADMIN, name, IdempotencyKey())
    disk.failing = ""
    assert stopped, "the process is told, so that it ends"
    uses: tuple[Callable[[], object], ...] = (
        lambda: service.tenants.create_tenant(ADMIN, "after", IdempotencyKey()),
        service.events.snapshot,
    )
    for use in uses:
        with pytest.raises(Unavailable, match="started again") as refused:
            use()
        assert refused.value.reason == "STORE_FAILED"


@pytest.mark.parametrize(("failing", "writes"), [("-wal", 1), ("i.db", sqlite.CHECKPOINT_WRITES)])
def test_p1_a_failed_fsync_stops_the_service(disk: Disk, tmp_path: Path, failing: str, writes: int) -> None:
    check_a_failed_sync_stops_the_service(disk, f"sqlite:///{tmp_path}/i.db", failing, writes)
    again = open_store(f"sqlite:///{tmp_path}/i.db")
    Interventions(again, SHAPE).tenants.create_tenant(ADMIN, "after", IdempotencyKey())
    again.close()


def test_p1_the_process_ends_so_that_it_is_started_again(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`backpack serve interventions` with a disk that stops syncing: the write is refused, exit status 1."""
    state = {"STATE": tmp_path, "INTERVENTIONS_ADDRESS": f"127.0.0.1:{free_port()}", "METRICS_ADDRESS": ""}
    for name, value in state.items():
        monkeypatch.setenv(f"BACKPACK_{name}", str(value))
    refused: list[ServiceError] = []

    def write() -> None:
        settings = Settings()
        with rpc.sync_channel(settings.interventions_address) as channel:
            stub = interventions_pb2_grpc.TenantServiceStub(channel)
            key = rpc.with_key(patiently(lambda: _key(settings)))
            ask = lambda name: stub.CreateTenant(  # noqa: E731
                interventions_pb2.CreateTenantRequest(tenant_id=name),
                metadata=key,
                wait_for_ready=True,
                timeout=60,
            )
            ask("before")
            disk.failing = "-wal"
            try:
                with rpc.errors():
                    ask("lost")
            except ServiceError as error:
                refused.append(error)

    def client() -> None:
        try:
            write()
        finally:
            if not refused:  # then nothing ends the service, and this test would wait for ever
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=client)
    thread.start()
    done = CliRunner().invoke(app, ["serve", "interventions"])
    thread.join()
    assert [error.reason for error in refused] == ["STORE_FAILED"]
    assert done.exit_code == 1, done.output


def _key(settings: Settings) -> str:
    try:
        return settings.key_for("admin")
    except FileNotFoundError:
        raise Unavailable("STARTING", "not yet") from None
