"""Bounds how much work of many tasks runs in one turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque


class Turnstile:
    """Lets at most `width` units of work begin in one turn of the loop, first come, first served.

    When a thousand tasks are woken at once, all of them run in one turn, and nothing else of the process moves
    meanwhile. A task that enters here before each unit of its work waits for its turn instead.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turning = False

    async def enter(self) -> None:
        """Wait until a unit of work may begin."""
        loop = asyncio.get_running_loop()
        passed: asyncio.Future[None] = loop.create_future()
        self._waiting.append(passed)
        if not self._turning:
            self._turning = True
            loop.call_soon(self._let_pass, loop)
        await passed

    def _let_pass(self, loop: asyncio.AbstractEventLoop) -> None:
        """What is let pass here runs in the next turn, and nothing else that waits does."""
        passed = 0
        while self._waiting and passed < self._width:
            waiting = self._waiting.popleft()
            if not waiting.done():  # nobody waits any more
                waiting.set_result(None)
                passed += 1
        self._turning = bool(passed)
        if passed:
            loop.call_soon(self._let_pass, loop)
