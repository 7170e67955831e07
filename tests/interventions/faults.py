"""The bug gallery: mistakes that somebody could make here, each put into the product by a test, for a moment.

`test_gallery.py` says which check must fail under which. None of this is in the product: a fault replaces one of
its public names (a method, a function, a constant), in the process that runs the check.
"""

from __future__ import annotations

import itertools
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from backpack_lm import patch as patches
from backpack_serving.auth.keys import Principal
from backpack_serving.interventions import channels, postgres, sqlite, tenants
from backpack_serving.interventions.events import EventRules
from backpack_serving.interventions.ledger import IdempotencyKey, Ledger, WriteResult
from backpack_serving.interventions.records import BlobRecord, EventRecord, ReplyRecord, key_of, kind_name
from backpack_serving.interventions.sql import Transaction
from backpack_serving.interventions.sqlite import SQLiteStore
from backpack_serving.interventions.tables import head
from backpack_serving.references import Position

from tests.interventions.memory import MemoryStore, Tables


def relaxed_fsync(patch: pytest.MonkeyPatch) -> None:
    """SQLite with synchronous=NORMAL, as most advice on the web says."""
    patch.setattr(sqlite, "PRAGMAS", (*sqlite.PRAGMAS, "synchronous=NORMAL"))


def relaxed_commit(patch: pytest.MonkeyPatch) -> None:
    """PostgreSQL with synchronous_commit=off."""
    patch.setattr(postgres, "SESSION", "SELECT set_config('synchronous_commit', 'off', false)")


def checkpoints_of_sqlite(patch: pytest.MonkeyPatch) -> None:
    """SQLite's own checkpoints, which don't tell that one has failed."""
    patch.setattr(sqlite, "PRAGMAS", (*sqlite.PRAGMAS, "wal_autocheckpoint=10"))
    patch.setattr(sqlite, "CHECKPOINT_WRITES", 10**9)


def failed_fsync_ignored(patch: pytest.MonkeyPatch) -> None:
    """A commit that fails is logged, and life goes on."""
    patch.setattr(SQLiteStore, "fail", lambda self, why: None)


def acknowledged_before_commit(patch: pytest.MonkeyPatch) -> None:
    """The answer leaves when the work is done, while the commit is on its way."""
    write, commit = Ledger.write, SQLiteStore.commit

    def early(self: Ledger, who: Principal, method: str, request: IdempotencyKey, act: Any) -> Any:
        answers: queue.Queue[Any] = queue.Queue()

        def act_and_answer(tx: Any, now: datetime) -> Any:
            record, changed = act(tx, now)
            answers.put(WriteResult(record, tx.position))
            return record, changed

        def run() -> None:
            try:
                answers.put(write(self, who, method, request, act_and_answer))
            except BaseException as error:
                answers.put(error)

        threading.Thread(target=run, daemon=True).start()
        answer = answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def slow(self: SQLiteStore, transaction: Any) -> None:
        time.sleep(0.005)
        commit(self, transaction)

    patch.setattr(Ledger, "write", early)
    patch.setattr(SQLiteStore, "commit", slow)


def event_apart(patch: pytest.MonkeyPatch) -> None:
    """The records in one transaction, their event in the next."""
    log = Transaction.log

    def apart(self: Transaction, event: EventRecord) -> None:
        self.connection.exec_driver_sql("COMMIT")
        time.sleep(0.002)
        self.connection.exec_driver_sql("BEGIN")
        log(self, event)

    patch.setattr(Transaction, "log", apart)


def reply_apart(patch: pytest.MonkeyPatch) -> None:
    """The reply that makes a repetition harmless is stored after the write, and after its answer."""
    write = Ledger.write

    def apart(self: Ledger, who: Principal, method: str, request: IdempotencyKey, act: Any) -> Any:
        if request.id and (old := self.replay(who, method, request)):
            return old
        written = write(self, who, method, IdempotencyKey(), act)
        at = json.dumps([kind_name(type(written.record)), *key_of(written.record)])
        reply = ReplyRecord(who.name, method, request.id, request.body, at, written.position.revision, self.now())
        self.store.tables.tables[ReplyRecord][who.name, method, request.id] = reply  # type: ignore[attr-defined]
        return written

    patch.setattr(Ledger, "write", apart)


def request_ids_of_everybody(patch: pytest.MonkeyPatch) -> None:
    """Request ids are looked up without asking whose they are."""
    patch.setattr(Principal, "name", property(lambda self: f"tenants/{self.tenant}/keys/any"))


def _raise_the_head_last(patch: pytest.MonkeyPatch, number: Callable[[int], int]) -> None:
    """A write reads the head, takes a number for its revision, and raises the head just before it commits."""
    commit = postgres.PostgresStore.commit

    def read_head(self: postgres.PostgresStore, connection: sa.Connection) -> Any:
        row = connection.execute(sa.select(head)).one()
        connection.info["revision"] = revision = number(row.revision)
        return SimpleNamespace(epoch=row.epoch, revision=revision, hash=row.hash)

    def raise_and_commit(self: postgres.PostgresStore, transaction: sa.RootTransaction) -> None:
        revision = transaction.connection.info["revision"]
        time.sleep(0.001 * (revision % 7))
        latest = sa.func.greatest(head.c.revision, revision)
        transaction.connection.execute(sa.update(head).values(revision=latest))
        commit(self, transaction)

    patch.setattr(postgres.PostgresStore, "raise_head", read_head)
    patch.setattr(postgres.PostgresStore, "commit", raise_and_commit)


def serial_ids(patch: pytest.MonkeyPatch) -> None:
    """Revisions from a sequence, as most tables have their ids: they become visible out of order."""
    sequence: list[Iterator[int]] = []

    def following(revision: int) -> int:
        if not sequence:
            sequence.append(itertools.count(revision + 1))
        return next(sequence[0])

    def log_without_lock(self: Transaction, event: EventRecord) -> None:
        event = replace(event, revision=self.position.revision)
        self.add(replace(event, hash="unchained"))

    patch.setattr(Transaction, "log", log_without_lock)
    _raise_the_head_last(patch, following)


def head_not_locked(patch: pytest.MonkeyPatch) -> None:
    """The head is read first and raised last: two writes make the same revision."""
    _raise_the_head_last(patch, lambda revision: revision + 1)


def stale_reads(patch: pytest.MonkeyPatch) -> None:
    """Reads from a copy that is one write behind, as of a replica of the database."""
    write = MemoryStore.write

    @contextmanager
    def remember(self: MemoryStore, tenant: str | None = None) -> Iterator[Any]:
        before = self.tables
        with write(self, tenant) as tx:
            yield tx
        self._before = before  # type: ignore[attr-defined]

    @contextmanager
    def late(self: MemoryStore, tenant: str | None = None) -> Iterator[Any]:
        seen: Tables = getattr(self, "_before", self.tables)
        yield seen.seen_by(tenant)

    patch.setattr(MemoryStore, "write", remember)
    patch.setattr(MemoryStore, "read", late)


def etag_unchecked(patch: pytest.MonkeyPatch) -> None:
    """Whoever activates last wins."""
    patch.setattr(channels, "check_etag", lambda current, given: None)


def chain_without_changes(patch: pytest.MonkeyPatch) -> None:
    """The chain covers who did what, but not what became of it."""
    chained = EventRecord.chained
    patch.setattr(EventRecord, "chained", lambda self, before: chained(replace(self, changes=""), before))


def no_tenant_filter(patch: pytest.MonkeyPatch) -> None:
    """One forgotten WHERE."""
    patch.setattr(Transaction, "select_visible", lambda self, table: sa.select(table))


def row_level_security_lifted(patch: pytest.MonkeyPatch) -> None:
    """Every transaction says that it is an operator's."""
    enter = postgres.PostgresStore.enter
    patch.setattr(postgres.PostgresStore, "enter", lambda self, connection, tenant: enter(self, connection, None))


def digests_unchecked(patch: pytest.MonkeyPatch) -> None:
    """What the disk says is believed."""
    patch.setattr(BlobRecord, "intact", property(lambda self: True))


def edits_unchecked(patch: pytest.MonkeyPatch) -> None:
    """Numbers that are none, and too many of them, are taken in."""
    patch.setattr(patches.RevisionContent, "validate", lambda self, shape, limits=None: None)


def force_unchecked(patch: pytest.MonkeyPatch) -> None:
    """However many tenants a change would end the service of, nobody asks again."""
    patch.setattr(tenants, "TOO_FEW_TO_ASK", 10**6)


def model_unchecked(patch: pytest.MonkeyPatch) -> None:
    """The service starts for whatever model it is given."""
    patch.setattr(channels.ChannelRules, "check_model", lambda self, forced: None)


def epoch_kept(patch: pytest.MonkeyPatch) -> None:
    """A restore from a backup goes on in the old epoch."""
    for kind in (Transaction, Tables):
        patch.setattr(kind, "begin", lambda self, epoch: None)


def epoch_counted(patch: pytest.MonkeyPatch) -> None:
    """A restore from a backup goes on in the backup's epoch and one, which there may have been before."""
    begin = Transaction.begin
    patch.setattr(Transaction, "begin", lambda self, epoch: begin(self, self.position.epoch + 1))


def events_from_before(patch: pytest.MonkeyPatch) -> None:
    """A watch that is resumed begins with the last event it had."""
    events_after = EventRules.events_after

    def inclusive(self: Any, revision: int, limit: int = 1000) -> tuple[Position, list[EventRecord]]:
        return events_after(self, max(0, revision - 1), limit)

    patch.setattr(EventRules, "events_after", inclusive)
