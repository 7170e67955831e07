"""What the processor has, as far as it may be used: the one place that asks.

oneDNN's own limit, ONEDNN_MAX_CPU_ISA, holds for our library too. So any machine can be tried out as a lesser one:
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
"""Our names for what torch has several for."""

_NOT_BEYOND = {
    **dict.fromkeys(("SSE41", "AVX"), ()),
    **dict.fromkeys(("AVX2", "AVX2_VNNI", "AVX2_VNNI_2"), (AVX2,)),
    **dict.fromkeys(("AVX512_CORE", "AVX512_CORE_VNNI"), (AVX2, AVX512)),
    **dict.fromkeys(("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"), (AVX2, AVX512, AVX512_BF16)),
}
"""What values of ONEDNN_MAX_CPU_ISA leave. oneDNN ignores values that it doesn't know, as we do."""


def features() -> tuple[str, ...]:
    """Those of our names that this process may use, the oldest first; none on a processor that isn't x86."""
    found = torch.cpu.get_capabilities()
    allowed = _NOT_BEYOND.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), tuple(_NEEDED))
    return tuple(name for name, needed in _NEEDED.items() if name in allowed and all(map(found.get, needed)))


def compiler_options() -> tuple[str, ...]:
    """What tells a C++ compiler for this machine what it may use."""
    found, hidden = features(), "ONEDNN_MAX_CPU_ISA" in os.environ
    if not hidden or AVX512_BF16 in found or torch.cpu.get_capabilities().get("architecture") != "x86_64":
        return ("-march=native",)
    level = "x86-64-v4" if AVX512 in found else "x86-64-v3" if AVX2 in found else "x86-64-v2"
    return (f"-march={level}",)


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 is the faster precision here."""
    return AVX512_BF16 in features() or AMX_BF16 in features()


def onednn_packs_bfloat16() -> bool:
    """Whether oneDNN has packed products of bfloat16 here that are faster than our library's: those with AMX."""
    return AMX_BF16 in features() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def described() -> str:
    """For logs."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"{' '.join(features()) or 'no AVX2'}; torch uses {torch.backends.cpu.get_cpu_capability()}" + (
        f"; ONEDNN_MAX_CPU_ISA={limit}" if limit else ""
    )
