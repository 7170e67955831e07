"""What a start finds where the database should be: what may come yet is waited for, what won't is told at once."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import trustme
from backpack_serving.auth.keys import ApiKeySecret, write_key_file
from backpack_serving.errors import Unavailable
from backpack_serving.interventions import bootstrap, database
from backpack_serving.interventions.database import open_store
from backpack_serving.interventions.ledger import IdempotencyKey
from backpack_serving.interventions.service import Interventions
from backpack_serving.observability.metrics import Metrics
from backpack_serving.settings import Settings

from tests.e2e.starts import silent, started
from tests.interventions.conftest import ADMIN, SHAPE
from tests.interventions.postgres import Postgres


def test_a_database_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    """By the service, and by the migrations that come before it: both start without a server."""
    postgres = Postgres()
    try:
        service, owner = postgres.migrated(), postgres.empty()
        postgres.kill()
        where, migrating = {"DATABASE": owner}, ("database", "migrate", "--role", "backpack_service")
        with (
            started(tmp_path / "service", "serve", "interventions", DATABASE=service) as serving,
            started(tmp_path / "job", *migrating, **where) as job,
        ):
            for one in (serving, job):
                one.until("waiting for the database")
                assert "failed: Connection refused" in one.said, "why, too"
            postgres.start()
            serving.until("interventions serves on")
            assert job.ends() == 0, job.said
    finally:
        postgres.start()
        postgres.remove()


def test_a_schema_that_is_migrated_late_is_waited_for(tmp_path: Path, postgres: Postgres) -> None:
    owner = postgres.empty()
    service = owner.replace(str(sa.make_url(owner).username), "backpack_service", 1)
    with started(tmp_path, "serve", "interventions", DATABASE=service) as start:
        start.until("run `backpack database migrate`")
        database.migrate(owner, "backpack_service")
        start.until("interventions serves on")


def _refused(url: str) -> Unavailable:
    with pytest.raises(Unavailable) as refused:
        open_store(url)
    with pytest.raises(Unavailable) as asked:
        database.reach(url)
    assert (asked.value.retry_after is None) == (refused.value.retry_after is None), "migrations think the same"
    return refused.value


@contextmanager
def _passwords(postgres: Postgres) -> Iterator[None]:
    """A role `locked` whose password is asked for, and another that nobody may be."""
    file = postgres._data / "pg_hba.conf"
    before = file.read_text()
    postgres.sql("CREATE ROLE locked LOGIN PASSWORD 'right'")
    file.write_text(f"local all locked scram-sha-256\nlocal all barred reject\n{before}")
    postgres.sql("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        file.write_text(before)
        postgres.sql("SELECT pg_reload_conf()")


def test_what_no_time_mends_is_told_at_once(postgres: Postgres) -> None:
    good = sa.make_url(postgres.owner_url)

    def refused(**other: str) -> str:
        error = _refused(good.set(**other).render_as_string(hide_password=False))  # type: ignore[arg-type]
        assert error.retry_after is None, error.message
        assert "can't be used: " in error.message
        return error.message

    assert 'role "ghost" does not exist' in refused(username="ghost")
    assert 'database "none" does not exist' in refused(database="none")
    assert "invalid sslmode" in refused(query={**good.query, "sslmode": "sometimes"})  # type: ignore[arg-type]
    with _passwords(postgres):
        for _ in range(100):  # a reload takes a moment
            if "authentication failed" in (said := refused(username="locked", password="wrong")):
                break
        assert "password authentication failed" in said
        assert "wrong" not in said
        assert "no password supplied" in refused(username="locked")
        assert "rejects connection" in refused(username="barred")


@contextmanager
def _answering(answer: bytes, identity: tuple[Path, Path] | None = None) -> Iterator[str]:
    """The address of a server that answers PostgreSQL's question for TLS, and perhaps speaks it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if identity:
        context.load_cert_chain(*identity)

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(8)
                connection.sendall(answer)
                if identity:
                    with suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
                        tls.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_server_that_is_another_one_is_told_at_once(tmp_path: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    issued = authority.issue_cert("elsewhere.example")
    files = tmp_path / "certificate.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(files[0])
    issued.private_key_pem.write_to_path(files[1])
    for name, ca in (("ca", authority), ("other", other)):
        ca.cert_pem.write_to_path(tmp_path / f"{name}.pem")
    with _answering(b"S", files) as address:
        for authorities, says in (("ca", "does not match host name"), ("other", "certificate verify failed")):
            options = f"sslmode=verify-full&sslrootcert={tmp_path}/{authorities}.pem"
            error = _refused(f"postgresql://me@{address}/name?{options}")
            assert says in error.message
            assert error.retry_after is None
    with _answering(b"N") as address:
        error = _refused(f"postgresql://me@{address}/name?sslmode=require")
        assert "does not support SSL" in error.message
        assert error.retry_after is None


@pytest.mark.parametrize("url", ["postgresql://me@127.0.0.1:1/name", "postgresql://me@no.such.invalid/name"])
def test_who_does_not_answer_may_do_so_later(url: str) -> None:
    assert _refused(url).retry_after is not None


def test_a_silent_server_may_answer_later() -> None:
    with silent() as address, pytest.raises(Unavailable) as refused:
        open_store(f"postgresql://me@{address}/name")
    assert refused.value.retry_after is not None


# ---- SQLite


@contextmanager
def _disk(folder: Path, bytes_: int) -> Iterator[Path]:
    """A disk with so many bytes."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={bytes_}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(folder: Path, leave: int) -> None:
    with suppress(OSError), (folder / "filling").open("wb", buffering=0) as filling:
        while True:
            filling.write(bytes(4096))
    with (folder / "filling").open("r+b") as filling:
        filling.seek(0, 2)
        filling.truncate(filling.tell() - leave)


@pytest.mark.parametrize("left", [0, 16_384, 65_536])
def test_a_start_on_a_full_disk_says_so(tmp_path: Path, left: int) -> None:
    with _disk(tmp_path / "disk", 2**20) as folder:
        _fill(folder, left)
        with pytest.raises(Unavailable) as refused:
            open_store(f"sqlite:///{folder}/i.db")
        assert "the disk is full (No space left on device)" in refused.value.message
        assert f"bytes are free in {folder}; make room" in refused.value.message


def test_a_write_on_a_full_disk_says_so(tmp_path: Path, sqlite_url: str) -> None:
    with _disk(tmp_path / "disk", 2**20) as folder:
        (folder / "i.db").write_bytes(Path(sa.make_url(sqlite_url).database or "").read_bytes())
        store = open_store(f"sqlite:///{folder}/i.db")
        service, said = Interventions(store, SHAPE), ""
        _fill(folder, 0)
        for n in range(1000):
            try:
                service.tenants.create_tenant(ADMIN, f"t{n}", IdempotencyKey())
            except Unavailable as error:
                said = error.message + error.why
                break
        store.close()
    assert f"the disk is full (No space left on device): 0 bytes are free in {folder}" in said


def test_a_key_that_a_full_disk_does_not_hold_is_named(tmp_path: Path) -> None:
    with _disk(tmp_path / "disk", 2**20) as folder:
        _fill(folder, 0)
        with pytest.raises(OSError, match=rf"No space left on device: '{folder}/admin\.key'"):
            write_key_file(str(ApiKeySecret.mint()), folder / "admin.key")
        assert [file.name for file in folder.iterdir()] == ["filling"], "no half of it stays"


def test_a_disk_that_is_read_only_says_so(tmp_path: Path, sqlite_url: str) -> None:
    with _disk(tmp_path / "disk", 2**20) as folder:
        (folder / "i.db").write_bytes(Path(sa.make_url(sqlite_url).database or "").read_bytes())
        (folder / "i.lock").touch()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(OSError, match="Read-only file system"):
            open_store(f"sqlite:///{folder}/i.db")


def test_a_file_that_changed_hands_says_so(sqlite_url: str) -> None:
    """A backup that root put back, for instance."""
    folder = Path(tempfile.mkdtemp())  # pytest's are closed to others
    folder.chmod(0o777)
    file = folder / "i.db"
    shutil.copy(sa.make_url(sqlite_url).database or "", file)
    file.chmod(0o444)
    we = os.geteuid()
    try:
        if we == 0:  # who may write to all
            os.seteuid(65_534)
        with closing(open_store(f"sqlite:///{file}")) as store, pytest.raises(Unavailable) as refused:
            Interventions(store, SHAPE).tenants.create_tenant(ADMIN, "acme", IdempotencyKey())
        assert f"{file} can't be written to by user {os.geteuid()}" in refused.value.why
    finally:
        os.seteuid(we)
        shutil.rmtree(folder)


async def test_a_start_is_cancelled_while_a_thread_of_it_uses_the_store(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store closes after that; neither the start nor the event loop waits for it for long."""
    monkeypatch.setattr(bootstrap, "CLOSE_SECONDS", 0.1)
    store, preparing, release, held = open_store(sqlite_url), asyncio.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        with store.read():
            held.set()
            release.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    listen = store.listen

    def last_step_before_prepare(*how: Any) -> None:
        listen(*how)
        preparing.set()

    monkeypatch.setattr(store, "listen", last_step_before_prepare)
    monkeypatch.setattr(bootstrap, "open_store", lambda url: store)
    settings = Settings(state=tmp_path, database=sqlite_url, interventions_address="127.0.0.1:0")
    try:
        start = asyncio.create_task(bootstrap.start(settings, Metrics()))
        await preparing.wait()
        start.cancel()
        await asyncio.wait([start])
        assert start.cancelled()
        assert holder.is_alive(), "the start has waited for who uses the store"
    finally:
        release.set()
        holder.join()
    while not _free(Path(sa.make_url(sqlite_url).database or "").with_suffix(".lock")):
        await asyncio.sleep(0.01)


def _free(lock: Path) -> bool:
    """Whether the store that held this lock file is closed."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
