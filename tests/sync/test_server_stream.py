"""Many readers on one loop: how much is done in one turn of it, counted in units of work; no clock decides."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, contextmanager
from typing import Any

import pytest
from backpack_proto.v1 import sync_pb2 as pb
from backpack_serving.references import Position, ReaderKind
from backpack_serving.shared_read import SharedRead
from backpack_serving.sync.messages import Ack, FromReader, Hello, Snapshot
from backpack_serving.sync.server import SyncServer
from backpack_serving.sync.server_stream import (
    KEEP_WAITING,
    LONG_AT_ONCE,
    UNITS_A_TURN,
    WOKEN_A_TURN,
    ChangeEncoder,
    ReaderStreams,
)
from backpack_serving.sync.state import TenantState
from backpack_serving.sync.wire import CHANGES, SnapshotAssembler, write_from_reader
from backpack_serving.turnstile import Turnstile

from tests.sync.simulator import MODEL, Dice, History
from tests.waiting import eventually


class Turns:
    """The number of the loop's turn."""

    def __init__(self) -> None:
        self.now = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        loop, going = asyncio.get_running_loop(), True

        def turn() -> None:
            self.now += 1
            if going:
                loop.call_soon(turn)

        turn()
        yield
        going = False


class SharedHistory(History):
    """The simulator's, for streams."""

    def __init__(self) -> None:
        super().__init__(random.Random(1), Dice(bad_release=0))
        self.refreshed = 0

    async def refresh(self, within: float = 0.0) -> None:
        self.refreshed += 1


class Connection:
    """A reader's end of a stream; it acknowledges what it is sent at once."""

    def __init__(self, streams: ReaderStreams, number: int, nonces: Iterator[int], whole: bool) -> None:
        self.server = SyncServer(streams.history, nonces)
        self._streams, self.up = streams, asyncio.Queue[FromReader]()
        at = Position() if whole else streams.history.head
        self.up.put_nowait(Hello(ReaderKind.GATEWAY, f"r{number}", f"r{number}", MODEL, at, whole))
        self.raw: list[bytes] = []
        self.at, self.beside = at, 0

    async def run(self, turns: Turns, units: Counter[int], halfway: set[Connection]) -> None:
        """Count what is sent in each turn, and be in `halfway` while more parts will follow."""
        incoming = SnapshotAssembler()

        async def requests() -> AsyncIterator[pb.SyncRequest]:
            while True:
                yield write_from_reader(await self.up.get())

        async def ignored(message: FromReader) -> None:
            pass

        async with aclosing(self._streams.serve(self.server, requests(), ignored)) as stream:
            async for data in stream:
                units[turns.now] += 1
                self.raw.append(data)
                message = incoming.read(pb.SyncResponse.FromString(data))
                if data != KEEP_WAITING and message is None:
                    halfway.add(self)
                    self.beside = len(halfway)
                if isinstance(message, Snapshot):
                    halfway.discard(self)
                if message is not None and hasattr(message, "nonce"):
                    self.at = message.position  # type: ignore[union-attr]
                    self.up.put_nowait(Ack(message.nonce))


@contextmanager
def _connected(
    count: int, history: SharedHistory, whole: bool
) -> Iterator[tuple[list[Connection], Turns, Counter[int]]]:
    with ThreadPoolExecutor(2) as threads:
        streams, nonces, turns, units = ReaderStreams(history, threads), itertools.count(1), Turns(), Counter[int]()
        halfway = set[Connection]()
        readers = [Connection(streams, number, nonces, whole) for number in range(count)]
        running = [asyncio.create_task(reader.run(turns, units, halfway)) for reader in readers]
        with turns.counted():
            yield readers, turns, units
        for task in running:
            task.cancel()


async def test_of_tasks_that_are_woken_together_few_run_in_one_turn() -> None:
    turnstile, turns, passed = Turnstile(4), Turns(), Counter[int]()

    async def work() -> None:
        for _ in range(3):
            await turnstile.enter()
            passed[turns.now] += 1

    with turns.counted():
        gone = asyncio.create_task(turnstile.enter())
        working = [asyncio.create_task(work()) for _ in range(30)]
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(*working)
    assert passed.total() == 90
    assert max(passed.values()) == 4


async def test_who_asks_for_a_read_gets_one_that_began_afterwards_and_shares_it() -> None:
    began, go_on = 0, asyncio.Event()

    async def read() -> int:
        nonlocal began
        began += 1
        mine = began
        await go_on.wait()
        return mine

    shared = SharedRead(read)
    first = asyncio.create_task(shared.get())
    while not began:
        await asyncio.sleep(0)
    others = [asyncio.create_task(shared.get()) for _ in range(5)]
    await asyncio.sleep(0)
    others[0].cancel()
    go_on.set()
    assert await first == 1
    assert [await other for other in others[1:]] == [2] * 4, "the first had begun before they asked"
    assert (began, shared.idle) == (2, True)


async def test_a_write_is_sent_to_all_readers_in_many_short_turns_of_the_loop() -> None:
    history = SharedHistory()
    for _ in range(5):
        history.write()
    with _connected(10 * UNITS_A_TURN, history, whole=False) as (readers, _, units):
        await eventually(lambda: _all(bool(r.raw) for r in readers))
        units.clear()
        history.write()
        readers[0]._streams.wake()
        await eventually(lambda: _all(r.at == history.head for r in readers))
        assert units.total() >= len(readers)
        assert max(units.values()) <= UNITS_A_TURN, "the loop was held by more"
    assert all(r.at == history.head for r in readers)


async def test_of_a_write_few_streams_are_told_in_one_turn_and_all_in_the_end() -> None:
    with ThreadPoolExecutor(1) as executor, ExitStack() as listeners:
        streams = ReaderStreams(SharedHistory(), executor)
        count = 5 * WOKEN_A_TURN
        events = [listeners.enter_context(streams.listening()) for _ in range(count)]
        streams.wake()
        told = [sum(event.is_set() for event in events)]
        streams.wake()  # of another write meanwhile
        while told[-1] < count:
            await asyncio.sleep(0)
            told.append(sum(event.is_set() for event in events))
        assert max(b - a for a, b in zip([0, *told], told, strict=False)) <= WOKEN_A_TURN
        for event in events:
            event.clear()
        for _ in range(10):
            await asyncio.sleep(0)
        streams.wake()
        for _ in range(10):
            await asyncio.sleep(0)
        assert all(event.is_set() for event in events), "a later write is told to all again"


async def test_of_readers_that_all_need_the_whole_state_few_get_it_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If all got a share, and a share took longer than their patience, nobody would ever have the whole."""
    monkeypatch.setattr("backpack_serving.sync.server_stream.LONG_AT_ONCE", 2)
    monkeypatch.setattr("backpack_serving.sync.wire.CHANGES", 2)
    history = SharedHistory()
    history.state = {n: TenantState(f"t{n}") for n in range(50)}
    history.head = Position(1, 7)
    with _connected(20, history, whole=True) as (readers, _, units):
        await eventually(lambda: _all(r.at == history.head for r in readers))
        assert max(units.values()) <= UNITS_A_TURN
        assert max(r.beside for r in readers) <= 2


async def test_a_stream_that_waits_for_its_turn_is_told_that_it_is_alive() -> None:
    history = SharedHistory()
    history.state = {n: TenantState(f"t{n}") for n in range(CHANGES + 1)}
    history.head = Position(1, 7)
    with _connected(3 * UNITS_A_TURN, history, whole=True) as (readers, _, units):
        streams = readers[0]._streams
        for _ in range(LONG_AT_ONCE):
            await streams._long.acquire()
        await eventually(lambda: _all(KEEP_WAITING in reader.raw for reader in readers))
        assert max(units.values()) <= UNITS_A_TURN, "they were all told in one turn of the loop"
        assert {reader.at for reader in readers} == {Position()}
        streams._long.release()
        await eventually(lambda: _all(reader.at == history.head for reader in readers))


async def _all(conditions: Any) -> bool:
    return all(conditions)


def test_a_snapshot_that_is_encoded_once_is_read_with_each_streams_own_header() -> None:
    encoder, changes = ChangeEncoder(), tuple(TenantState(f"t{n}", n % 2 == 0) for n in range(CHANGES + 5))
    encoded = []
    for nonce, revision in ((1, 5), (2, 6)):
        message, incoming = Snapshot(nonce, Position(3, revision), changes), SnapshotAssembler()
        encoded.append(encoder.encode(message))
        read = [incoming.read(pb.SyncResponse.FromString(shared + own)) for shared, own in encoded[-1]]
        assert read == [None, message]
    assert all(one is other for (one, _), (other, _) in zip(*encoded, strict=True)), "each stream has a copy"
