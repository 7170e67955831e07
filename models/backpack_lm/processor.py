"""Detects the processor's vector instructions; the only file that does.

oneDNN's limit, ONEDNN_MAX_CPU_ISA, applies to our library too, so that a machine can stand in for an older one:
`ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2` hides AVX-512 from oneDNN, from our library, and from torch.
"""

from __future__ import annotations

import os

import torch

AVX2, AVX512, AVX512_BF16, AMX_BF16 = "avx2", "avx512", "avx512_bf16", "amx_bf16"

_NEEDED = {
    AVX2: ("avx2", "fma3"),
    AVX512: ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
    AVX512_BF16: ("avx512_bf16",),
    AMX_BF16: ("amx_tile", "amx_bf16"),
}
"""torch's capabilities that each of our names requires."""

_NOT_BEYOND = {
    **dict.fromkeys(("SSE41", "AVX"), ()),
    **dict.fromkeys(("AVX2", "AVX2_VNNI", "AVX2_VNNI_2"), (AVX2,)),
    **dict.fromkeys(("AVX512_CORE", "AVX512_CORE_VNNI"), (AVX2, AVX512)),
    **dict.fromkeys(("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"), (AVX2, AVX512, AVX512_BF16)),
}
"""The features that each value of ONEDNN_MAX_CPU_ISA allows. Unknown values are ignored, as by oneDNN."""


def features() -> tuple[str, ...]:
    """The features that this process may use, oldest first; empty on processors other than x86."""
    found = torch.cpu.get_capabilities()
    allowed = _NOT_BEYOND.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), tuple(_NEEDED))
    return tuple(name for name, needed in _NEEDED.items() if name in allowed and all(map(found.get, needed)))


def compiler_options() -> tuple[str, ...]:
    """Options that make a C++ compiler target the allowed features."""
    found, hidden = features(), "ONEDNN_MAX_CPU_ISA" in os.environ
    if not hidden or AVX512_BF16 in found or torch.cpu.get_capabilities().get("architecture") != "x86_64":
        return ("-march=native",)
    level = "x86-64-v4" if AVX512 in found else "x86-64-v3" if AVX2 in found else "x86-64-v2"
    return (f"-march={level}",)


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 is faster than float32 on this processor."""
    return AVX512_BF16 in features() or AMX_BF16 in features()


def onednn_packs_bfloat16() -> bool:
    """Whether oneDNN's packed bfloat16 products are available and faster than our library's (with AMX)."""
    return AMX_BF16 in features() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def described() -> str:
    """A description for logs."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"{' '.join(features()) or 'no AVX2'}; torch uses {torch.backends.cpu.get_cpu_capability()}" + (
        f"; ONEDNN_MAX_CPU_ISA={limit}" if limit else ""
    )
