"""The end of the history in memory says what the store says, and reads each write once for all streams."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from backpack_serving.auth.keys import Principal
from backpack_serving.interventions import history_tail
from backpack_serving.interventions.event_history import EventHistory
from backpack_serving.interventions.history_tail import HistoryTail
from backpack_serving.interventions.ledger import IdempotencyKey, raise_epoch
from backpack_serving.interventions.service import Interventions
from backpack_serving.interventions.store import Store
from backpack_serving.references import LIVE, Position, ReaderKind
from backpack_serving.sync.messages import Ack, Delta, Hello, ResyncRequired, Snapshot
from backpack_serving.sync.server import SyncServer

from tests.interventions.conftest import SHAPE
from tests.interventions.test_rollouts import Reads


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def _move(service: Interventions, who: Principal, times: int = 1) -> None:
    for _ in range(times):
        etag = service.channels.get_channel(who, LIVE).etag
        service.channels.activate(who, LIVE, 0, etag, IdempotencyKey())


async def test_p6_the_tail_says_what_the_store_says(
    service: Interventions, acme: Principal, threads: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_tail, "KEPT_WRITES", 5)
    tail = HistoryTail(EventHistory(service, page=3), threads)
    for times in (0, 1, 2, 4, 7):
        _move(service, acme, times)
        await tail.refresh()
        head, writes = EventHistory(service).writes_after(0)
        assert writes is not None
        assert tail.head == head
        for revision in range(head.revision + 1):
            at, said = revision, []
            while at < head.revision:
                page = tail.since(at)
                assert page is not None
                assert page.position.revision > at
                said += page.changes
                at = page.position.revision
            assert said == [entry for write in writes[revision:] for entry in write]
        assert tail.at_hand(head.revision)
        assert not tail.at_hand(head.revision + 1), "another process may have written that"
    assert not tail.at_hand(0), "no more is kept than the last five writes"


async def test_a_write_is_read_once_for_all_readers(
    store: Store, service: Interventions, acme: Principal, threads: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail, nonces = HistoryTail(EventHistory(service), threads), itertools.count(1)
    await tail.refresh()
    readers = [SyncServer(tail, nonces) for _ in range(50)]
    for number, reader in enumerate(readers):
        hello = Hello(ReaderKind.REPLICA, f"r{number}", "r", SHAPE.fingerprint, Position(), whole=True)
        reader.receive(hello, 0.0)
    reads = Reads(store, monkeypatch)
    for reader in readers:
        (snapshot,) = reader.pump(0.0)
        assert isinstance(snapshot, Snapshot)
        reader.receive(Ack(snapshot.nonce), 0.0)
    assert reads.count <= 2, "of the whole state there is one"
    _move(service, acme)
    reads.count = 0
    await asyncio.gather(*(tail.refresh() for _ in readers))
    for reader in readers:
        assert reader.at_hand
        (delta,) = reader.pump(0.1)
        assert isinstance(delta, Delta)
        assert delta.position == tail.head
        assert reader.at_hand, "while it is under way"
    assert reads.count <= 2


async def test_a_snapshot_that_is_kept_is_never_older_than_its_reader(
    service: Interventions, acme: Principal, threads: Executor
) -> None:
    """It would take it for a late one, and wait for another for ever."""
    tail = HistoryTail(EventHistory(service), threads)
    await tail.refresh()
    before = tail.snapshot(Position())
    _move(service, acme)
    await tail.refresh()
    assert tail.snapshot(before.position) is before, "what came after it follows as deltas"
    assert tail.snapshot(tail.head).position == tail.head


async def test_p6_a_new_epoch_is_told_from_memory_and_its_state_is_read_anew(
    store: Store, service: Interventions, acme: Principal, threads: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail = HistoryTail(EventHistory(service), threads)
    await tail.refresh()
    old = tail.snapshot(Position())
    reader = SyncServer(tail, itertools.count(1))
    reader.receive(Hello(ReaderKind.GATEWAY, "r", "r", SHAPE.fingerprint, tail.head), 0.0)
    reader.pump(0.0)
    raise_epoch(store, datetime.now(UTC))
    await tail.refresh()
    reads = Reads(store, monkeypatch)
    assert reader.at_hand
    assert [type(message) for message in reader.pump(0.1)] == [ResyncRequired]
    assert reads.count == 0
    reader.receive(Hello(ReaderKind.GATEWAY, "r", "r", SHAPE.fingerprint, old.position), 0.2)
    (snapshot,) = reader.pump(0.2)
    assert isinstance(snapshot, Snapshot)
    assert snapshot.position == tail.head > old.position
