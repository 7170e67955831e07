"""Ending tasks, surely."""

from __future__ import annotations

import asyncio
from typing import Any


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until they have ended, and forget what they raise.

    Once isn't enough: `asyncio.wait_for` of Python 3.11 loses a cancellation that comes together with its result.
    """
    while waiting := [task for task in tasks if not task.done()]:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=1)
    await asyncio.gather(*tasks, return_exceptions=True)
