"""How long an event loop is held, measured in its own process by a task that asks for a turn every five milliseconds.

While a loop is held, no stream of the process moves. On a machine that others use, the wall clock also counts the time
when they had the cores. So two more clocks are read: the CPU time of the whole process during a hold, its other threads
included, which may have had Python's lock; and the CPU time of the loop's thread alone.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

ASKS_EVERY = 0.005
HOLD = 0.05
"""Seconds from which on a loop counts as held."""


@dataclass
class LoopHolds:
    """In seconds, and how often a loop was held for longer than HOLD. `asked` is how often the watcher got a turn.

    `longest` is by the wall clock. `longest_process` is the most that a hold can have taken without other processes:
    its wall time or the process's CPU time during it, whichever is shorter.
    """

    asked: int = 0
    longest: float = 0.0
    longest_process: float = 0.0
    longest_cpu: float = 0.0
    held: int = 0
    held_process: int = 0
    held_cpu: int = 0

    def add(self, wall: float, process: float, cpu: float) -> None:
        self.asked += 1
        process = min(wall, process)
        self.longest, self.longest_cpu = max(self.longest, wall), max(self.longest_cpu, cpu)
        self.longest_process = max(self.longest_process, process)
        self.held += wall > HOLD
        self.held_process += process > HOLD
        self.held_cpu += cpu > HOLD


class LoopWatcher:
    """Watches the running loop until it ends."""

    def __init__(self) -> None:
        self._seen = LoopHolds()
        self._task = asyncio.create_task(self._watch())

    def take(self) -> LoopHolds:
        """What was seen since the last call."""
        taken, self._seen = self._seen, LoopHolds()
        return taken

    async def _watch(self) -> None:
        while True:
            wall, process, cpu = time.perf_counter(), time.process_time(), time.thread_time()
            await asyncio.sleep(ASKS_EVERY)
            waited = time.perf_counter() - wall - ASKS_EVERY
            self._seen.add(waited, time.process_time() - process, time.thread_time() - cpu)
