"""What holds for all tests."""

from __future__ import annotations

import os

import torch

# Compared token by token with the reference model, which is float32; what bfloat16 does has tests of its own.
os.environ.setdefault("BACKPACK_PRECISION", "float32")
# Read when Triton is imported, whoever does that first. Where there is no GPU, its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
