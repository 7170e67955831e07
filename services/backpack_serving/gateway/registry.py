"""Authenticates callers and pins their requests to releases, from the sync client's view and without a call.

The view is immutable; an update replaces it as a whole, so a request sees one state of the store.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Set
from dataclasses import dataclass

from backpack_serving.auth.keys import ApiKeySecret, Principal, suspended, unknown_key
from backpack_serving.errors import NotFound, Unavailable, no_canary
from backpack_serving.references import CANARY, Pin, ReleaseRef
from backpack_serving.sync.client import SyncClient
from backpack_serving.sync.state import StateView


class TenantRegistry:
    """Tenants, keys and channels, as the gateway last received them.

    After `expires` seconds without news, only the tenants in `serve_expired` ("*": all) are still served.
    """

    def __init__(
        self,
        sync_client: SyncClient,
        expires: float,
        serve_expired: Set[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sync_client, self._expires, self._serve_expired, self._clock = sync_client, expires, serve_expired, clock

    @property
    def age(self) -> float:
        """Seconds since the view was last known to be complete; infinite if it never was."""
        return self._sync_client.age(self._clock())

    @property
    def usable(self) -> bool:
        """Whether at least some tenants can be served."""
        return self.age <= self._expires or (self.age < float("inf") and bool(self._serve_expired))

    def authenticate(self, presented: str) -> Principal:
        """The principal of an API key. Raises Unauthenticated, or Unavailable if there is no recent enough view."""
        self._check_started()
        key = ApiKeySecret.parse(presented)
        state = self._sync_client.view.keys.get(key.id)
        if state is None or state.revoked or not state.verifier.accepts(key.secret):
            raise unknown_key()
        self.check(state.principal.tenant)
        return state.principal

    def check(self, tenant: str) -> None:
        """Raise Unauthenticated if a tenant is suspended, Unavailable if the view is too old to serve it."""
        self._check_started()
        age, owner = self.age, self._sync_client.view.tenants.get(tenant)
        if owner and owner.suspended:
            raise suspended(tenant)
        if age > self._expires and not self._serve_expired & {tenant, "*"}:
            raise Unavailable(
                "STALE",
                f"no news from the intervention service for {age:.0f} s; the bound is {self._expires:.0f} s",
                retry_after=5.0,
            )

    def _check_started(self) -> None:
        if self.age == float("inf"):
            raise Unavailable("STARTING", "the gateway hasn't reached the intervention service yet", retry_after=1.0)

    @property
    def contact(self) -> str:
        """For how long the intervention service has been silent, and the last error if there was one."""
        why = f" ({self._sync_client.last_error})" if self._sync_client.last_error else ""
        since = "yet" if self.age == float("inf") else f"for {self.age:.0f} s"
        return f"no news from the intervention service {since}{why}"

    def snapshot(self) -> RegistrySnapshot:
        """The current view. Releases that are pinned from one snapshot belong to one state of the store."""
        return RegistrySnapshot(self._sync_client.view, self.age)


@dataclass(frozen=True, slots=True)
class RegistrySnapshot:
    """The view at one moment, and how many seconds old it was."""

    view: StateView
    age: float

    def channel(self, tenant: str, channel: str, request_key: str = "") -> Pin:
        """Pin to a channel's release; under a canary, `request_key` chooses, and NAME:canary is the canary's alone.

        Raises NotFound without such a channel, PreconditionFailed without a canary where one is named.
        """
        name = channel.removesuffix(CANARY)
        state = self.view.channels.get((tenant, name))
        if state is None:
            raise NotFound(
                "NO_SUCH_CHANNEL", f"tenants/{tenant}/channels/{name} doesn't exist; activate a release on it"
            )
        if name != channel:
            if state.canary is None:
                raise no_canary(f"tenants/{tenant}/channels/{name}")
            return self.release(tenant, state.canary.release, name, canary=True)
        release = state.choose(request_key or secrets.token_hex(8)) if state.canary else state.stable
        return self.release(tenant, release, channel, release is not state.stable)

    def release(self, tenant: str, release: ReleaseRef, channel: str = "", canary: bool = False) -> Pin:
        at = self.view.position
        return Pin(tenant, channel, release.number, release.digest, at.epoch, at.revision, canary, self.age)
