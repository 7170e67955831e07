"""What a process does with its collector once it serves: passes don't go through what stays, and cycles are freed."""

from __future__ import annotations

import subprocess
import sys

STORY = """
import gc, weakref
from backpack_serving import starting

class Cycle:
    def __init__(self):
        self.me = self

starting.GROWTH = 1000
starting.settle_heap()
starting.settle_heap()
assert len(gc.callbacks) == 1
at_start = gc.get_freeze_count()

some = [Cycle() for _ in range(500)]
gc.collect()
assert gc.get_freeze_count() >= at_start + 500, "what survived a full pass is seen again"
one = weakref.ref(some[0])
del some
gc.collect()
assert one() is not None, "cycles that are out of sight are freed when there are many"

many = [Cycle() for _ in range(2 * at_start)]
gc.collect()  # now as many were added that the next pass sees all
del many
gc.collect()
assert one() is None
assert gc.get_freeze_count() < at_start + 1000
print("freed")
"""


def test_what_stays_is_out_of_the_collectors_sight_and_many_cycles_are_freed() -> None:
    done = subprocess.run([sys.executable, "-c", STORY], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "freed\n", done.stderr
