"""The contract of a store: what the one in memory, SQLite and PostgreSQL promise alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from backpack_serving.interventions.ledger import raise_epoch, verify_chain
from backpack_serving.interventions.records import (
    KINDS,
    BlobRecord,
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
)
from backpack_serving.interventions.store import Store, Write
from backpack_serving.references import Position

NOW = datetime(2026, 11, 24, 7, 30, 0, 123_456, tzinfo=UTC)
EVENT = EventRecord(0, "acme", "tenants/acme/keys/k", "Test", "tenants/acme", "[]", NOW)
ONE_OF_EACH: tuple[Record, ...] = (
    TenantRecord("acme", NOW),
    KeyRecord("acme", "k", "caller releaser", b"\x00salt", b"\xffverifier", NOW),
    PatchRecord("acme", "p", "text with “quotes”, ü and a line\nbreak", NOW),
    BlobRecord("acme", "ab" * 32, bytes(range(256))),
    RevisionRecord("acme", "p", 1, "ab" * 32, "cd" * 32, NOW),
    ReleaseRecord("acme", 2**53 + 1, "ef" * 32, '[["p", 1]]', "", NOW),
    ChannelRecord("acme", "live", 1, "ef" * 32, None, 1, NOW),
    ReplyRecord("tenants/acme/keys/k", "Test", "id", "body", '["Tenant", "acme"]', 1, NOW),
)


def put(store: Store, *records: Record, tenant: str | None = None) -> None:
    with store.write(tenant) as tx:
        for record in records:
            tx.add(record)
        tx.log(EVENT)


@pytest.mark.parametrize("record", ONE_OF_EACH, ids=lambda r: type(r).__name__)
def test_what_is_added_is_read_as_it_was(store: Store, record: Record) -> None:
    put(store, record)
    with store.read() as tx:
        assert tx.get(type(record), *key_of(record)) == record
        assert tx.list(type(record)) == [record]
        last = key_of(record)[-1]
        for other in [last + 1] if isinstance(last, int) else [last + "x", last + "\0"]:
            assert tx.get(type(record), *key_of(record)[:-1], other) is None


def test_a_write_moves_the_head_by_one_and_is_chained(store: Store) -> None:
    for n in range(1, 4):
        with store.write() as tx:
            assert tx.position == Position(1, n)
            tx.log(EVENT)
    with store.read() as tx:
        assert tx.position == Position(1, 3)
        assert [e.revision for e in tx.list(EventRecord)] == [1, 2, 3]
        assert verify_chain(tx) == (3, None)


class Broken(Exception):
    pass


def test_a_write_that_raises_leaves_nothing(store: Store) -> None:
    put(store, ONE_OF_EACH[0])
    with pytest.raises(Broken), store.write() as tx:
        tx.add(TenantRecord("other", NOW))
        tx.replace(replace(ONE_OF_EACH[0], suspended=True))  # type: ignore[type-var]
        tx.log(EVENT)
        raise Broken
    with store.read() as tx:
        assert tx.position == Position(1, 1)
        assert tx.list(TenantRecord) == [ONE_OF_EACH[0]]
        assert len(tx.list(EventRecord)) == 1
    put(store, TenantRecord("other", NOW))
    with store.read() as tx:
        assert tx.position == Position(1, 2)
        assert verify_chain(tx) == (2, None)


def test_a_key_is_used_once(store: Store) -> None:
    put(store, *ONE_OF_EACH)
    for record in ONE_OF_EACH:
        with pytest.raises(AssertionError):
            put(store, record)


@pytest.mark.parametrize("record", ONE_OF_EACH[3:6], ids=lambda r: type(r).__name__)
def test_what_never_changes_is_not_replaced(store: Store, record: Record) -> None:
    put(store, record)
    with pytest.raises(AssertionError), store.write() as tx:
        tx.replace(record)
        tx.log(EVENT)
    with pytest.raises(AssertionError), store.write() as tx:
        tx.replace(replace(tx.list(EventRecord)[0], method="Forged"))
        tx.log(EVENT)


def test_the_other_kinds_are_replaced_whole(store: Store) -> None:
    put(store, *ONE_OF_EACH)
    moved = ChannelRecord("acme", "live", 7, "00" * 32, 1, 2, NOW + timedelta(seconds=1))
    beta = replace(moved, channel="beta")
    with store.write() as tx:
        tx.replace(moved)
        tx.replace(beta)
        assert tx.get(ChannelRecord, "acme", "live") == moved, "a transaction sees what it did"
        tx.log(EVENT)
    with store.read() as tx:
        assert tx.list(ChannelRecord, "acme") == [beta, moved]


def test_pages_are_in_the_order_of_code_points_and_numbers(store: Store) -> None:
    names = ["a", "a-", "a-b", "a0", "aa", "b", "b-1", "b10", "b2"]
    put(store, *(PatchRecord("acme", name, "", NOW) for name in reversed(names)), PatchRecord("zeta", "a", "", NOW))
    put(store, *(RevisionRecord("acme", "a", n, "", "", NOW) for n in (10, 9, 1, 2, 100)))
    with store.read() as tx:
        assert [p.patch for p in tx.list(PatchRecord, "acme")] == names == sorted(names)
        assert [p.patch for p in tx.list(PatchRecord, "acme", after="a-b", limit=3)] == ["a0", "aa", "b"]
        assert [p.patch for p in tx.list(PatchRecord, "acme", after="a-b", descending=True)] == ["a-", "a"]
        assert [p.patch for p in tx.list(PatchRecord, "acme", after="a-bb", limit=1)] == ["a0"]
        assert [r.number for r in tx.list(RevisionRecord, "acme", "a", after=2)] == [9, 10, 100]
        assert [r.number for r in tx.list(RevisionRecord, "acme", "a", descending=True, limit=2)] == [100, 10]
        assert tx.list(PatchRecord, "acme", after="z") == []
        assert [p.tenant for p in tx.list(PatchRecord)] == ["acme"] * 9 + ["zeta"]


def test_find_takes_the_first_that_fits(store: Store) -> None:
    same = [ReleaseRecord("acme", n, "ab", "[]", "", NOW) for n in (3, 1, 2)]
    put(store, *same, ReleaseRecord("other", 1, "ab", "[]", "", NOW))
    with store.read() as tx:
        assert tx.find(ReleaseRecord, tenant="acme", digest="ab") == same[1]
        assert tx.find(ReleaseRecord, digest="cd") is None


def test_p8_a_tenants_transaction_sees_and_touches_its_own_alone(store: Store) -> None:
    check_tenants_apart(store)


def check_tenants_apart(store: Store) -> None:
    """P8, where it begins: whatever a rule forgets to ask for, another tenant's records aren't there."""
    put(store, *ONE_OF_EACH)
    mine = PatchRecord("other", "mine", "", NOW)
    put(store, TenantRecord("other", NOW), mine)
    for look in (store.read, store.write):
        with suppress(Broken), look("other") as tx:
            for kind in (kind for kind in KINDS if kind is not ReplyRecord):
                assert {r.tenant for r in tx.list(kind)} <= {"other"}
            assert tx.list(PatchRecord) == [mine]
            assert [tx.get(type(r), *key_of(r)) for r in ONE_OF_EACH[:-1]] == [None] * 7
            assert tx.find(KeyRecord, key="k") is None
            raise Broken
    with pytest.raises(AssertionError):
        put(store, PatchRecord("acme", "theirs", "", NOW), tenant="other")
    with pytest.raises(AssertionError), store.write("other") as tx:
        tx.replace(ChannelRecord("acme", "live", 9, "", None, 9, NOW))
        tx.log(replace(EVENT, tenant="other"))
    with store.read() as tx:
        assert tx.list(PatchRecord, "acme") == [ONE_OF_EACH[2]]
        assert tx.list(ChannelRecord) == [ONE_OF_EACH[6]]


def test_replies_are_forgotten_by_age(store: Store) -> None:
    ages = [ReplyRecord("who", "m", str(n), "", "", 1, NOW + timedelta(microseconds=n)) for n in range(4)]
    put(store, *ages)
    with store.write() as tx:
        tx.forget_replies(ages[2].created)
        tx.log(EVENT)
    with store.read() as tx:
        assert tx.list(ReplyRecord) == ages[2:]


def test_a_new_epoch_begins_with_its_write(store: Store) -> None:
    put(store)
    with store.write() as tx:
        tx.begin(2**50)
        assert tx.position == Position(2**50, 2)
        tx.log(EVENT)
    put(store)
    with store.read() as tx:
        assert tx.position == Position(2**50, 3)
        assert verify_chain(tx) == (3, None)


def test_a_new_epoch_is_higher_whatever_the_clock_says(store: Store) -> None:
    put(store)
    later = NOW + timedelta(days=1)
    epochs = [raise_epoch(store, now).epoch for now in (NOW, NOW, later, NOW)]
    at = [int(now.timestamp() * 1000) for now in (NOW, later)]
    assert epochs == [at[0], at[0] + 1, at[1], at[1] + 1]


def _together(*acts: Callable[[], Any]) -> None:
    threads = [threading.Thread(target=act) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_writes_run_one_at_a_time_and_readers_see_whole_ones(store: Store) -> None:
    """Eight writers append to a number that each has read; a reader never sees half of a write."""
    put(store, ChannelRecord("acme", "live", 0, "", None, 0, NOW), ChannelRecord("acme", "twin", 0, "", None, 0, NOW))
    torn: list[tuple[int, ...]] = []
    done = threading.Event()

    def raise_both(tx: Write) -> None:
        for name in ("live", "twin"):
            now = tx.get(ChannelRecord, "acme", name)
            assert now is not None
            tx.replace(replace(now, generation=now.generation + 1))
            time.sleep(0.001)
        tx.log(EVENT)

    def write() -> None:
        for _ in range(5):
            with store.write() as tx:
                raise_both(tx)

    def look() -> None:
        while not done.is_set():
            with store.read() as tx:
                first = tx.position.revision, *(c.generation + 1 for c in tx.list(ChannelRecord))
                time.sleep(0.002)
                again = len(tx.list(EventRecord)), *(c.generation + 1 for c in tx.list(ChannelRecord))
                if len({*first, *again}) > 1:
                    torn.append(first + again)

    reader = threading.Thread(target=look)
    reader.start()
    _together(*[write] * 8)
    done.set()
    reader.join()
    assert torn == []
    with store.read() as tx:
        assert [c.generation for c in tx.list(ChannelRecord)] == [40, 40]
        assert verify_chain(tx) == (41, None)
