"""What the servicers share: who is calling a service that blocks, and a bell that wakes who waits."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from backpack_lm.tokenizer import Tokenizer

from backpack_serving import rpc
from backpack_serving.auth.identity import Identities
from backpack_serving.auth.keys import Principal
from backpack_serving.interventions.service import Interventions


class WriteNotifier:
    """Wakes who waits for the next write. It may be rung from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._next = asyncio.Event()

    def ring(self) -> None:
        self._loop.call_soon_threadsafe(self.ring_here)

    def next(self) -> asyncio.Event:
        """Set at the next ring: take it before looking, wait for it after."""
        return self._next

    def ring_here(self) -> None:
        """The same, from the loop itself: at once."""
        rung, self._next = self._next, asyncio.Event()
        rung.set()


class Caller:
    """A service that blocks, called from an event loop, for who is calling."""

    def __init__(self, service: Interventions, tokenizer: Tokenizer, identities: Identities) -> None:
        self.service, self.tokenizer, self._identities = service, tokenizer, identities

    async def who(self, context: rpc.Context) -> Principal:
        return await self._identities.who(context)


async def wait(event: asyncio.Event, seconds: float) -> None:
    """Until the event, at most so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
