"""Whose turn it is, of work that is done one at a time: tenants take turns, however much each has waiting."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairLock:
    """A lock that goes from tenant to tenant, and within one to who came first."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order in which they have turns

    @asynccontextmanager
    async def acquire(self, tenant: str) -> AsyncIterator[None]:
        if self._taken:
            given = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(tenant, deque()).append(given)
            try:
                await given
            except asyncio.CancelledError:
                if not given.cancelled():
                    self._wake_next()
                raise
        self._taken = True
        try:
            yield
        finally:
            self._wake_next()

    def _wake_next(self) -> None:
        """Let the next one begin, of those that haven't left."""
        self._taken = False
        while self._waiting and not self._taken:
            tenant = next(iter(self._waiting))
            queue = self._waiting.pop(tenant)
            given = queue.popleft()
            if queue:
                self._waiting[tenant] = queue
            if not given.done():
                given.set_result(None)
                self._taken = True
