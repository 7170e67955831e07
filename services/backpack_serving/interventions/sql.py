"""The store on SQLite, through SQLAlchemy Core: the only file that says SELECT.

Records map one to one onto tables; `migrations/` makes them. A write starts by raising the counter in the head
row, which locks it: revisions are gapless in commit order. SQLite runs in WAL mode with synchronous=FULL (NORMAL
loses acknowledged commits in a power cut), on one connection, with a file lock that keeps a second service away.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TypeVar, get_type_hints

import pysqlite3
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.pool import StaticPool

from backpack_serving.errors import Unavailable
from backpack_serving.interventions.records import KINDS, Event, Position, Record, Reply, key_of
from backpack_serving.interventions.store import Read, Write

R = TypeVar("R")


class Timestamp(sa.types.TypeDecorator[datetime]):
    """A moment in UTC, kept as microseconds: the same on every database, exact, and ordered."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> int | None:
        return None if value is None else round(value.timestamp() * 1e6)

    def process_result_value(self, value: int | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else datetime.fromtimestamp(value / 1e6, UTC)


_TYPES: dict[Any, type[sa.types.TypeEngine[Any]]] = {
    str: sa.Text,
    int: sa.BigInteger,
    int | None: sa.BigInteger,
    bool: sa.Boolean,
    bytes: sa.LargeBinary,
    datetime: Timestamp,
}

metadata = sa.MetaData()
head = sa.Table(
    "head",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
)


def _table(kind: type[Any]) -> sa.Table:
    hints = get_type_hints(kind)
    columns = [
        sa.Column(
            f.name,
            _TYPES[hints[f.name]],
            primary_key=f.name in kind.KEY,
            autoincrement=False,
            nullable=hints[f.name] == int | None,
        )
        for f in fields(kind)
    ]
    return sa.Table(_plural(kind.__name__.lower()), metadata, *columns)


def _plural(name: str) -> str:
    return {"patch": "patches", "reply": "replies"}.get(name, name + "s")


tables: dict[type[Any], sa.Table] = {kind: _table(kind) for kind in KINDS}
sa.Index("keys_by_id", tables[KINDS[1]].c.key, unique=True)
sa.Index("releases_by_digest", tables[KINDS[4]].c.tenant, tables[KINDS[4]].c.digest)
sa.Index("replies_by_age", tables[Reply].c.created)


class _Transaction:
    def __init__(self, connection: sa.Connection, position: Position, hash_: str) -> None:
        self._connection, self._hash = connection, hash_
        self.position = position

    def get(self, kind: type[R], *key: Any) -> R | None:
        return self.find(kind, **dict(zip(kind.KEY, key, strict=True)))  # type: ignore[attr-defined]

    def find(self, kind: type[R], **equal: Any) -> R | None:
        table = tables[kind]
        query = sa.select(table).where(*(table.c[name] == value for name, value in equal.items()))
        row = self._connection.execute(query.order_by(*table.primary_key).limit(1)).first()
        return None if row is None else kind(**row._mapping)

    def list(
        self,
        kind: type[R],
        *prefix: Any,
        after: Any = None,
        limit: int | None = None,
        descending: bool = False,
    ) -> list[R]:
        table = tables[kind]
        keys = [table.c[name] for name in kind.KEY]  # type: ignore[attr-defined]
        query = sa.select(table).where(*(c == value for c, value in zip(keys, prefix, strict=False)))
        rest = keys[len(prefix) :]
        if after is not None:
            query = query.where(rest[0] < after if descending else rest[0] > after)
        query = query.order_by(*(c.desc() if descending else c.asc() for c in rest)).limit(limit)
        return [kind(**row._mapping) for row in self._connection.execute(query)]

    def add(self, record: Record) -> None:
        self._connection.execute(sa.insert(tables[type(record)]).values(**asdict(record)))

    def replace(self, record: Record) -> None:
        table = tables[type(record)]
        where = (table.c[name] == value for name, value in zip(record.KEY, key_of(record), strict=True))
        changed = self._connection.execute(sa.update(table).where(*where).values(**asdict(record)))
        if not changed.rowcount:
            self.add(record)

    def log(self, event: Event) -> None:
        event = replace(event, revision=self.position.revision)
        hash_ = event.chained(self._hash)
        self.add(replace(event, hash=hash_))
        self._connection.execute(sa.update(head).values(hash=hash_))

    def forget_replies(self, before: datetime) -> None:
        table = tables[Reply]
        self._connection.execute(sa.delete(table).where(table.c.created < before))


class SQLStore:
    """A store in a database that outlives its process.

    Raises Unavailable if the database can't be used now. A commit that fails stops all further writes: what
    is on disk is unknown then, until the service has been started again.
    """

    def __init__(self, engine: sa.Engine, lock: IO[str] | None = None) -> None:
        self._engine, self._file_lock = engine, lock
        self._lock = threading.RLock()
        self._failed = False

    @classmethod
    def open(cls, url: str) -> SQLStore:
        """Open and migrate a database. Raises Unavailable if another service has it, or it can't be used."""
        parsed = sa.make_url(url)
        if parsed.get_backend_name() != "sqlite" or not parsed.database:
            raise Unavailable("DATABASE", f"{url}: this version keeps its records in sqlite:///PATH")
        path = Path(parsed.database)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise Unavailable("LOCKED", f"another service is using {path}; stop it first") from None
        engine = sa.create_engine(
            parsed, module=pysqlite3.dbapi2, poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        try:
            migrate(engine)
        except sa.exc.DBAPIError as error:
            engine.dispose()
            lock.close()
            raise Unavailable("DATABASE", f"{path} can't be used: {error.orig}") from None
        return cls(engine, lock)

    @contextmanager
    def read(self) -> Iterator[Read]:
        with self._lock, self._errors(), self._engine.begin() as connection:
            row = connection.execute(sa.select(head)).one()
            yield _Transaction(connection, Position(row.epoch, row.revision), row.hash)

    @contextmanager
    def write(self) -> Iterator[Write]:
        with self._lock, self._errors():
            if self._failed:
                raise Unavailable("STORE_FAILED", "a commit failed before; restart the service")
            with self._engine.connect() as connection:
                with connection.begin() as transaction:
                    row = connection.execute(
                        sa.update(head).values(revision=head.c.revision + 1).returning(*head.c)
                    ).one()
                    yield _Transaction(connection, Position(row.epoch, row.revision), row.hash)
                    self._failed = True
                    transaction.commit()
                    self._failed = False

    def close(self) -> None:
        self._engine.dispose()
        if self._file_lock:
            self._file_lock.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.DBAPIError as error:
            raise Unavailable("DATABASE", f"the database failed: {error.orig}", retry_after=1.0) from error


def migrate(engine: sa.Engine) -> None:
    """Bring the schema up to date."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _configure_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions, not the driver
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")
