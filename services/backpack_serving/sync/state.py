"""The state that readers (gateways and replicas) keep of the store, and its position in the store's history."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from backpack_serving.auth.keys import Principal, Verifier
from backpack_serving.references import Position, ReleaseRef

RESIDENT = 3
"""How many releases of a channel stay compiled in replicas: the current one and those before it."""


@dataclass(frozen=True, slots=True)
class CanarySplit:
    """A release for `permille` in a thousand request keys of a channel, chosen by a salted hash."""

    release: ReleaseRef
    permille: int
    salt: str

    def takes(self, request_key: str) -> bool:
        """Whether a request with this key gets the canary: always the same answer under the same salt."""
        drawn = hashlib.sha256(f"{self.salt}\n{request_key}".encode()).digest()
        return int.from_bytes(drawn[:8], "big") % 1000 < self.permille


@dataclass(frozen=True, slots=True)
class TenantState:
    """`suspended`: none of its keys is good for anything."""

    tenant: str
    suspended: bool = False

    @property
    def key(self) -> str:
        return self.tenant


@dataclass(frozen=True, slots=True)
class KeyState:
    """An API key: its principal, and the verifier of its secret."""

    principal: Principal
    verifier: Verifier
    revoked: bool

    @property
    def key(self) -> str:
        return self.principal.key


@dataclass(frozen=True, slots=True)
class ChannelState:
    """A channel. `earlier` are its previous releases, newest first: where a rollback may go."""

    tenant: str
    channel: str
    stable: ReleaseRef
    canary: CanarySplit | None = None
    earlier: tuple[ReleaseRef, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        return self.tenant, self.channel

    @property
    def serving(self) -> tuple[ReleaseRef, ...]:
        """The releases that its requests get now: stable, and canary if there is one."""
        return (self.stable, self.canary.release) if self.canary else (self.stable,)

    def choose(self, request_key: str) -> ReleaseRef:
        """The release that a request with this key gets."""
        if self.canary and self.canary.takes(request_key):
            return self.canary.release
        return self.stable


@dataclass(frozen=True, slots=True)
class RecentRelease:
    """A new release, which replicas stage before it is activated."""

    tenant: str
    release: ReleaseRef

    @property
    def key(self) -> tuple[str, str]:
        return self.tenant, ""

    @property
    def serving(self) -> tuple[ReleaseRef, ...]:
        return (self.release,)


@dataclass(frozen=True, slots=True)
class UnknownEntry:
    """A change of a kind that this version doesn't know."""

    kind: str

    @property
    def key(self) -> tuple[str, str]:
        return "", self.kind


StateEntry = TenantState | KeyState | ChannelState | RecentRelease | UnknownEntry
"""One entry of the state. `key` is unique among entries of its kind; a later entry replaces an earlier one."""

Stageable = ChannelState | RecentRelease
"""Entries with releases that a replica must stage."""


@dataclass(frozen=True, slots=True)
class StateView:
    """The whole state at one position. Immutable: a change makes a new view, so nobody sees half of one."""

    position: Position = field(default_factory=Position)
    tenants: Mapping[str, TenantState] = field(default_factory=dict)
    keys: Mapping[str, KeyState] = field(default_factory=dict)
    channels: Mapping[tuple[str, str], ChannelState] = field(default_factory=dict)
    fresh: Mapping[str, RecentRelease] = field(default_factory=dict)

    def changed(self, position: Position, changes: Iterable[StateEntry]) -> StateView:
        """The view after these changes. Entries that they don't mention stay: absence is never deletion."""
        tenants, keys = dict(self.tenants), dict(self.keys)
        channels, fresh = dict(self.channels), dict(self.fresh)
        for change in changes:
            match change:
                case TenantState():
                    tenants[change.key] = change
                case KeyState():
                    keys[change.key] = change
                case ChannelState():
                    channels[change.key] = change
                case RecentRelease():
                    fresh[change.tenant] = change
        return StateView(position, tenants, keys, channels, fresh)

    def records(self) -> tuple[StateEntry, ...]:
        """All entries, as a snapshot contains them."""
        return (*self.tenants.values(), *self.keys.values(), *self.channels.values(), *self.fresh.values())
