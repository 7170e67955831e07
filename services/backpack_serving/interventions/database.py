"""Which store a database URL means. PostgreSQL's driver is loaded only for a URL that needs it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import sqlalchemy as sa

from backpack_serving.errors import InvalidRequest, Unavailable
from backpack_serving.install import install_command
from backpack_serving.interventions import integrity, ledger
from backpack_serving.interventions.sql import SQLStore
from backpack_serving.interventions.sqlite import SQLiteStore
from backpack_serving.references import Position


def open_store(url: str) -> SQLStore:
    """The store at `sqlite:///PATH` or `postgresql://…`.

    SQLite is migrated by opening it; PostgreSQL, which others may be using, by `migrate` only. Raises Unavailable
    if it can't be used, OSError if SQLite's folder can't be.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        return SQLiteStore.open(parsed)
    store: SQLStore = _postgres().PostgresStore.open(parsed)
    return store


def reach(url: str) -> None:
    """Raises Unavailable if the database doesn't answer; with `retry_after`, if it may later."""
    parsed = _parse(url)
    if parsed.get_backend_name() != "sqlite":
        _postgres().reach(parsed)


def migrate(url: str, role: str = "", wait: float = 30.0) -> None:
    """Bring a database up to date; what is up to date stays as it is. On PostgreSQL, let `role` use it.

    Waits for others that do the same, on SQLite for at most `wait` seconds. Raises Unavailable, InvalidRequest.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        if role:
            raise InvalidRequest.at("role", "NO_ROLES", "SQLite has no roles; whoever may read the file may use it")
        SQLiteStore.open(parsed, wait).close()
    else:
        _postgres().migrate(parsed, role)


def verify(url: str) -> integrity.Intact:
    """Check every stored byte that has a digest, and the chain. Raises DataLoss at the first that doesn't fit,
    Unavailable if there is no such database."""
    store = _existing(url)
    try:
        with store.read() as tx:
            return integrity.verify(tx)
    finally:
        store.close()


def raise_epoch(url: str) -> Position:
    """Begin a new epoch, once, after a restore from a backup. Raises Unavailable if there is no such database."""
    store = _existing(url)
    try:
        return ledger.raise_epoch(store, datetime.now(UTC))
    finally:
        store.close()


def _existing(url: str) -> SQLStore:
    """Opening SQLite would make an empty database where there is none, and all would be well with that."""
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        where = "BACKPACK_STATE or BACKPACK_DATABASE says where it is"
        raise Unavailable("DATABASE", f"there is no database {parsed.database}; {where}")
    return open_store(url)


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        parsed = None
    if parsed is None or parsed.get_backend_name() not in ("sqlite", "postgresql"):
        shown = "this database URL" if parsed is None else parsed.render_as_string()  # without its password
        raise Unavailable("DATABASE", f"{shown}: records are kept in sqlite:///PATH or postgresql://USER@HOST/NAME")
    return parsed


def _postgres() -> ModuleType:
    try:
        from backpack_serving.interventions import postgres
    except ImportError as error:
        raise Unavailable("DATABASE", f"PostgreSQL needs a driver ({error}): {install_command('postgres')}") from None
    return postgres
