"""What only a database can promise: durability, triggers, one owner, and a schema that is what the code says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from backpack_serving.errors import Unavailable
from backpack_serving.interventions.ledger import Request
from backpack_serving.interventions.service import LIVE, Interventions
from backpack_serving.interventions.sql import SQLStore, metadata

from tests.interventions.conftest import ADMIN, HALVE, SHAPE, releaser


def _fill(store: SQLStore) -> Interventions:
    service = Interventions(store, SHAPE)
    service.create_tenant(ADMIN, "acme", Request())
    acme = releaser("acme")
    service.create_patch(acme, "p", "", Request())
    service.create_revision(acme, "p", [HALVE], Request())
    service.create_release(acme, [("p", 1)], "", Request())
    service.activate(acme, LIVE, 1, service.channel(acme, LIVE).etag, Request())
    return service


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/i.db"
    store = SQLStore.open(url)
    before = _fill(store).snapshot()
    store.close()
    again = SQLStore.open(url)
    service = Interventions(again, SHAPE)
    assert service.snapshot() == before
    assert service.verify_chain(ADMIN) == (5, None)
    again.close()


def test_the_migrated_schema_is_the_one_in_the_code(tmp_path: Path) -> None:
    store = SQLStore.open(f"sqlite:///{tmp_path}/i.db")
    with store._engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    store.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE revisions SET digest = 'x'",
        "DELETE FROM releases",
        "DELETE FROM events",
        "UPDATE events SET hash = ''",
    ],
)
def test_what_never_changes_is_kept_by_the_schema_too(tmp_path: Path, statement: str) -> None:
    store = SQLStore.open(f"sqlite:///{tmp_path}/i.db")
    _fill(store)
    with pytest.raises(sa.exc.IntegrityError, match="never change"), store._engine.begin() as connection:
        connection.execute(sa.text(statement))
    store.close()


@pytest.mark.parametrize("column", ["tenant", "principal", "method", "resource", "changes", "hash"])
def test_an_altered_audit_entry_is_found(tmp_path: Path, column: str) -> None:
    store = SQLStore.open(f"sqlite:///{tmp_path}/i.db")
    service = _fill(store)
    with store._engine.begin() as connection:
        connection.execute(sa.text("DROP TRIGGER events_no_update"))
        connection.execute(sa.text(f"UPDATE events SET {column} = {column} || ' ' WHERE revision = 3"))
    assert service.verify_chain(ADMIN)[1] == 3
    store.close()


def test_a_second_service_on_the_same_file_is_refused(tmp_path: Path) -> None:
    store = SQLStore.open(f"sqlite:///{tmp_path}/i.db")
    with pytest.raises(Unavailable, match="another service"):
        SQLStore.open(f"sqlite:///{tmp_path}/i.db")
    store.close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i.db").write_text("this is not a database" * 100)
    with pytest.raises(Unavailable, match="can't be used"):
        SQLStore.open(f"sqlite:///{tmp_path}/i.db")


KILLED = """
import sys
from backpack_serving.interventions.ledger import Request
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.sql import SQLStore
from tests.interventions.conftest import ADMIN, SHAPE
service = Interventions(SQLStore.open(sys.argv[1]), SHAPE)
for n in range(100000):
    service.create_tenant(ADMIN, f"{sys.argv[2]}{n}", Request())
    print(f"{sys.argv[2]}{n}", flush=True)
"""


def test_every_acknowledged_write_survives_kill_9(tmp_path: Path) -> None:
    url, acknowledged = f"sqlite:///{tmp_path}/i.db", []
    for letter in "abc":
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, url, letter],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path.cwd())])},
        )
        assert child.stdout is not None
        acknowledged += [child.stdout.readline().strip() for _ in range(20)]
        child.send_signal(signal.SIGKILL)
        acknowledged += child.stdout.read().split("\n")[:-1]
        child.wait()
        child.stdout.close()
    store = SQLStore.open(url)
    service = Interventions(store, SHAPE)
    there = {t.tenant for t in service.tenants(ADMIN, None, 100_000)}
    assert len(acknowledged) >= 60
    assert set(acknowledged) <= there
    assert service.verify_chain(ADMIN)[1] is None
    store.close()
