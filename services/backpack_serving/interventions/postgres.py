"""The store on PostgreSQL: for production, and for several processes of the service on one database.

Every transaction says whose records it may see, and row level security holds it to that; `backpack database
migrate --role` gives the service a role that owns nothing and can't lift it. Reads and watches go to the primary.
NOTIFY wakes watchers up; they poll as well, so one that is lost costs a second.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy as sa
import structlog

from backpack_serving.errors import InvalidRequest, Unavailable
from backpack_serving.interventions import schema
from backpack_serving.interventions.records import IMMUTABLE, ReplyRecord
from backpack_serving.interventions.sql import SQLStore
from backpack_serving.interventions.store import ignore_message
from backpack_serving.interventions.tables import head, tables

log = structlog.get_logger(__name__)

EVERYBODY = "*"
"""The value of backpack.tenant with which row level security shows all tenants' records."""

WRITES, MESSAGES = "backpack", "backpack_told"
"""Channels of NOTIFY: writes of the store, and messages between processes of the service."""

_MIGRATING = 0x6261636B7061636B
"""Key of the advisory lock that migrations take."""

# No session waits for ever: neither for the head row, if its holder was paused, nor for a dead network. Commits wait
# for the disk, whatever the database's default is.
SESSION = """
SELECT set_config('lock_timeout', '10s', false), set_config('statement_timeout', '30s', false),
       set_config('idle_in_transaction_session_timeout', '60s', false),
       CASE current_setting('synchronous_commit') WHEN 'off' THEN set_config('synchronous_commit', 'on', false) END
"""
_NOTIFY_ALL = sa.text("SELECT pg_notify(:channel, text) FROM unnest(CAST(:texts AS text[])) AS text")
_CONNECT = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    "application_name": "backpack-interventions",
}


class PostgresStore(SQLStore):
    """A store in a database that other processes of the service may use at the same time."""

    def __init__(self, engine: sa.Engine) -> None:
        super().__init__(engine)
        self._readers = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._closed, self._name = threading.Event(), secrets.token_hex(4)
        self._listener: threading.Thread | None = None
        sa.event.listen(engine, "checkin", self._invalidate_if_closed)

    @classmethod
    def open(cls, url: sa.URL) -> PostgresStore:
        """Connect to a migrated database. Raises Unavailable if that fails, it isn't migrated, or it doesn't
        keep what it acknowledges; with `retry_after`, unless another try would fail as well.
        """
        store = cls(_engine(url))
        try:
            with _final_if_hopeless(url), store._errors(), store._reading(None) as connection:
                _check_rights(connection)
                schema.check(connection)
                _check_server(connection)
        except BaseException:
            store.close()
            raise
        return store

    def listen(
        self,
        on_write: Callable[[], None],
        on_failure: Callable[[str], None],
        on_message: Callable[[str], None] = ignore_message,
    ) -> None:
        self._listener = threading.Thread(
            target=self._listen_forever, args=(on_write, on_message), name="listen", daemon=True
        )
        self._listener.start()

    def publish(self, texts: Sequence[str]) -> None:
        with self._errors(), self.engine.begin() as connection:
            connection.execute(sa.text("SET LOCAL synchronous_commit = off"))  # NOTIFY stores nothing
            connection.execute(_NOTIFY_ALL, {"channel": MESSAGES, "texts": [f"{self._name} {text}" for text in texts]})

    def close(self) -> None:
        self._closed.set()
        if self._listener:
            self._listener.join()
        super().close()

    def _invalidate_if_closed(self, _: object, connection: Any) -> None:
        """Close a connection that was in use when the store was closed: its pool is gone."""
        if self._closed.is_set():
            connection.invalidate()

    def _listen_forever(self, on_write: Callable[[], None], on_message: Callable[[str], None]) -> None:
        dsn = self.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        while not self._closed.is_set():
            try:
                with psycopg.connect(dsn, autocommit=True, **_CONNECT) as connection:  # type: ignore[arg-type]
                    connection.execute(f"LISTEN {WRITES}; LISTEN {MESSAGES}")
                    on_write()  # something may have been written before we listened
                    while not self._closed.is_set():
                        for notice in connection.notifies(timeout=0.5, stop_after=1):
                            sender, _, text = notice.payload.partition(" ")
                            if notice.channel == WRITES:
                                on_write()
                            elif sender != self._name:
                                on_message(text)
            except psycopg.Error:
                self._closed.wait(1.0)

    @contextmanager
    def _reading(self, tenant: str | None) -> Iterator[sa.Connection]:
        with self._readers.begin() as connection:
            self.enter(connection, tenant)
            yield connection

    @contextmanager
    def _writing(self, tenant: str | None) -> Iterator[sa.Connection]:
        with self.engine.connect() as connection:
            yield connection

    def enter(self, connection: sa.Connection, tenant: str | None) -> None:
        seen = EVERYBODY if tenant is None else tenant
        connection.execute(sa.select(sa.func.set_config("backpack.tenant", seen, True)))

    def commit(self, transaction: sa.RootTransaction) -> None:
        transaction.connection.execute(sa.select(sa.func.pg_notify(WRITES, "")))
        try:
            transaction.commit()
        except sa.exc.DBAPIError as error:
            raise Unavailable(
                "OUTCOME_UNKNOWN",
                "the database was lost while it committed: the write may have happened. Repeat it with the same "
                "request_id, or look",
                retry_after=1.0,
                why=str(error.orig),
            ) from error


def reach(url: sa.URL) -> None:
    """Connect only. Raises Unavailable as `PostgresStore.open` does."""
    engine = _engine(url)
    try:
        with _final_if_hopeless(url), PostgresStore(engine)._errors(), engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
    finally:
        engine.dispose()


def migrate(url: sa.URL, role: str = "") -> None:
    """Bring the schema up to date, as a role that may create tables; then let `role` use it, if one is given.

    Several processes may do this at once. Raises Unavailable if the database can't be used, InvalidRequest if
    there is no such role.
    """
    engine = _engine(url)
    try:
        with engine.begin() as connection:
            # Large tables and other migrations may take any time. A lock on a table in use may not: all its users
            # would wait behind the migration.
            connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
            connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATING)))
            connection.execute(sa.text("SET LOCAL lock_timeout = '10s'"))
            connection.execute(sa.select(sa.func.set_config("backpack.tenant", EVERYBODY, True)))
            schema.migrate(connection)
            if role:
                _grant(connection, role)
    except sa.exc.DBAPIError as error:
        raise Unavailable("DATABASE", f"the database can't be migrated: {error.orig}") from None
    finally:
        engine.dispose()


def _grant(connection: sa.Connection, role: str) -> None:
    if connection.scalar(sa.text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}) is None:
        raise InvalidRequest.at("role", "NO_SUCH_ROLE", f"{role!r}; make it first: CREATE ROLE {role} LOGIN")
    quoted = connection.dialect.identifier_preparer.quote(role)
    space = connection.dialect.identifier_preparer.quote(connection.scalar(sa.text("SELECT current_schema()")))
    connection.exec_driver_sql(f"GRANT USAGE ON SCHEMA {space} TO {quoted}")
    connection.exec_driver_sql(f"GRANT SELECT ON alembic_version TO {quoted}")
    connection.exec_driver_sql(f"GRANT SELECT, UPDATE ON {head.name} TO {quoted}")
    for kind, table in tables.items():
        rights = "SELECT, INSERT"
        if kind not in IMMUTABLE:
            rights += ", UPDATE, DELETE" if kind is ReplyRecord else ", UPDATE"
        connection.exec_driver_sql(f"GRANT {rights} ON {table.name} TO {quoted}")


def _engine(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=8,
        max_overflow=0,
        pool_timeout=10,
        pool_pre_ping=True,  # connections of a database that was restarted are replaced, not used
        connect_args=_CONNECT,
        hide_parameters=True,  # logs must not contain what tenants write
        # Whatever the database's default is: a write that waited for the head row must see the one before it.
        isolation_level="READ COMMITTED",
    )
    sa.event.listen(engine, "connect", _set_session)
    return engine


@contextmanager
def _final_if_hopeless(url: sa.URL) -> Iterator[None]:
    """Raise errors that retrying can't mend (a server that refuses us, malformed settings) without `retry_after`.
    All others, such as an unknown name or a server that is starting, keep theirs.

    libpq has no codes for failed connections, only texts, and a server may translate them: an error in another
    language counts as temporary, and is logged while it is retried.
    """
    try:
        yield
    except (Unavailable, AssertionError) as error:
        cause = error.__cause__
        text = str(getattr(cause, "orig", cause) or "")
        if isinstance(error, AssertionError) and not isinstance(getattr(cause, "orig", None), psycopg.Error):
            raise
        if isinstance(error, Unavailable) and not _HOPELESS.search(text):
            raise
        text = " ".join(text.split())
        raise Unavailable("DATABASE", f"the database {url.database} can't be used: {text}") from error


_HOPELESS = re.compile(
    r"authentication failed|no password supplied|role \".*\" (does not exist|is not permitted to log in)"
    r"|database \".*\" does not exist|pg_hba\.conf (rejects|entry)|permission denied for database"
    r"|certificate verify failed|server certificate for|root certificate|certificate file|private key file"
    r"|does not support SSL|sslmode|invalid (port|integer|connection option|URI)|unsupported frontend protocol"
)


def _set_session(connection: Any, _: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute(SESSION)
    connection.commit()


def _check_rights(connection: sa.Connection) -> None:
    """Raise Unavailable if the role can't read a table: a migration that wasn't given the role made it."""
    names = ["alembic_version", head.name, *(table.name for table in tables.values())]
    closed = sa.text(
        "SELECT name FROM unnest(CAST(:names AS text[])) AS name "
        "WHERE NOT has_table_privilege(to_regclass(name), 'SELECT') ORDER BY name"
    )
    if found := connection.scalars(closed, {"names": names}).all():
        role = connection.scalar(sa.text("SELECT current_user"))
        raise Unavailable(
            "NO_RIGHTS",
            f"the role {role} may not read {', '.join(found)}: as the schema's owner, run `backpack database "
            f"migrate --role {role}`",
        )


def _check_server(connection: sa.Connection) -> None:
    for name in ("fsync", "full_page_writes"):
        if connection.scalar(sa.select(sa.func.current_setting(name))) == "off":
            raise Unavailable(
                "NOT_DURABLE", f"the database runs with {name}=off: what it acknowledges may be lost; turn it on"
            )
    above = sa.text("SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user")
    if connection.scalar(above):
        log.warning(
            "the database role is above row level security; use one that isn't: backpack database migrate --role",
            role=connection.scalar(sa.text("SELECT current_user")),
        )
