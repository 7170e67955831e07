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
from backpack_serving.interventions import database
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.ledger import Request

from tests.interventions.conftest import releaser
from tests.interventions.postgres import ROLE, Postgres
from tests.interventions.test_database import fill

GUIDE = (Path(__file__).parents[2] / "deploy" / "README.md").read_text()


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


def test_postgresql_is_backed_up_and_restored_by_the_owner_of_the_schema(
    postgres: Postgres, tmp_path: Path
) -> None:
    owner = postgres.empty()
    database.migrate(owner, ROLE)
    service = owner.replace(str(sa.make_url(owner).username), ROLE, 1)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "owner_database").write_text(owner)
    store = open_store(service)
    filled = fill(store)
    (dump,) = _commands("pg_dump", "owner_database")
    (restore,) = _commands("pg_restore", "owner_database")

    plain = re.sub(r"PGOPTIONS='.*?' |--enable-row-security ", "", dump)
    assert "row-level security" in _run(plain, tmp_path, postgres.programs).stderr, "both are needed"
    done = _run(dump, tmp_path, postgres.programs)
    assert done.returncode == 0, done.stderr
    before = database.verify(service)
    filled.create_patch(releaser("acme"), "later", "", Request())
    store.close()

    epochs = [before.position.epoch]
    for _ in range(2):
        done = _run(restore, tmp_path, postgres.programs)
        assert done.returncode == 0, done.stderr
        assert database.verify(service) == before, "what came later is gone, and nothing else"
        epochs.append(database.raise_epoch(service).epoch)
        assert epochs == sorted(set(epochs)), "as often as one backup is restored"


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="no sqlite3: apt install sqlite3")
def test_sqlite_is_backed_up_while_it_is_in_use(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'interventions.db'}")
    fill(store)
    (backup,) = _commands("sqlite3", ".backup")
    done = _run(backup, tmp_path)
    assert done.returncode == 0, done.stderr
    store.close()
    assert database.verify(f"sqlite:///{tmp_path / 'backup.db'}").entries == 5
