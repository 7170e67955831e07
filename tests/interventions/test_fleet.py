"""Whose counts a canary is judged by, by a clock that the test turns."""

from __future__ import annotations

import itertools
import random
from datetime import UTC, datetime

import pytest
from backpack_serving.errors import InvalidRequest
from backpack_serving.interventions.fleet import FORGOTTEN, ReaderTracker, StatusReason
from backpack_serving.interventions.fleet_wire import read_place, write_place, write_reader
from backpack_serving.interventions.records import ChannelRecord
from backpack_serving.interventions.rollouts import ErrorGate
from backpack_serving.references import CanaryTally, Position, ReaderKind, Refusal
from backpack_serving.sync.messages import SILENCE, Hello, ReaderReport, ResyncRequired
from backpack_serving.sync.server import SyncServer

from tests.conftest import Clock
from tests.sync.simulator import MODEL, Dice, History

_CHANNEL = ChannelRecord("acme", "live", 0, "d", None, 1, datetime.now(UTC))


def _hello(name: str) -> Hello:
    return Hello(ReaderKind.GATEWAY, name, name, MODEL, Position(1, 0))


def _stream(name: str) -> SyncServer:
    session = SyncServer(History(random.Random(0), Dice()), itertools.count(1))
    session.receive(_hello(name), 0.0)
    return session


def _report(requests: int, errors: int) -> ReaderReport:
    return ReaderReport(tallies=(CanaryTally("acme", "live", "d", requests, errors),))


def _counted(fleet: ReaderTracker) -> tuple[int, int]:
    together = fleet.tally("acme", "live", "d")
    return together.requests, together.errors


def test_p12_what_a_gateway_counted_that_is_gone_ends_no_later_canary_of_the_release() -> None:
    fleet = ReaderTracker(Clock())
    gone = _stream("gone")
    fleet.record(gone, _report(20, 20))
    assert "20 of 20" in ErrorGate().verdict(fleet.tally("acme", "live", "d"))
    fleet.disconnect(gone)
    fleet.record(_stream("new"), _report(1, 0))
    assert _counted(fleet) == (1, 0)
    assert ErrorGate().verdict(fleet.tally("acme", "live", "d")) == ""


def test_p12_gateways_count_together_wherever_they_are_connected_until_they_are_silent() -> None:
    clock = Clock()
    fleet = ReaderTracker(clock)
    here = _stream("here")
    fleet.record(here, _report(12, 1))
    fleet.record_remote(_hello("there"), _report(12, 3))
    assert _counted(fleet) == (24, 4)
    clock.now = SILENCE + 0.1
    fleet.record(here, _report(13, 1))
    assert _counted(fleet) == (13, 1), "nobody tells of the other any more"
    fleet.disconnect(here)
    fleet.record(_stream("here"))
    assert _counted(fleet) == (0, 0)
    fleet.record(_stream("here"), _report(14, 2))
    assert _counted(fleet) == (14, 2), "one that comes again reports all that it has counted"


def test_a_reader_that_has_to_say_hello_again_is_listed_meanwhile() -> None:
    """As when an epoch begins while its stream is open."""
    fleet, history = ReaderTracker(Clock()), History(random.Random(0), Dice())
    stream = SyncServer(history, itertools.count(1))
    stream.receive(_hello("gateway"), 0.0)
    stream.pump(0.0)
    fleet.record(stream, _report(1, 0))
    history.restore()
    assert [type(message) for message in stream.pump(1.0)] == [ResyncRequired]
    assert [hello.name for hello, _ in fleet.local_standing(fleet.known_incarnations)] == ["gateway"]
    assert [write_reader(*seen).reader for seen in fleet.readers()] == ["gateway"]
    assert fleet.rollout(_CHANNEL, history.head).gateways.total == 1


def test_readers_that_are_gone_are_forgotten_although_nobody_asks_for_them() -> None:
    clock = Clock()
    fleet = ReaderTracker(clock)
    for number in range(100):
        stream = _stream(f"r{number}")
        fleet.record(stream, _report(1, 0))
        fleet.disconnect(stream)
        fleet.record_remote(_hello(f"e{number}"), _report(1, 0))
        clock.now += FORGOTTEN / 10
    assert len(fleet._statuses) <= 2 * 11


def test_a_reader_that_does_not_hold_a_release_says_why() -> None:
    clock = Clock()
    fleet, history = ReaderTracker(clock), History(random.Random(0), Dice())
    stream = SyncServer(history, itertools.count(1))
    stream.receive(_hello("gateway"), 0.0)
    fleet.record(stream)

    def hold() -> tuple[str, str, str]:
        (hold,) = fleet.holds(
            ChannelRecord("acme", "live", 0, "d", None, 9, datetime.now(UTC), moved=9), Position(1, 9), fleet.readers()
        )
        assert hold.why is not None
        return hold.state, hold.why.reason, hold.why.message

    assert hold() == ("stale", "BEHIND", "it is at 1.0, and the channel was moved at 1.9")
    clock.now = SILENCE + 1
    assert hold() == ("stale", "SILENT", "its stream is half open: last heard 6 s ago")
    fleet.disconnect(stream)
    assert hold() == (
        "stale",
        "DISCONNECTED",
        "it has no stream to the intervention service: last heard 6 s ago",
    )
    again = _stream("gateway")
    fleet.record(again)
    fleet.disconnect(again, StatusReason("STORE_WENT_BACK", "a backup was restored"))
    refused = ("stale", "STORE_WENT_BACK", "a backup was restored (last heard 0 s ago)")
    assert hold() == refused
    trying = _stream("gateway")
    fleet.record(trying)
    assert hold()[1] == "STORE_WENT_BACK", "until a stream lives, that is what is known"
    fleet.record(trying, _report(0, 0))
    assert hold()[1] == "BEHIND"
    fleet.disconnect(trying)
    assert hold()[1] == "DISCONNECTED"
    refusal = Refusal("acme", "live", "d", "NON_FINITE", "no numbers")
    other = _stream("gateway")
    other.refusals[refusal.key] = refusal
    fleet.record(other, _report(0, 0))
    assert hold() == ("nacked", "NON_FINITE", "no numbers")


def test_a_stream_that_has_ended_leaves_nothing_behind() -> None:
    fleet, stream = ReaderTracker(Clock()), _stream("gateway")
    for _ in range(2):
        fleet.record(stream)
        assert [status.connected for status, _ in fleet.readers()] == [True]
        fleet.disconnect(stream)
        assert [status.connected for status, _ in fleet.readers()] == [False]
        assert not fleet._incarnations_by_stream


def test_only_what_is_new_of_a_reader_is_published_before_its_time() -> None:
    fleet = ReaderTracker(Clock())
    here, there = _stream("here"), _stream("there")
    assert fleet.record(here)
    assert fleet.record(there)
    assert fleet.record(here, _report(1, 0))
    assert not fleet.record(here, _report(1, 0)), "it said so before"
    assert fleet.record(here, _report(2, 0))
    fleet.disconnect(here)
    assert fleet.record(here), "it is back"
    assert [hello.name for hello, _ in fleet.local_standing(["there"])] == ["there"]
    assert [hello.name for hello, _ in fleet.local_standing(fleet.known_incarnations)] == ["here", "there"]


def test_readers_are_listed_in_pages_that_leave_none_out() -> None:
    fleet = ReaderTracker(Clock())
    for number in range(7):
        name, kind = f"r{number % 5}", ReaderKind.REPLICA if number % 2 else ReaderKind.GATEWAY
        hello = Hello(kind, f"i{number}", name, MODEL, Position(1, 0))
        fleet.record_remote(hello, ReaderReport())
    whole = [status.hello.incarnation for status, _ in fleet.readers()]
    assert len(whole) == 7
    seen, place = [], None
    while page := fleet.readers(place)[:2]:
        seen += [status.hello.incarnation for status, _ in page]
        place = read_place(write_place(page[-1][0]))
    assert seen == whole


@pytest.mark.parametrize("text", ["", "[]", "1", '["a", "b", "c"]', "[true, 1, 2]", "[" * 100_000])
def test_a_place_in_the_list_of_readers_that_is_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is not from a page of this list"):
        read_place(text)
