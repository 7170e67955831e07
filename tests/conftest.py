"""What holds for all tests."""

from __future__ import annotations

import os

# Compared token by token with the reference model, which is float32; what bfloat16 does has tests of its own.
os.environ.setdefault("BACKPACK_PRECISION", "float32")
