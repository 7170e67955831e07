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

starting.WHOLE_PASS_SECONDS, starting.WHOLE_PASS_GROWTH = {seconds}, {growth}
starting.keep_heap_frozen()
at_start = gc.get_freeze_count()
young = Cycle()
one_young = weakref.ref(young)
del young
gc.collect(0)
assert one_young() is None, "a cycle of a moment is freed at once"
some = [Cycle() for _ in range(500)]
one = weakref.ref(some[0])
gc.collect(1)  # the second youngest
if {seconds}:
    assert gc.get_freeze_count() >= at_start + 500, "what survived a pass is seen again"
del some
for _ in range(2):
    gc.collect(1)
    gc.collect()
print("freed" if one() is None else "kept")
assert gc.get_freeze_count() >= at_start, "after a pass over everything the rest is out of sight again"
"""


LARGE = """
import gc, weakref
from backpack_serving import starting

class Cycle:
    def __init__(self):
        self.me, self.content = self, bytes(4 << 20)

starting.WHOLE_PASS_SECONDS = 0.0
starting.keep_heap_frozen()
some = [Cycle() for _ in range(60)]
for cycle in some:
    cycle.content = cycle.content.replace(b"\\0", b"1")  # or no memory would be taken for it
one = weakref.ref(some[0])
gc.collect(1)
del some, cycle
for _ in range(2):
    gc.collect(1)
    gc.collect()
print("freed" if one() is None else "kept")
"""


def _freed(seconds: float, growth: float) -> str:
    return _printed(STORY.format(seconds=seconds, growth=growth))


def _printed(story: str) -> str:
    command = [sys.executable, "-c", story]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    return done.stdout.strip()


def test_what_has_survived_a_pass_is_out_of_the_collectors_sight_until_one_over_everything() -> None:
    assert _freed(600.0, 1.0) == "kept"
    assert _freed(0.0, 1.0) == "freed"


def test_a_heap_that_has_not_grown_is_never_gone_over_as_a_whole() -> None:
    assert _freed(0.0, 1.5) == "kept"


def test_cycles_that_hold_much_memory_are_freed_however_few_they_are() -> None:
    assert _printed(LARGE) == "freed"
