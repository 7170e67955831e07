"""What only a database can promise: migrations, triggers, rights, one owner, and a server that comes back."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from backpack_serving.auth.keys import SYSTEM
from backpack_serving.cli.main import app
from backpack_serving.errors import DataLoss, InvalidRequest, Unavailable
from backpack_serving.interventions import database
from backpack_serving.interventions import postgres as postgres_store
from backpack_serving.interventions.bootstrap import start
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.interventions.postgres import PostgresStore
from backpack_serving.interventions.records import EventRecord, PatchRecord
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.sql import SQLStore, Transaction
from backpack_serving.interventions.sqlite import SQLiteStore
from backpack_serving.interventions.store import Store
from backpack_serving.interventions.tables import metadata
from backpack_serving.observability.metrics import Metrics
from backpack_serving.references import LIVE
from backpack_serving.settings import Settings
from typer.testing import CliRunner

from tests.interventions.conftest import ADMIN, HALVE, REPLICA, SHAPE, releaser
from tests.interventions.postgres import ROLE, Postgres


def fill(store: Store) -> Interventions:
    """A tenant with a patch, a revision, a release, and that release live: five writes."""
    service = Interventions(store, SHAPE)
    service.tenants.create_tenant(ADMIN, "acme", IdempotencyKey())
    acme = releaser("acme")
    service.patches.create_patch(acme, "p", "", IdempotencyKey())
    service.patches.create_revision(acme, "p", [HALVE], IdempotencyKey())
    service.releases.create_release(acme, [("p", 1)], "", IdempotencyKey())
    service.channels.activate(acme, LIVE, 1, service.channels.get_channel(acme, LIVE).etag, IdempotencyKey())
    return service


@contextmanager
def unguarded(store: SQLStore, postgres: Postgres) -> Iterator[sa.Connection]:
    """A transaction that schema and rights don't stop: somebody who has the disk, or is the superuser."""
    if isinstance(store, SQLiteStore):
        with store.engine.begin() as connection:
            for name in connection.scalars(sa.text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).all():
                connection.execute(sa.text(f"DROP TRIGGER {name}"))
            yield connection
    else:
        engine = sa.create_engine(store.engine.url.set(username="postgres"))
        with engine.begin() as connection:
            connection.execute(sa.text("SET session_replication_role = replica"))
            yield connection
        engine.dispose()


def test_what_was_written_is_there_after_a_restart(url: str) -> None:
    store = open_store(url)
    before = fill(store).events.snapshot()
    store.close()
    again = open_store(url)
    service = Interventions(again, SHAPE)
    assert service.events.snapshot() == before
    assert service.events.verify_chain(ADMIN) == (5, None)
    again.close()


def test_the_migrated_schema_is_the_one_in_the_code(url: str) -> None:
    store = open_store(url)
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    store.close()


def test_migrating_again_and_by_several_at_once_changes_nothing(postgres: Postgres, tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/new/i.db", postgres.empty()):
        failures: list[BaseException] = []

        def migrate(url: str = url, failures: list[BaseException] = failures) -> None:
            try:
                database.migrate(url)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=migrate) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        store = open_store(url)
        service = fill(store)
        store.close()
        database.migrate(url)
        store = open_store(url)
        service = Interventions(store, SHAPE)
        assert service.events.verify_chain(ADMIN) == (5, None)
        store.close()


def test_a_migration_waits_for_another_however_long_that_takes(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds in ("'10s'", "'30s'"):
        assert seconds in postgres_store.SESSION
        monkeypatch.setattr(postgres_store, "SESSION", postgres_store.SESSION.replace(seconds, "'200ms'"))
    url = postgres.empty()
    with psycopg.connect(url) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (postgres_store._MIGRATING,))
        done = threading.Timer(0.6, other.rollback)
        done.start()
        database.migrate(url)
        done.join()
    open_store(url).close()


def test_revisions_of_the_first_schema_keep_their_bytes(postgres: Postgres, tmp_path: Path) -> None:
    """0002 moves them to a table of their own; two revisions with one digest share them from there on."""
    for url in (f"sqlite:///{tmp_path}/i.db", postgres.empty()):
        engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            _upgrade(connection, "0001")
            insert = "INSERT INTO revisions VALUES ('acme', :patch, :number, :digest, 'f', :blob, 0)"
            for patch, number, digest in (("p", 1, "a"), ("p", 2, "b"), ("q", 1, "a")):
                values = {"patch": patch, "number": number, "digest": digest, "blob": digest.encode()}
                connection.execute(sa.text(insert), values)
        engine.dispose()
        database.migrate(url)
        engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            if "postgres" in url:
                connection.execute(sa.text("SELECT set_config('backpack.tenant', '*', true)"))
            found = connection.execute(sa.text("SELECT tenant, digest, data FROM blobs ORDER BY digest")).all()
            assert [(t, d, bytes(b)) for t, d, b in found] == [("acme", "a", b"a"), ("acme", "b", b"b")]
        engine.dispose()


def _upgrade(connection: sa.Connection, to: str) -> None:
    from alembic import command
    from backpack_serving.interventions import schema

    config = schema._config()
    config.attributes["connection"] = connection
    command.upgrade(config, to)


def test_a_database_that_was_not_migrated_or_by_a_newer_version_is_refused(postgres: Postgres) -> None:
    url = postgres.empty()
    with pytest.raises(Unavailable, match="backpack database migrate"):
        open_store(url)
    database.migrate(url)
    postgres.sql("UPDATE alembic_version SET version_num = '9999'", sa.make_url(url).database or "")
    for use in (open_store, database.migrate):
        with pytest.raises(Unavailable, match="9999, which this version doesn't know"):
            use(url)


IMMUTABLE = ("blobs", "revisions", "releases", "events")


@pytest.mark.parametrize("table", IMMUTABLE)
def test_p5_what_never_changes_is_kept_by_the_schema_too(url: str, table: str) -> None:
    """By triggers, even against the owner; the service's role lacks the right anyway."""
    changes = [f"UPDATE {table} SET tenant = tenant", f"DELETE FROM {table}"]
    with closing(open_store(url)) as store:
        fill(store)
        if isinstance(store, SQLiteStore):
            for change in changes:
                _refused(store.engine, change, sa.exc.IntegrityError, "never change")
        else:
            above = sa.create_engine(store.engine.url.set(username="postgres"))
            for change in [*changes, f"TRUNCATE {table}"]:
                _refused(store.engine, change, sa.exc.ProgrammingError, "permission denied")
                _refused(above, change, sa.exc.IntegrityError, "never change")
            above.dispose()
        assert Interventions(store, SHAPE).events.verify_chain(ADMIN) == (5, None)


def _refused(engine: sa.Engine, statement: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says), engine.begin() as connection:
        connection.execute(sa.text(statement))


def test_p5_bytes_that_changed_are_told_and_never_given_out(url: str, postgres: Postgres) -> None:
    with closing(open_store(url)) as store:
        check_changed_bytes(store, postgres)
    with pytest.raises(DataLoss, match="p/revisions/1 have changed"):
        database.verify(url)


def check_changed_bytes(store: SQLStore, postgres: Postgres) -> None:
    """One bit of a revision's bytes is flipped on disk: nobody gets them."""
    service = fill(store)
    acme = releaser("acme")
    digest = service.channels.get_channel(acme, LIVE).digest
    assert service.releases.fetch_release(REPLICA, "acme", digest)
    with unguarded(store, postgres) as connection:
        data = bytes(connection.scalars(sa.text("SELECT data FROM blobs")).one())
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        connection.execute(sa.text("UPDATE blobs SET data = :data"), {"data": flipped})
    for read in (
        lambda: service.releases.fetch_release(REPLICA, "acme", digest),
        lambda: service.patches.get_revision(acme, "p", 1),
    ):
        with pytest.raises(DataLoss, match="restore the database"):
            read()


def test_p5_a_release_that_became_another_is_told(url: str, postgres: Postgres) -> None:
    store = open_store(url)
    service = fill(store)
    digest = service.channels.get_channel(releaser("acme"), LIVE).digest
    with unguarded(store, postgres) as connection:
        connection.execute(sa.text("UPDATE releases SET revisions = '[]' WHERE number = 1"))
    with pytest.raises(DataLoss, match="it was made as"):
        service.releases.fetch_release(REPLICA, "acme", digest)
    store.close()
    with pytest.raises(DataLoss, match="it was made as"):
        database.verify(url)


def test_verify_and_a_new_epoch_after_a_restore(url: str) -> None:
    store = open_store(url)
    Interventions(store, SHAPE).tenants.create_tenant(ADMIN, SYSTEM, IdempotencyKey())
    fill(store)
    store.close()
    found = database.verify(url)
    assert (found.entries, found.revisions, found.releases) == (6, 1, 3)
    new = database.raise_epoch(url)
    assert (new.epoch > 1, new.revision) == (True, 7)
    assert database.verify(url).position == new


def check_restores(url: str) -> None:
    """However often one backup is restored, each time in an epoch of its own, higher than all before."""
    fill(store := open_store(url))
    store.close()
    file = Path(url.removeprefix("sqlite:///"))
    backup, epochs = file.read_bytes(), [1]
    for _ in range(3):
        file.write_bytes(backup)
        epochs.append(database.raise_epoch(url).epoch)
        assert database.verify(url).entries == 6, "the backup's five writes, and the new epoch's"
        assert epochs == sorted(set(epochs)), f"{epochs}: an epoch came again"


def test_p6_no_restore_brings_an_epoch_again(sqlite_url: str) -> None:
    check_restores(sqlite_url)


def check_row_level_security(store: SQLStore) -> None:
    """Under every query, even one without a WHERE: a tenant's transaction has that tenant's rows alone."""
    fill(store)
    with store.write() as tx:
        tx.add(PatchRecord("other", "mine", "", tx.list(PatchRecord)[0].created))
        tx.log(tx.list(EventRecord)[0])
    everything = sa.text("SELECT tenant FROM patches")
    for tenant, rows in (("acme", ["acme"]), ("other", ["other"]), ("nobody", []), (None, ["acme", "other"])):
        with store.read(tenant) as tx:
            assert isinstance(tx, Transaction)
            assert sorted(tx.connection.scalars(everything)) == rows
    with store.engine.begin() as connection:
        assert connection.scalars(everything).all() == [], "who doesn't say sees nothing"


def test_p8_the_role_of_the_service_sees_one_tenant_at_a_time(postgres_url: str) -> None:
    store = open_store(postgres_url)
    check_row_level_security(store)
    insert = sa.text("INSERT INTO patches SELECT 'acme', 'forged', '', 0, false")
    with pytest.raises(sa.exc.ProgrammingError, match="row-level security"), store.engine.begin() as connection:
        connection.execute(sa.text("SELECT set_config('backpack.tenant', 'other', true)"))
        connection.execute(insert)
    for lift in ("ALTER TABLE patches DISABLE ROW LEVEL SECURITY", "DROP TRIGGER events_never_change ON events"):
        with pytest.raises(sa.exc.ProgrammingError, match="must be owner"), store.engine.begin() as connection:
            connection.execute(sa.text(lift))
    store.close()


def test_nobody_else_on_the_machine_reads_what_tenants_wrote(sqlite_url: str) -> None:
    store = open_store(sqlite_url)
    fill(store)
    files = list(Path(sa.make_url(sqlite_url).database or "").parent.glob("*.db*"))
    assert len(files) == 3, "with the log and its index"
    assert [file.name for file in files if file.stat().st_mode & 0o077] == []
    store.close()


async def test_a_key_file_that_is_no_text_is_named_with_the_fix(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path, interventions_address="127.0.0.1:0")
    settings.key_file("admin").write_bytes(b"\xff\xfeb\0p\0")
    with pytest.raises(ValueError, match=r"admin\.key: .* remove the file for a new one"):
        await start(settings, Metrics())


def test_a_database_that_was_for_everybody_is_so_no_more(sqlite_url: str) -> None:
    """As a copy is that was put back from a backup; a group may be meant."""
    file = Path(sa.make_url(sqlite_url).database or "")
    open_store(sqlite_url).close()
    file.chmod(0o664)
    store = open_store(sqlite_url)
    fill(store)
    assert {path.stat().st_mode & 0o777 for path in file.parent.glob("*.db*")} == {0o660}
    store.close()


def test_a_second_service_on_the_same_file_is_refused(sqlite_url: str) -> None:
    store = open_store(sqlite_url)
    with pytest.raises(Unavailable, match="another service"):
        open_store(sqlite_url)
    with pytest.raises(Unavailable, match="another service"):
        database.migrate(sqlite_url, wait=0.1)
    store.close()


def test_a_file_is_closed_after_the_write_that_still_runs_and_not_written_again(sqlite_url: str) -> None:
    """Calls that a drain ends have threads that it can't end; the next service may have the file by then."""
    store = open_store(sqlite_url)
    service = fill(store)
    begun, go_on = threading.Event(), threading.Event()

    def late_write() -> None:
        with store.write() as tx:
            begun.set()
            assert go_on.wait(30)
            tx.replace(PatchRecord("acme", "late", "", datetime.now(UTC)))
            tx.log(EventRecord(0, "acme", "x", "CreatePatch", "x", "[]", datetime.now(UTC)))

    writing, closing_it = threading.Thread(target=late_write), threading.Thread(target=store.close)
    writing.start()
    assert begun.wait(30)
    closing_it.start()
    with pytest.raises(Unavailable, match="another service is using"):
        open_store(sqlite_url)
    go_on.set()
    writing.join()
    closing_it.join()
    for use in (service.events.snapshot, lambda: service.tenants.create_tenant(ADMIN, "beside", IdempotencyKey())):
        with pytest.raises(Unavailable) as refused:
            use()
        assert refused.value.reason == "STOPPING"
    with closing(open_store(sqlite_url)) as again, again.read() as tx:
        assert tx.get(PatchRecord, "acme", "late") is not None


def test_two_services_share_a_postgres_and_wake_each_other(postgres_url: str) -> None:
    one, two = open_store(postgres_url), open_store(postgres_url)
    woken = threading.Event()
    two.listen(woken.set, print)
    assert woken.wait(30), "it looks once when it begins to listen"
    woken.clear()
    fill(one)
    assert woken.wait(30)
    assert Interventions(two, SHAPE).events.verify_chain(ADMIN) == (5, None)
    one.close()
    two.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://u:secret@h/d", "sqlite:///PATH or postgresql://"),
        ("nonsense", "sqlite:///PATH or postgresql://"),
        ("sqlite://", "name a file"),
        ("postgresql://nobody@/d?host=/nowhere", "the database failed"),
    ],
)
def test_a_database_that_can_not_be_used_is_told(url: str, says: str) -> None:
    with pytest.raises(Unavailable) as refused:
        open_store(url)
    assert says in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i.db").write_text("this is not a database" * 100)
    with pytest.raises(Unavailable, match="can't be used"):
        open_store(f"sqlite:///{tmp_path}/i.db")


def test_a_file_that_was_damaged_is_named(sqlite_url: str) -> None:
    store = open_store(sqlite_url)
    fill(store)
    with store.engine.connect() as connection:
        page = connection.scalar(sa.text("SELECT rootpage FROM sqlite_master WHERE name = 'events'"))
        size = connection.scalar(sa.text("PRAGMA page_size"))
    store.close()
    file = Path(sa.make_url(sqlite_url).database or "")
    with file.open("r+b") as damaged:
        damaged.seek((page - 1) * size)
        damaged.write(b"\xff" * size)
    with pytest.raises(Unavailable) as told:
        database.verify(sqlite_url)
    assert told.value.why == f"{file}: database disk image is malformed"


def test_roles_are_checked(postgres: Postgres, sqlite_url: str) -> None:
    with pytest.raises(InvalidRequest, match="CREATE ROLE ghost"):
        database.migrate(postgres.owner_url, "ghost")
    with pytest.raises(InvalidRequest, match="no roles"):
        database.migrate(sqlite_url, ROLE)


def test_a_role_that_migrations_were_not_told_is_refused(postgres: Postgres) -> None:
    owner = postgres.empty()
    service = owner.replace(str(sa.make_url(owner).username), ROLE, 1)
    database.migrate(owner)
    with pytest.raises(Unavailable, match=rf"{ROLE} may not read alembic_version, .* migrate --role {ROLE}"):
        open_store(service)
    database.migrate(owner, ROLE)
    open_store(service).close()
    postgres.sql(f"REVOKE ALL ON blobs FROM {ROLE}", str(sa.make_url(owner).database))
    with pytest.raises(Unavailable, match="may not read blobs:"):  # as a later version's table would be
        open_store(service)


def test_a_postgres_that_does_not_keep_its_word_is_refused(postgres: Postgres, postgres_url: str) -> None:
    postgres.sql("ALTER SYSTEM SET fsync = off")
    postgres.sql("SELECT pg_reload_conf()")
    try:
        with pytest.raises(Unavailable, match="fsync=off"):
            for _ in range(100):  # a reload takes a moment
                open_store(postgres_url).close()
                time.sleep(0.1)
    finally:
        postgres.sql("ALTER SYSTEM RESET fsync")
        postgres.sql("SELECT pg_reload_conf()")


def test_commits_wait_for_the_disk_whatever_the_default_is(postgres: Postgres, postgres_url: str) -> None:
    name = sa.make_url(postgres_url).database
    postgres.sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
    store = open_store(postgres_url)
    with store.engine.connect() as connection:
        assert connection.scalar(sa.text("SHOW synchronous_commit")) == "on"
    store.close()
    postgres.sql(f"ALTER DATABASE {name} RESET synchronous_commit")


def test_writes_wait_for_each_other_whatever_the_default_isolation_is(postgres: Postgres, postgres_url: str) -> None:
    name = sa.make_url(postgres_url).database
    postgres.sql(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    store = open_store(postgres_url)
    service = Interventions(store, SHAPE)
    with ThreadPoolExecutor(4) as pool:
        for made in [pool.submit(service.tenants.create_tenant, ADMIN, f"t{n}", IdempotencyKey()) for n in range(40)]:
            made.result()
    store.close()
    postgres.sql(f"ALTER DATABASE {name} RESET default_transaction_isolation")


def test_a_lost_database_is_unavailable_until_it_is_back(postgres: Postgres) -> None:
    store = open_store(postgres.migrated())
    assert isinstance(store, PostgresStore)
    service = fill(store)
    postgres.kill()
    try:
        _is_unavailable(service)
    finally:
        postgres.start()
    service.tenants.create_tenant(ADMIN, "late", IdempotencyKey())
    assert service.events.verify_chain(ADMIN) == (6, None)
    store.close()


def _is_unavailable(service: Interventions) -> None:
    for use in (service.events.snapshot, lambda: service.tenants.create_tenant(ADMIN, "late", IdempotencyKey())):
        with pytest.raises(Unavailable) as lost:
            use()
        assert lost.value.retry_after == 1.0


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKPACK_DATABASE", f"sqlite:///{tmp_path}/interventions.db")
    for words, says in (
        ("verify", "there is no database"),  # and they make no empty one
        ("restored", "there is no database"),
        ("migrate", "up to date"),
        ("verify", "intact: 0 revisions"),
        ("restored", "begins at revision 1"),
        ("migrate --role x", "SQLite has no roles"),
    ):
        done = CliRunner().invoke(app, ["database", *words.split()])
        assert says in " ".join(done.output.split())
        assert done.exit_code == ("role" in words or "there is no" in says)


def test_a_connection_in_use_while_its_store_is_closed_is_closed_after_it(postgres_url: str) -> None:
    store = open_store(postgres_url)
    with store.read() as tx:
        store.close()
        assert tx.list(PatchRecord) == []
    del store, tx
    gc.collect()  # one that is open is warned of, and that fails this test
