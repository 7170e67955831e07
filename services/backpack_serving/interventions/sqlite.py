"""The store on SQLite: the embedded default, for one process.

WAL with synchronous=FULL (NORMAL loses acknowledged commits in a power cut), on one connection (SQLite up to
3.51.2 can damage a WAL when two reset it), with a file lock that keeps a second service away. Checkpoints are made
here and not by SQLite, which keeps their errors to itself: a kernel reports a failed fsync once, and forgets it.
"""

from __future__ import annotations

import fcntl
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pysqlite3
import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from backpack_serving.errors import Unavailable
from backpack_serving.interventions import schema
from backpack_serving.interventions.disk import diagnose
from backpack_serving.interventions.sql import SQLStore
from backpack_serving.interventions.store import ignore_message

PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=0", "foreign_keys=ON")
"""Set on each connection. They decide what survives a power cut."""

CHECKPOINT_WRITES = 200
"""Writes between two checkpoints, which copy the write-ahead log into the database file."""


class SQLiteStore(SQLStore):
    """A store in a file. A commit or a checkpoint that fails stops it until the service has been started again:
    what is on disk is unknown then, and a second fsync could say yes and mean nothing.
    """

    def __init__(self, engine: sa.Engine, lock: IO[str]) -> None:
        super().__init__(engine)
        self._file_lock, self._lock = lock, threading.RLock()
        self._failed, self._closed, self._since_checkpoint = "", False, 0
        self._on_failure: Callable[[str], None] = lambda why: None

    @classmethod
    def open(cls, url: sa.URL, wait: float = 0.0) -> SQLiteStore:
        """Open and migrate a database, waiting at most `wait` seconds for another process that has it.

        Raises Unavailable if another one still has it, or it can't be used, OSError if its folder can't be.
        """
        path = Path(url.database or "")
        if not path.name:
            raise Unavailable("DATABASE", f"{url}: name a file, sqlite:///PATH")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock_file(path.with_suffix(".lock"), wait)
        if lock is None:
            raise Unavailable("LOCKED", f"another service is using {path}; stop it first")
        if not path.exists():
            path.touch(mode=0o600)  # it holds what tenants write; SQLite gives its other files the same rights
        for file in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
            _not_for_everybody(file)
        engine = sa.create_engine(
            url,
            module=pysqlite3.dbapi2,
            poolclass=StaticPool,
            connect_args={"check_same_thread": False},
            hide_parameters=True,  # logs must not contain what tenants write
        )
        sa.event.listen(engine, "connect", _set_pragmas)
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        try:
            with engine.begin() as connection:
                schema.migrate(connection)
        except (sa.exc.DBAPIError, Unavailable) as error:
            engine.dispose()
            lock.close()
            why = _with_reason(getattr(error, "orig", error), path)
            raise Unavailable("DATABASE", f"{path} can't be used: {why}") from None
        return cls(engine, lock)

    def listen(
        self,
        on_write: Callable[[], None],
        on_failure: Callable[[str], None],
        on_message: Callable[[str], None] = ignore_message,
    ) -> None:
        self._on_failure = on_failure

    def publish(self, texts: Sequence[str]) -> None:
        pass  # no other process has the file

    def close(self) -> None:
        with self._lock:  # a write may still run whose caller was told to retry
            self._closed = True
            super().close()
            self._file_lock.close()

    @contextmanager
    def _reading(self, tenant: str | None) -> Iterator[sa.Connection]:
        with self._lock:
            self._check_running()
            with self.engine.begin() as connection:
                yield connection

    @contextmanager
    def _writing(self, tenant: str | None) -> Iterator[sa.Connection]:
        with self._lock:
            self._check_running()
            with self.engine.connect() as connection:
                yield connection
                self._since_checkpoint += 1
                if self._since_checkpoint >= CHECKPOINT_WRITES:
                    self._checkpoint(connection)

    def commit(self, transaction: sa.RootTransaction) -> None:
        try:
            transaction.commit()
        except sa.exc.DBAPIError as error:
            self.fail(f"a commit failed: {self._reason(error.orig)}")

    def _checkpoint(self, connection: sa.Connection) -> None:
        driver: Any = connection.connection.driver_connection
        try:
            driver.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except Exception as error:  # the driver's error, which no SQLAlchemy statement wraps
            self.fail(f"a checkpoint failed: {self._reason(error)}")
        self._since_checkpoint = 0

    def _reason(self, error: object) -> str:
        return _with_reason(error, Path(self.engine.url.database or ""))

    def fail(self, why: str) -> None:
        """Refuse everything from now on, for this reason, and report it to the listener. Raises Unavailable."""
        self._failed = why
        self._on_failure(why)
        self._check_running()

    def _check_running(self) -> None:
        if self._closed:  # a new connection would write beside the file's new owner
            raise Unavailable("STOPPING", "this service has stopped; another one will answer", retry_after=1.0)
        if self._failed:
            raise Unavailable(
                "STORE_FAILED",
                f"{self._failed}. What is on disk is unknown until the service is started again; whether the "
                "write in question was stored will show then",
            )


def _with_reason(error: object, path: Path) -> str:
    """SQLite's message, and the system's reason for it, which SQLite leaves out (see `disk.diagnose`)."""
    found = diagnose(path) if _WRITING.search(str(error)) else ""
    return f"{error}{': ' if found else ''}{found}"


_WRITING = re.compile("disk|full|readonly|unable to open|locked|I/O", re.IGNORECASE)


def _lock_file(path: Path, wait: float) -> IO[str] | None:
    lock = path.open("w")
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() >= until:
                lock.close()
                return None
            time.sleep(0.05)
        else:
            return lock


def _not_for_everybody(file: Path) -> None:
    """Remove other users' rights to a file of an earlier version, or from a backup."""
    with suppress(OSError):  # it doesn't exist, or isn't ours
        mode = file.stat().st_mode
        if mode & stat.S_IRWXO:
            file.chmod(stat.S_IMODE(mode) & ~stat.S_IRWXO)


def _set_pragmas(connection: Any, _: object) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions, not the driver
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
