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

starting.WHOLE_PASS_SECONDS = {seconds}
starting.keep_heap_frozen()
at_start = gc.get_freeze_count()
some = [Cycle() for _ in range(500)]
one = weakref.ref(some[0])
gc.collect()
if {seconds}:
    assert gc.get_freeze_count() >= at_start + 500, "what survived a pass is seen again"
del some
gc.collect()
print("freed" if one() is None else "kept")
"""


def _freed(seconds: float) -> str:
    command = [sys.executable, "-c", STORY.format(seconds=seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    return done.stdout.strip()


def test_what_has_survived_a_pass_is_out_of_the_collectors_sight_until_one_over_everything() -> None:
    assert _freed(600.0) == "kept"
    assert _freed(0.0) == "freed"
