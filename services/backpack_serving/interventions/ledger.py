"""The common part of all writes: one transaction with its records, its event, and its reply.

The event says what gateways must learn of the write, and is its audit entry; the reply makes a repetition of
the request harmless for 24 hours.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

from backpack_serving.auth.keys import SYSTEM, Principal
from backpack_serving.errors import InvalidRequest
from backpack_serving.interventions.records import (
    ChannelRecord,
    EventRecord,
    KeyRecord,
    PatchRecord,
    Record,
    ReleaseRecord,
    ReplyRecord,
    RevisionRecord,
    TenantRecord,
    key_of,
    kind_name,
    record_from,
    visible,
)
from backpack_serving.interventions.store import Read, Store, Write
from backpack_serving.references import Position

R = TypeVar("R", bound=TenantRecord | KeyRecord | PatchRecord | RevisionRecord | ReleaseRecord | ChannelRecord)

REPLIES_KEPT = timedelta(hours=24)

LONGEST_ID = len("urn:uuid:") + 36
"""Most characters of a request id: uuid.UUID ignores any number of dashes, and PostgreSQL's index would refuse them."""

PAGE = 1000
"""Entries of the chain that are read in one transaction."""


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """Identifies a repeated write: its request id ("" for none) and a digest of its body."""

    id: str = ""
    body: str = ""


@dataclass(frozen=True, slots=True)
class WriteResult(Generic[R]):
    """The record that a write made, and the store's position after it. `repeated`: an earlier request had made it."""

    record: R
    position: Position
    repeated: bool = False


Act = Callable[[Write, datetime], tuple[R, list[Record]]]
"""Stores the records of a write; returns the record it is about, and the records that readers must receive."""


class Ledger:
    """Executes writes on a store, and calls `on_write` after each commit."""

    def __init__(self, store: Store, on_write: Callable[[], None], now: Callable[[], datetime]) -> None:
        self.store, self._on_write, self.now = store, on_write, now

    def write(self, who: Principal, method: str, request: IdempotencyKey, act: Act[R]) -> WriteResult[R]:
        """Execute a write once for each (principal, method, request id); a repetition gets the first one's result.

        Raises what `act` does, InvalidRequest for an id that is no UUID4 or was another request's, and Unavailable
        as the store does.
        """
        _check_request_id(request.id)
        now = self.now()
        if request.id and (old := self.replay(who, method, request)):
            return old
        try:
            with self.store.write(scope(who)) as tx:
                if tx.get(ReplyRecord, who.name, method, request.id) is not None:
                    raise _LostRace
                record, changed = act(tx, now)
                changes = json.dumps([visible(change) for change in changed])
                tx.log(EventRecord(0, record.tenant, who.name, method, record.name, changes, now))
                if request.id:
                    tx.forget_replies(now - REPLIES_KEPT)
                    at = json.dumps([kind_name(type(record)), *key_of(record)])
                    tx.add(ReplyRecord(who.name, method, request.id, request.body, at, tx.position.revision, now))
                written = WriteResult(record, tx.position)
        except _LostRace:
            old = self.replay(who, method, request)
            assert old is not None, "the reply was just seen"
            return old
        self._on_write()
        return written

    def replay(self, who: Principal, method: str, request: IdempotencyKey) -> WriteResult[Any] | None:
        """What this request has made already; None if it hasn't. Raises InvalidRequest for another request's id."""
        with self.store.read(scope(who)) as tx:
            reply = tx.get(ReplyRecord, who.name, method, request.id)
            if reply is None:
                return None
            if reply.body != request.body:
                raise InvalidRequest.at(
                    "request_id",
                    "REQUEST_ID_REUSED",
                    f"{request.id} was used for another request; make a new one",
                )
            kind, *key = json.loads(reply.resource)
            event = tx.get(EventRecord, reply.revision)
            assert event is not None, "an event is never deleted"
            record: Record | None
            if kind == "Channel":  # channels move on; the answer is what this request made of it
                record = record_from(json.loads(event.changes)[0])
            else:
                kinds: dict[str, type[Any]] = {
                    kind_name(k): k for k in (TenantRecord, KeyRecord, PatchRecord, RevisionRecord, ReleaseRecord)
                }
                record = tx.get(kinds[kind], *key)
            assert record is not None, "what was stored stays"
            return WriteResult(record, Position(tx.position.epoch, reply.revision), repeated=True)


def scope(who: Principal) -> str | None:
    """The tenant whose records a principal's transactions see; None (all tenants) for operators."""
    return None if who.tenant == SYSTEM else who.tenant


def raise_epoch(store: Store, now: datetime) -> Position:
    """Begin a new epoch, after a restore from a backup: positions of the lost future mean nothing any more, and
    whoever has one gets everything anew.

    An epoch is called by the milliseconds of the clock, and is higher than the stored one in any case: the backup
    doesn't know which epochs came after it, and none of them may come again.
    """
    with store.write() as tx:
        tx.begin(max(tx.position.epoch + 1, int(now.timestamp() * 1000)))
        tx.log(EventRecord(0, SYSTEM, f"tenants/{SYSTEM}", "RaiseEpoch", f"tenants/{SYSTEM}", "[]", now))
        return tx.position


class _LostRace(Exception):
    """Another thread has just executed the same request."""


def verify_chain(tx: Read) -> tuple[int, int | None]:
    """The number of audit entries, and the revision of the first that breaks the chain, if any."""
    return verify_pages(lambda: nullcontext(tx))


def verify_pages(read: Callable[[], AbstractContextManager[Read]]) -> tuple[int, int | None]:
    """The same with a transaction for each page of entries, which never change: during one, a store may be able to
    do nothing else. What is written meanwhile is looked at too.
    """
    count, before = 0, ""
    while True:
        with read() as tx:
            page = tx.list(EventRecord, after=count or None, limit=PAGE)
            head = tx.position.revision, tx.hash
        for event in page:
            count += 1
            if event.revision != count or event.hash != event.chained(before):
                return count, event.revision
            before = event.hash
        if len(page) < PAGE:
            return count, None if (count, before) == head else count + 1


def _check_request_id(value: str) -> None:
    if not value:
        return
    try:
        good = len(value) <= LONGEST_ID and uuid.UUID(value).version == 4
    except ValueError:
        good = False
    if not good:
        raise InvalidRequest.at("request_id", "BAD_REQUEST_ID", f"{value!r} is not a UUID4")
