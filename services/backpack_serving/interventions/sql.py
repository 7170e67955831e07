"""The common part of the stores on SQLite and PostgreSQL, through SQLAlchemy Core: the only file with SELECT.

A write first increments the revision in the head row, which locks that row until the commit. So revisions are gapless
in commit order, and a reader of one revision sees all earlier ones. (Numbers from a sequence become visible out of
order, and a poller would miss events.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa

from backpack_serving.errors import Unavailable
from backpack_serving.interventions.records import EventRecord, Record, ReplyRecord, key_of
from backpack_serving.interventions.store import Read, Write, ignore_message
from backpack_serving.interventions.tables import head, tables
from backpack_serving.references import Position

R = TypeVar("R")


class Transaction:
    """One transaction as `store.Write`, seeing one tenant's records or everybody's (None)."""

    def __init__(self, connection: sa.Connection, row: sa.Row[Any], tenant: str | None) -> None:
        self.connection, self.hash, self._tenant = connection, row.hash, tenant
        self.position = Position(row.epoch, row.revision)

    def get(self, kind: type[R], *key: Any) -> R | None:
        return self.find(kind, **dict(zip(kind.KEY, key, strict=True)))  # type: ignore[attr-defined]

    def find(self, kind: type[R], **equal: Any) -> R | None:
        if any(isinstance(value, str) and "\0" in value for value in equal.values()):
            return None  # no record's text has NUL, and PostgreSQL would refuse to look for it
        table = tables[kind]
        query = self.select_visible(table).where(*(table.c[name] == value for name, value in equal.items()))
        row = self.connection.execute(query.order_by(*table.primary_key).limit(1)).first()
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
        query = self.select_visible(table).where(*(c == value for c, value in zip(keys, prefix, strict=False)))
        rest = keys[len(prefix) :]
        if after is not None:
            query = query.where(rest[0] < after if descending else rest[0] > after)
        query = query.order_by(*(c.desc() if descending else c.asc() for c in rest)).limit(limit)
        return [kind(**row._mapping) for row in self.connection.execute(query)]

    def values(self, kind: type[Any], name: str) -> set[Any]:
        column = tables[kind].c[name]
        query = self.select_visible(tables[kind]).with_only_columns(column).distinct()
        return set(self.connection.scalars(query))

    def add(self, record: Record) -> None:
        self._check_tenant(record)
        self.connection.execute(sa.insert(tables[type(record)]).values(**asdict(record)))

    def replace(self, record: Record) -> None:
        self._check_tenant(record)
        table = tables[type(record)]
        where = (table.c[name] == value for name, value in zip(record.KEY, key_of(record), strict=True))
        changed = self.connection.execute(sa.update(table).where(*where).values(**asdict(record)))
        if not changed.rowcount:
            self.add(record)

    def log(self, event: EventRecord) -> None:
        event = replace(event, revision=self.position.revision)
        self.hash = event.chained(self.hash)
        self.add(replace(event, hash=self.hash))
        self.connection.execute(sa.update(head).values(hash=self.hash))

    def forget_replies(self, before: datetime) -> None:
        table = tables[ReplyRecord]
        self.connection.execute(sa.delete(table).where(table.c.created < before))

    def begin(self, epoch: int) -> None:
        self.position = replace(self.position, epoch=epoch)
        self.connection.execute(sa.update(head).values(epoch=epoch))

    def select_visible(self, table: sa.Table) -> sa.Select[Any]:
        """Select the rows of a table that this transaction may see. All reads begin with it."""
        query = sa.select(table)
        if self._tenant is not None and "tenant" in table.c:
            query = query.where(table.c.tenant == self._tenant)
        return query

    def _check_tenant(self, record: Record) -> None:
        of = getattr(record, "tenant", self._tenant)
        assert self._tenant in (None, of), f"a write of {self._tenant} touches {of}"


class SQLStore(ABC):
    """A store in a database that outlives its process. Raises Unavailable if the database can't be used now."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @contextmanager
    def read(self, tenant: str | None = None) -> Iterator[Read]:
        with self._errors(), self._reading(tenant) as connection:
            yield Transaction(connection, connection.execute(sa.select(head)).one(), tenant)

    @contextmanager
    def write(self, tenant: str | None = None) -> Iterator[Write]:
        with self._errors(), self._writing(tenant) as connection:
            transaction = connection.begin()
            try:
                self.enter(connection, tenant)
                yield Transaction(connection, self.raise_head(connection), tenant)
            except BaseException:
                transaction.rollback()
                raise
            self.commit(transaction)

    @abstractmethod
    def listen(
        self,
        on_write: Callable[[], None],
        on_failure: Callable[[str], None],
        on_message: Callable[[str], None] = ignore_message,
    ) -> None:
        """See `Store`."""

    @abstractmethod
    def publish(self, texts: Sequence[str]) -> None:
        """See `Store`."""

    def close(self) -> None:
        self.engine.dispose()

    @abstractmethod
    def _reading(self, tenant: str | None) -> AbstractContextManager[sa.Connection]:
        """A connection in a transaction that sees one state of the database."""

    @abstractmethod
    def _writing(self, tenant: str | None) -> AbstractContextManager[sa.Connection]:
        """A connection for a transaction that writes."""

    def enter(self, connection: sa.Connection, tenant: str | None) -> None:  # noqa: B027
        """Prepare a transaction, before its first statement."""

    def raise_head(self, connection: sa.Connection) -> sa.Row[Any]:
        """Increment the head row's revision, which locks the row until the commit; return the row."""
        raised = sa.update(head).values(revision=head.c.revision + 1).returning(*head.c)
        return connection.execute(raised).one()

    @abstractmethod
    def commit(self, transaction: sa.RootTransaction) -> None:
        """Commit durably. Raises Unavailable if the outcome is unknown."""

    def _reason(self, error: object) -> str:
        """The database's error message, with what the store can add."""
        return str(error)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.IntegrityError, sa.exc.ProgrammingError, sa.exc.DataError) as error:
            # No retry will help: the schema, or a right that the role lacks, refuses what the rules let through.
            raise AssertionError(f"the database refuses what the rules allowed: {error.orig}") from error
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            reason = getattr(error, "orig", None) or error  # where it is, and as whom we call it
            why = f"{self.engine.url.database}: {self._reason(reason)}"
            raise Unavailable("DATABASE", "the database failed", retry_after=1.0, why=why) from error
