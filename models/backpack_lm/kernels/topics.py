"""A release's topics as compiled kernels read them."""

from __future__ import annotations

import numpy as np

from backpack_lm.overlay import TopicMultipliers

TOPIC = np.dtype([("levels", "u8"), ("multipliers", "f4", 4), ("scale", "f4"), ("annealed", "i4")])
"""What cpp/mix.h and triton_mix.py read. `levels` is an address in the memory of the topic's device."""


def describe(topic: TopicMultipliers) -> bytes:
    """A topic as `TOPIC`. It has to outlive its description, which holds an address."""
    return np.array((topic.levels.data_ptr(), topic.multipliers.tolist(), topic.scale, topic.annealed), TOPIC).tobytes()
