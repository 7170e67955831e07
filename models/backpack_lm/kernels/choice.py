"""Choose the device, the kernels and the dtype: the fastest that this machine has."""

from __future__ import annotations

import logging
from enum import StrEnum

import torch

from backpack_lm import processor
from backpack_lm.config import BackpackConfig, StoredSenses
from backpack_lm.kernels.build import NotBuilt
from backpack_lm.kernels.caches import Caches
from backpack_lm.kernels.interface import Kernels
from backpack_lm.kernels.plain import PlainKernels

log = logging.getLogger(__name__)


class Device(StrEnum):
    """Where a replica computes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"

    def torch(self) -> torch.device:
        """What it means on this machine: `auto` is CUDA where torch finds a device. Raises ValueError if there is
        none and it was asked for."""
        found = torch.cuda.is_available()
        if self is Device.CUDA and not found:
            raise ValueError(
                f"device is cuda, but torch {torch.__version__} finds no CUDA device; use cpu or auto, or install "
                "a driver and a torch that is built for it"
            )
        return torch.device("cuda" if found and self is not Device.CPU else "cpu")


class Precision(StrEnum):
    """Of weights and sense vectors, and of caches but for int8; sums are float32 in all."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"

    def serving(self, config: BackpackConfig, device: str) -> torch.dtype:
        """What a model is served in: for `auto` on a CPU int8 if that is how the model keeps its senses, which wider
        ones wouldn't make more exact. Raises ValueError as `dtype`."""
        kept_in_int8 = config.senses is StoredSenses.INT8 and device == "cpu"
        return (Precision.INT8 if self is Precision.AUTO and kept_in_int8 else self).dtype(device)

    def dtype(self, device: str = "cpu") -> torch.dtype:
        """What it means on a device: `auto` is bfloat16 where the processor multiplies it. Raises ValueError for int8
        on CUDA."""
        if self is Precision.INT8 and device == "cuda":
            raise ValueError("precision is int8, which is computed on a CPU only; use bfloat16, or device cpu")
        if self is not Precision.AUTO:
            fixed: torch.dtype = getattr(torch, self.value)
            return fixed
        if device == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)  # from Ampere on
        else:
            fast = processor.multiplies_bfloat16()
        return torch.bfloat16 if fast else torch.float32


def choose(caches: Caches) -> Kernels:
    """The fastest kernels for the caches' device."""
    from backpack_lm.kernels.cuda import CudaKernels
    from backpack_lm.kernels.native import NativeKernels

    rounds = caches.table.dtype is torch.bfloat16
    if rounds and Precision.AUTO.dtype(caches.table.device.type) is not torch.bfloat16:
        log.warning("bfloat16 isn't multiplied here but by way of float32: BACKPACK_PRECISION=float32 is faster")
    try:
        return CudaKernels(caches) if caches.table.is_cuda else NativeKernels(caches)
    except NotBuilt as error:
        log.warning("computing with torch's operations, which is slower: %s", error)
        return PlainKernels(caches)
