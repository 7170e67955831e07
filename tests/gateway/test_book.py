"""What a gateway knows, and for how long it may rely on it."""

from __future__ import annotations

import pytest
from backpack_serving.errors import NotFound, Unauthenticated, Unavailable
from backpack_serving.gateway.book import Book, KnownChannel, KnownKey, KnownTenant, Pinned
from backpack_serving.keys import ApiKey, Principal, Role, Verifier

KEY = ApiKey.mint()
WHO = Principal("acme", KEY.id, frozenset({Role.CALLER}))
KNOWN = KnownKey(WHO, Verifier.of(KEY.secret), revoked=False)
LIVE = KnownChannel("acme", "live", 3, "ab" * 32)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> Book:
    book = Book(expires=60, clock=clock)
    book.apply((1, 7), True, [KnownTenant("acme"), KNOWN, LIVE])
    return book


def test_authenticates_and_pins(book: Book) -> None:
    assert book.authenticate(str(KEY)) == WHO
    assert book.pin("acme", "live") == Pinned("acme", "live", 3, "ab" * 32, 1, 7)


def test_a_change_replaces_and_moves_the_position(book: Book) -> None:
    book.apply((1, 8), False, [KnownChannel("acme", "live", 4, "cd" * 32)])
    assert book.pin("acme", "live") == Pinned("acme", "live", 4, "cd" * 32, 1, 8)
    assert book.authenticate(str(KEY)) == WHO


def test_a_reset_forgets_what_was_known(book: Book) -> None:
    book.apply((2, 1), True, [])
    with pytest.raises(Unauthenticated):
        book.authenticate(str(KEY))
    with pytest.raises(NotFound, match="acme/channels/live"):
        book.pin("acme", "live")


def test_unknown_wrong_and_revoked_keys_are_nobody(book: Book) -> None:
    for key in (str(ApiKey.mint()), str(ApiKey(KEY.id, "0" * 64)), str(KEY)[:-1], "", "bp_"):
        with pytest.raises(Unauthenticated):
            book.authenticate(key)
    book.apply((1, 8), False, [KnownKey(WHO, KNOWN.verifier, revoked=True)])
    with pytest.raises(Unauthenticated):
        book.authenticate(str(KEY))


def test_a_channel_of_another_tenant_is_not_there(book: Book) -> None:
    with pytest.raises(NotFound):
        book.pin("other", "live")


def test_nothing_is_served_before_the_first_news(clock: Clock) -> None:
    with pytest.raises(Unavailable, match="hasn't reached"):
        Book(60, clock).authenticate(str(KEY))


def test_known_good_survives_silence_up_to_the_bound(book: Book, clock: Clock) -> None:
    clock.now = 59
    assert book.authenticate(str(KEY)) == WHO
    clock.now = 61
    with pytest.raises(Unavailable, match="no news from the intervention service for 61 s"):
        book.authenticate(str(KEY))
    book.apply((1, 7), False, [])  # a bookmark
    assert book.authenticate(str(KEY)) == WHO
