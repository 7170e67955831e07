"""What readers (gateways and replicas) know of the store, and where in its history they stand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from backpack_serving.auth.keys import Principal, Verifier
from backpack_serving.references import Position, ReleaseRef

RESIDENT = 3
"""How many releases of a channel stay compiled in replicas: the one that it is at, and those before it."""


@dataclass(frozen=True, slots=True)
class CanarySplit:
    """A release that so many in a thousand request keys of a channel get, drawn under a salt."""

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
    """An API key: whose it is, and what recognises its secret."""

    principal: Principal
    verifier: Verifier
    revoked: bool

    @property
    def key(self) -> str:
        return self.principal.key


@dataclass(frozen=True, slots=True)
class ChannelState:
    """A channel. `earlier` are the releases that it was at before, newest first: where a rollback may go."""

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
        """The releases that its requests get now."""
        return (self.stable, self.canary.release) if self.canary else (self.stable,)

    def choose(self, request_key: str) -> ReleaseRef:
        """The release that a request with this key gets."""
        if self.canary and self.canary.takes(request_key):
            return self.canary.release
        return self.stable


@dataclass(frozen=True, slots=True)
class RecentRelease:
    """A release that was just made and will probably be activated: replicas get it ready before it is."""

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
    """A change of a kind that this reader is too old for."""

    kind: str

    @property
    def key(self) -> tuple[str, str]:
        return "", self.kind


StateEntry = TenantState | KeyState | ChannelState | RecentRelease | UnknownEntry
"""One thing that readers know. `key` says which, among those of its kind: the newest of a key is what holds."""

Stageable = ChannelState | RecentRelease
"""What has releases that a replica must be able to serve."""


@dataclass(frozen=True, slots=True)
class StateView:
    """All that a reader knows, as of one position. A change makes another view; nobody ever sees half of one."""

    position: Position = field(default_factory=Position)
    tenants: Mapping[str, TenantState] = field(default_factory=dict)
    keys: Mapping[str, KeyState] = field(default_factory=dict)
    channels: Mapping[tuple[str, str], ChannelState] = field(default_factory=dict)
    fresh: Mapping[str, RecentRelease] = field(default_factory=dict)

    def changed(self, position: Position, changes: Iterable[StateEntry]) -> StateView:
        """The view after these changes. What they don't mention stays: absence is never deletion."""
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
        """All of it, as a snapshot would tell it."""
        return (*self.tenants.values(), *self.keys.values(), *self.channels.values(), *self.fresh.values())
