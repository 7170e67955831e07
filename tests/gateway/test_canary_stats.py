"""What a gateway counts of requests under canaries."""

from __future__ import annotations

from contextlib import suppress

from backpack_serving.errors import NotFound, Unavailable
from backpack_serving.gateway.canary_stats import CanaryStats
from backpack_serving.references import CanaryTally, Pin, Position, ReleaseRef
from backpack_serving.sync.state import CanarySplit, ChannelState, StateView

STABLE, TRIED = ReleaseRef(1, "ab" * 32), ReleaseRef(2, "cd" * 32)
PINNED = Pin("acme", "live", 2, TRIED.digest, 1, 1, canary=True)
ALONE = StateView().changed(Position(1, 1), [ChannelState("acme", "live", STABLE)])
CANARY = StateView().changed(Position(1, 2), [ChannelState("acme", "live", STABLE, CanarySplit(TRIED, 500, "salt"))])


def _fail(tallies: CanaryStats, error: Exception | None, meanwhile: StateView | None = None) -> None:
    with suppress(NotFound, Unavailable), tallies.request(PINNED):
        if meanwhile:
            tallies.swapped(meanwhile)
        if error:
            raise error


def test_p12_what_says_something_of_the_release_is_counted_until_the_canary_ends() -> None:
    tallies = CanaryStats()
    tallies.swapped(CANARY)
    for error in (None, NotFound("GONE", ""), Unavailable("AWAY", "")):
        _fail(tallies, error)
    assert tallies.tallies() == (CanaryTally("acme", "live", TRIED.digest, 2, 1),)
    tallies.swapped(ALONE)
    assert tallies.tallies() == ()


def test_p12_a_request_that_ends_after_its_canary_counts_against_no_later_one() -> None:
    tallies = CanaryStats()
    tallies.swapped(CANARY)
    _fail(tallies, NotFound("GONE", ""), meanwhile=ALONE)
    tallies.swapped(CANARY)
    assert tallies.tallies() == ()
