"""A release's topics as compiled kernels read them."""

from __future__ import annotations

import numpy as np

from backpack_lm.kernels.structs import TOPIC
from backpack_lm.overlay import TopicMultipliers


def describe(topic: TopicMultipliers) -> bytes:
    """A topic as `TOPIC`. The topic must live as long as its description, which contains an address of it."""
    return np.array((topic.levels.data_ptr(), topic.multipliers.tolist(), topic.scale, topic.annealed), TOPIC).tobytes()
