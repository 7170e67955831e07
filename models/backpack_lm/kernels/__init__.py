"""The operations that the engine needs, and their implementations on each processor.

`plain` says in torch what each operation means, on any device; `native` does it on a CPU with a compiled library,
`cuda` on a CUDA device with Triton. All of them work on the same `Caches`, and tests hold them equal.
"""

from backpack_lm.kernels.caches import Caches, DrawParams, MixSpan, StepInput, TokenSpan
from backpack_lm.kernels.choice import Device, Precision, choose
from backpack_lm.kernels.interface import Kernels

__all__ = ["Caches", "Device", "DrawParams", "Kernels", "MixSpan", "Precision", "StepInput", "TokenSpan", "choose"]
