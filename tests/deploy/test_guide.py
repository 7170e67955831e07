"""The operator's guide: its commands for backup and restore, run as they are written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from backpack_serving.auth.keys import ApiKeySecret, Role
from backpack_serving.interventions import database
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.ledger import IdempotencyKey

from tests.interventions.conftest import releaser
from tests.interventions.postgres import ROLE, Postgres
from tests.interventions.test_database import fill

GUIDE = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()


def _commands(*words: str) -> list[str]:
    """The lines of the guide's code that have all of these words."""
    return [line for line in re.findall(r"^    (.+)$", GUIDE, re.M) if all(word in line for word in words)]


def _run(command: str, folder: Path, programs: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{programs or ''}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.remove()


def _secret(postgres: Postgres, folder: Path) -> tuple[str, str]:
    """A database of an owner who is in the secrets: its URL, and that of the service."""
    owner = postgres.empty()
    database.migrate(owner, ROLE)
    (folder / "secrets").mkdir()
    (folder / "secrets" / "owner_database").write_text(owner)
    return owner, owner.replace(str(sa.make_url(owner).username), ROLE, 1)


def test_postgresql_is_backed_up_and_restored_by_the_owner_of_the_schema(postgres: Postgres, tmp_path: Path) -> None:
    _, service = _secret(postgres, tmp_path)
    store = open_store(service)
    filled = fill(store)
    filled.tenants.bootstrap(ApiKeySecret.mint(), [Role.ADMIN])  # as the service does when it starts
    (dump,), (restore,) = _commands("pg_dump", "owner_database"), _commands("pg_restore", "owner_database")
    (whole,) = _commands("pg_restore", "grep")

    seen = _run(dump.replace("--enable-row-security ", ""), tmp_path, postgres.programs)
    assert "row-level security" in seen.stderr
    for command, complete in ((re.sub("PGOPTIONS='.*?' ", "", dump), False), (dump, True)):
        done = _run(command, tmp_path, postgres.programs)
        assert done.returncode == 0, done.stderr
        assert (_run(whole, tmp_path, postgres.programs).returncode == 0) is complete
    before = database.verify(service)
    filled.patches.create_patch(releaser("acme"), "later", "", IdempotencyKey())
    store.close()

    epochs = [before.position.epoch]
    for _ in range(2):
        done = _run(restore, tmp_path, postgres.programs)
        assert done.returncode == 0, done.stderr
        assert database.verify(service) == before, "what came later is gone, and nothing else"
        epochs.append(database.raise_epoch(service).epoch)
        assert epochs == sorted(set(epochs)), "as often as one backup is restored"


def test_a_restore_that_fails_changes_nothing_and_a_newer_schema_is_emptied_before(
    postgres: Postgres, tmp_path: Path
) -> None:
    owner, service = _secret(postgres, tmp_path)
    store = open_store(service)
    fill(store)
    store.close()
    (dump,), (restore,) = _commands("pg_dump", "owner_database"), _commands("pg_restore", "owner_database")
    (empty,) = _commands("DROP SCHEMA")
    assert _run(dump, tmp_path, postgres.programs).returncode == 0
    before, file = database.verify(service), tmp_path / "backpack.dump"
    whole = file.read_bytes()

    for kept in range(80, 100, 2):  # per cent: it breaks off in other places
        file.write_bytes(whole[: len(whole) * kept // 100])
        assert _run(restore, tmp_path, postgres.programs).returncode != 0
        assert database.verify(service) == before

    file.write_bytes(whole)
    newer = "CREATE TABLE newer (tenant text REFERENCES tenants (tenant))"
    postgres.sql(newer, str(sa.make_url(owner).database))
    assert "other objects depend on it" in _run(restore, tmp_path, postgres.programs).stderr
    for command in (empty, restore):
        done = _run(command, tmp_path, postgres.programs)
        assert done.returncode == 0, done.stderr
    assert database.verify(service) == before


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="no sqlite3: apt install sqlite3")
def test_sqlite_is_backed_up_while_it_is_in_use(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'interventions.db'}")
    fill(store)
    (backup,) = _commands("sqlite3", ".backup")
    done = _run(backup, tmp_path)
    assert done.returncode == 0, done.stderr
    store.close()
    assert database.verify(f"sqlite:///{tmp_path / 'backup.db'}").entries == 5
