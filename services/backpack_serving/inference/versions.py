"""Releases by digest: fetched from the intervention service, compiled once, kept while they are used."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from backpack_lm.overlay import Overlay, SenseTable
from backpack_lm.patch import Limits, ModelShape, Release, Revision

from backpack_serving.errors import DataLoss

Fetch = Callable[[str, str], Awaitable[list[bytes]]]
"""(tenant, digest) → the canonical bytes of the release's revisions."""


class Versions:
    """The least recently used compiled releases. A digest names its content, so nothing here is ever stale."""

    def __init__(self, table: SenseTable, shape: ModelShape, fetch: Fetch, capacity: int, limits: Limits) -> None:
        self._table, self._shape, self._fetch = table, shape, fetch
        self._capacity, self._limits = capacity, limits
        self._compiled: OrderedDict[str, asyncio.Task[Overlay]] = OrderedDict()

    @property
    def resident(self) -> int:
        return len(self._compiled)

    async def get(self, tenant: str, digest: str) -> Overlay:
        """The compiled release. Requests for one that is still being made share the work.

        Raises ServiceError or PatchError if it can't be had or doesn't fit the model: never another release.
        """
        if digest not in self._compiled:
            self._compiled[digest] = asyncio.create_task(self._make(tenant, digest))
            while len(self._compiled) > self._capacity:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(digest)
        task = self._compiled[digest]
        try:
            # One caller going away must not cancel the work that others wait for.
            return await asyncio.shield(task)
        except Exception:
            if self._compiled.get(digest) is task:
                del self._compiled[digest]
            raise

    async def _make(self, tenant: str, digest: str) -> Overlay:
        blobs = await self._fetch(tenant, digest)
        release = Release(tuple(Revision.from_bytes(blob) for blob in blobs))
        if release.digest != digest:
            raise DataLoss(
                "WRONG_DIGEST",
                f"asked for release {digest}, got the bytes of {release.digest}",
                wanted=digest,
                got=release.digest,
            )
        release.validate(self._shape, self._limits)
        return await asyncio.to_thread(Overlay.compile, release, self._table)
