"""Resolves the releases of a request: its channel's, or those that it names, all from one registry snapshot."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from backpack_proto.v1 import sync_pb2, sync_pb2_grpc

from backpack_serving import rpc
from backpack_serving.errors import INTERNAL_CALL_ERRORS, Unavailable
from backpack_serving.gateway.registry import RegistrySnapshot, TenantRegistry
from backpack_serving.gateway.wire import read_resolved
from backpack_serving.references import Pin, Position, ReleaseRef

Resolve = Callable[[str, Sequence[int]], Awaitable[tuple[Position, list[ReleaseRef]]]]
"""(tenant, numbers) → the store's position, and the releases with these numbers. Raises ServiceError."""

WaitUntil = Callable[[Position], Awaitable[None]]
"""Waits a bounded time until the gateway has applied a position of the store. Raises Unavailable if it is still
behind, PreconditionFailed if the store itself hasn't reached the position.
"""

CACHED_RELEASES = 65_536
RESOLVE_SECONDS = 5.0


class ReleaseResolver:
    """Pins requests to releases. `since` is a minimum store position: the gateway first waits until it has seen it.

    A release never changes, so the digest of a tenant's number is fetched once and cached. The cache is keyed by
    epoch, because a restore from backup may give a number to another release.
    """

    def __init__(
        self, registry: TenantRegistry, resolve: Resolve, wait_until: WaitUntil, cached: int = CACHED_RELEASES
    ) -> None:
        self._registry, self._resolve, self._wait_until, self._cached = registry, resolve, wait_until, cached
        self._digests: OrderedDict[tuple[int, str, int], str] = OrderedDict()  # least recently used first

    async def channel(self, tenant: str, channel: str, request_key: str = "", since: Position | None = None) -> Pin:
        """Pin to a channel's release. Raises NotFound if there is no such channel, and as `WaitUntil` does."""
        if since:
            await self._wait_until(since)
        return self._registry.snapshot().channel(tenant, channel, request_key)

    async def pin(
        self, tenant: str, choices: Sequence[int | str], request_key: str = "", since: Position | None = None
    ) -> list[Pin]:
        """Pin to releases, each given by number or by channel, in this order.

        Raises NotFound for one that doesn't exist, Unavailable if an uncached number can't be resolved because the
        intervention service is away, and as `WaitUntil` does.
        """
        if since:
            await self._wait_until(since)
        snapshot, key = self._registry.snapshot(), request_key or secrets.token_hex(8)
        channels = {name: snapshot.channel(tenant, name, key) for name in choices if isinstance(name, str)}
        numbers = await self._wanted_numbers(
            snapshot, tenant, [number for number in choices if isinstance(number, int)]
        )
        return [
            channels[choice] if isinstance(choice, str) else snapshot.release(tenant, numbers[choice])
            for choice in choices
        ]

    async def _wanted_numbers(
        self, snapshot: RegistrySnapshot, tenant: str, numbers: Sequence[int]
    ) -> dict[int, ReleaseRef]:
        epoch, found = snapshot.view.position.epoch, _releases_of_channels(snapshot, tenant)
        for number in numbers:
            if digest := self._digests.get((epoch, tenant, number)):
                self._digests.move_to_end((epoch, tenant, number))
                found[number] = ReleaseRef(number, digest)
        if missing := [number for number in numbers if number not in found]:
            position, answered = await self._resolve(tenant, missing)
            if position.epoch != epoch:
                raise Unavailable(
                    "BEHIND",
                    f"the store is at {position}, this gateway knows it up to {snapshot.view.position}",
                    retry_after=0.5,
                )
            for ref in answered:
                found[ref.number] = ref
                self._digests[epoch, tenant, ref.number] = ref.digest
            while len(self._digests) > self._cached:
                self._digests.popitem(last=False)
        return found


def _releases_of_channels(snapshot: RegistrySnapshot, tenant: str) -> dict[int, ReleaseRef]:
    """A tenant's releases that the snapshot contains: those of its channels, and its newest one."""
    refs = [
        ref
        for channel in snapshot.view.channels.values()
        if channel.tenant == tenant
        for ref in (*channel.serving, *channel.earlier)
    ]
    if fresh := snapshot.view.fresh.get(tenant):
        refs.append(fresh.release)
    return {ref.number: ref for ref in refs}


def resolve_from(control: Any, key: str) -> Resolve:
    """Resolve numbers by calling the intervention service."""
    stub = sync_pb2_grpc.SyncServiceStub(control)

    async def resolve(tenant: str, numbers: Sequence[int]) -> tuple[Position, list[ReleaseRef]]:
        request = sync_pb2.ResolveReleasesRequest(tenant=tenant, numbers=numbers)
        try:
            with rpc.errors():
                answer = await stub.ResolveReleases(request, metadata=rpc.with_key(key), timeout=RESOLVE_SECONDS)
        except INTERNAL_CALL_ERRORS as error:
            message = "releases of other numbers than channels are at can't be asked for now; try again shortly"
            raise Unavailable("NOT_RESOLVED", message, retry_after=1.0, why=error.message) from None
        return read_resolved(answer)

    return resolve
