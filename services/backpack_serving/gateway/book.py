"""What a gateway knows of tenants: keys and channels, as the intervention service told them.

The whole content is one immutable value that a change replaces, so a request sees one state of the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from backpack_serving.errors import NotFound, Unauthenticated, Unavailable
from backpack_serving.keys import ApiKey, Principal, Verifier


@dataclass(frozen=True, slots=True)
class KnownTenant:
    tenant: str


@dataclass(frozen=True, slots=True)
class KnownKey:
    principal: Principal
    verifier: Verifier
    revoked: bool


@dataclass(frozen=True, slots=True)
class KnownChannel:
    tenant: str
    channel: str
    release: int
    digest: str


Known = KnownTenant | KnownKey | KnownChannel


@dataclass(frozen=True, slots=True)
class Pinned:
    """The release that a request gets, and the position of the store at which that was so."""

    tenant: str
    channel: str
    release: int
    digest: str
    epoch: int
    revision: int


@dataclass(frozen=True, slots=True)
class _Page:
    epoch: int = 0
    revision: int = 0
    keys: Mapping[str, KnownKey] = field(default_factory=dict)
    channels: Mapping[tuple[str, str], KnownChannel] = field(default_factory=dict)


class Book:
    """Authenticates and pins. `expires` is how many seconds without news its knowledge is good for."""

    def __init__(self, expires: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._expires, self._clock = expires, clock
        self._page = _Page()
        self._heard: float | None = None

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, revision) up to which nothing is missing."""
        return self._page.epoch, self._page.revision

    @property
    def age(self) -> float:
        """Seconds since the intervention service was last heard; infinite if never."""
        return float("inf") if self._heard is None else self._clock() - self._heard

    def apply(self, position: tuple[int, int], reset: bool, changes: Iterable[Known]) -> None:
        """Take in a message of the watch, whole. Without changes it says that nothing is missing."""
        page = _Page() if reset else self._page
        keys, channels = dict(page.keys), dict(page.channels)
        for change in changes:
            if isinstance(change, KnownKey):
                keys[change.principal.key] = change
            elif isinstance(change, KnownChannel):
                channels[change.tenant, change.channel] = change
        self._page = _Page(*position, keys, channels)
        self._heard = self._clock()

    def authenticate(self, presented: str) -> Principal:
        """Raises Unauthenticated, or Unavailable while nothing is known or what is known is too old."""
        self._check_age()
        key = ApiKey.parse(presented)
        known = self._page.keys.get(key.id)
        if known is None or known.revoked or not known.verifier.accepts(key.secret):
            raise Unauthenticated("UNKNOWN_KEY", "this API key is unknown or revoked")
        return known.principal

    def pin(self, tenant: str, channel: str) -> Pinned:
        """What a tenant's channel points at now. Raises NotFound if there is no such channel."""
        page = self._page
        known = page.channels.get((tenant, channel))
        if known is None:
            raise NotFound(
                "NO_SUCH_CHANNEL", f"tenants/{tenant}/channels/{channel} doesn't exist; activate a release on it"
            )
        return Pinned(tenant, channel, known.release, known.digest, page.epoch, page.revision)

    def _check_age(self) -> None:
        if self._heard is None:
            raise Unavailable(
                "STARTING", "the gateway hasn't reached the intervention service yet", retry_after=1.0
            )
        if self.age > self._expires:
            raise Unavailable(
                "STALE",
                f"no news from the intervention service for {self.age:.0f} s; the bound is {self._expires:.0f} s",
                retry_after=5.0,
            )
