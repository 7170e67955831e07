"""What a gateway knows, and for how long it may rely on it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from backpack_serving.auth.keys import ApiKeySecret, Principal, Role, Verifier
from backpack_serving.errors import NotFound, PreconditionFailed, Unauthenticated, Unavailable
from backpack_serving.gateway.registry import TenantRegistry
from backpack_serving.references import Pin, Position, ReaderKind, ReleaseRef
from backpack_serving.sync.client import SyncClient
from backpack_serving.sync.messages import Bookmark, Delta, Snapshot
from backpack_serving.sync.state import CanarySplit, ChannelState, KeyState, StateEntry, TenantState

KEY = ApiKeySecret.mint()
WHO = Principal("acme", KEY.id, frozenset({Role.CALLER}))
KNOWN = KeyState(WHO, Verifier.of(KEY.secret), revoked=False)
STABLE, OTHER = ReleaseRef(3, "ab" * 32), ReleaseRef(4, "cd" * 32)
LIVE = ChannelState("acme", "live", STABLE)


@dataclass
class Told:
    """A book whose reader is told what a service would tell it."""

    expires: float = 60
    serve_expired: frozenset[str] = frozenset()
    now: float = 0.0

    def __post_init__(self) -> None:
        self.client = SyncClient(ReaderKind.GATEWAY, "i", "g", "ab" * 32)
        self.registry = TenantRegistry(self.client, self.expires, self.serve_expired, lambda: self.now)

    def hear(self, position: tuple[int, int], *changes: StateEntry, whole: bool = False) -> None:
        before, at = self.client.view.position, Position(*position)
        message = Snapshot(at.revision, at, changes) if whole else Delta(at.revision, before, at, changes)
        self.client.receive(message, self.now)
        self.client.apply(at.revision, (), self.now)
        self.client.commit(self.client.state, self.client.state_at)

    def bookmark(self, *position: int) -> None:
        self.client.receive(Bookmark(Position(*position)), self.now)
        self.client.commit(self.client.state, self.client.state_at)


@pytest.fixture
def told() -> Told:
    told = Told()
    told.hear((1, 7), TenantState("acme"), KNOWN, LIVE, whole=True)
    return told


@pytest.fixture
def registry(told: Told) -> TenantRegistry:
    return told.registry


def test_authenticates_and_pins(registry: TenantRegistry) -> None:
    assert registry.authenticate(str(KEY)) == WHO
    assert registry.snapshot().channel("acme", "live") == Pin("acme", "live", 3, "ab" * 32, 1, 7)


def test_a_change_replaces_and_moves_the_position(told: Told) -> None:
    told.hear((1, 8), ChannelState("acme", "live", OTHER))
    assert told.registry.snapshot().channel("acme", "live") == Pin("acme", "live", 4, "cd" * 32, 1, 8)
    assert told.registry.authenticate(str(KEY)) == WHO


def test_absence_is_never_deletion(told: Told) -> None:
    told.hear((2, 1), whole=True)
    assert told.client.view.position == Position(2, 1)
    assert told.registry.authenticate(str(KEY)) == WHO
    assert told.registry.snapshot().channel("acme", "live").digest == STABLE.digest


def test_a_suspended_tenant_has_no_good_key(told: Told) -> None:
    told.hear((1, 8), TenantState("acme", suspended=True))
    with pytest.raises(Unauthenticated, match="acme is suspended"):
        told.registry.authenticate(str(KEY))
    told.hear((1, 9), TenantState("acme"))
    assert told.registry.authenticate(str(KEY)) == WHO


def test_a_canary_takes_its_share_of_the_keys_and_the_same_ones_always(told: Told) -> None:
    told.hear((1, 8), ChannelState("acme", "live", STABLE, CanarySplit(OTHER, 250, "salt")))
    pins = {f"user-{n}": told.registry.snapshot().channel("acme", "live", f"user-{n}") for n in range(4000)}
    taken = {key for key, pinned in pins.items() if pinned.canary}
    assert {pins[key].digest for key in taken} == {OTHER.digest}
    assert {p.digest for key, p in pins.items() if key not in taken} == {STABLE.digest}
    assert abs(len(taken) - 1000) < 3 * (4000 * 0.25 * 0.75) ** 0.5
    assert all(told.registry.snapshot().channel("acme", "live", key).canary for key in taken)
    told.hear((1, 9), ChannelState("acme", "live", STABLE, CanarySplit(OTHER, 500, "salt")))
    assert all(told.registry.snapshot().channel("acme", "live", key).canary for key in taken), (
        "who had it keeps it when it grows"
    )
    drawn = sum(told.registry.snapshot().channel("acme", "live").canary for _ in range(1000))
    assert abs(drawn - 500) < 5 * 16, "without a key, each request is drawn"
    named = [told.registry.snapshot().channel("acme", "live:canary", key) for key in pins]
    assert {(pin.channel, pin.digest, pin.canary) for pin in named} == {("live", OTHER.digest, True)}


def test_a_canary_that_is_not_there_is_refused_by_its_channels_name(registry: TenantRegistry) -> None:
    with pytest.raises(PreconditionFailed, match="tenants/acme/channels/live has no canary; start one first") as none:
        registry.snapshot().channel("acme", "live:canary")
    assert none.value.reason == "NO_CANARY"
    with pytest.raises(NotFound, match="tenants/acme/channels/nowhere doesn't exist"):
        registry.snapshot().channel("acme", "nowhere:canary")


def test_unknown_wrong_and_revoked_keys_are_nobody(told: Told, registry: TenantRegistry) -> None:
    for key in (str(ApiKeySecret.mint()), str(ApiKeySecret(KEY.id, "0" * 64)), str(KEY)[:-1], "", "bp_"):
        with pytest.raises(Unauthenticated):
            registry.authenticate(key)
    told.hear((1, 8), KeyState(WHO, KNOWN.verifier, revoked=True))
    with pytest.raises(Unauthenticated):
        registry.authenticate(str(KEY))


def test_a_channel_of_another_tenant_is_not_there(registry: TenantRegistry) -> None:
    with pytest.raises(NotFound):
        registry.snapshot().channel("other", "live")


def test_nothing_is_served_before_the_first_news() -> None:
    told = Told()
    assert not told.registry.usable
    with pytest.raises(Unavailable, match="hasn't reached"):
        told.registry.authenticate(str(KEY))


def test_p10_known_good_survives_silence_up_to_the_bound(told: Told, registry: TenantRegistry) -> None:
    told.now = 59
    assert registry.authenticate(str(KEY)) == WHO
    assert registry.snapshot().channel("acme", "live").staleness == 59
    told.now = 61
    assert not registry.usable
    with pytest.raises(Unavailable, match="no news from the intervention service for 61 s"):
        registry.authenticate(str(KEY))
    told.bookmark(1, 7)
    assert registry.authenticate(str(KEY)) == WHO


@pytest.mark.parametrize(("serve", "served"), [({"acme"}, True), ({"*"}, True), ({"other"}, False)])
def test_p10_beyond_the_bound_each_tenant_is_served_or_not_as_the_operator_said(serve: set[str], served: bool) -> None:
    told = Told(serve_expired=frozenset(serve))
    told.hear((1, 7), KNOWN, LIVE, whole=True)
    told.now = 1e6
    assert told.registry.usable
    if served:
        assert told.registry.authenticate(str(KEY)) == WHO
        assert told.registry.snapshot().channel("acme", "live").staleness == 1e6
        return
    with pytest.raises(Unavailable, match="the bound is 60 s"):
        told.registry.authenticate(str(KEY))


def test_news_of_another_epoch_or_beyond_a_gap_moves_nothing(told: Told) -> None:
    for base, at in ((Position(1, 8), Position(1, 9)), (Position(0, 7), Position(0, 8))):
        told.client.receive(Delta(99, base, at, (ChannelState("acme", "live", OTHER),)), 0.0)
        assert told.client.pending is None
    assert told.client.view.position == Position(1, 7)
