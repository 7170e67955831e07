"""What the engine asks of a processor: one function per operation, and who carries it out.

`plain` says in torch what each operation means, on any device; `native` does it on a CPU with a compiled library,
`triton` the sense mix on a CUDA device. All of them work on the same `Caches`, and tests hold them equal.
"""

from backpack_lm.kernels.caches import Caches, Prediction, Run
from backpack_lm.kernels.choice import Precision, choose
from backpack_lm.kernels.seam import Kernels, Linear

__all__ = ["Caches", "Kernels", "Linear", "Precision", "Prediction", "Run", "choose"]
