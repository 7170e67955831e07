"""Compile Triton's kernels to machine code for GPUs, without one, at the size of Backpack-Small.

One line for each kernel, dtype and architecture: registers a thread, bytes that spill out of them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from backpack_lm.config import SMALL
from backpack_lm.kernels import triton_attention, triton_draw, triton_mix
from backpack_lm.kernels.caches import LANES, PAGE
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = {"A100": 80, "H100": 90}
CONSTANTS = {
    "CONTEXT": SMALL.n_positions,
    "PAGES": SMALL.n_positions // PAGE,
    "SIZE": PAGE,
    "SENSES": SMALL.num_senses,
    "HEADS": SMALL.trunk.layer.heads,
    "GROUPS": SMALL.trunk.layer.kv_heads,
    "HEAD": SMALL.sense_head_width,
    "HEAD_UP": triton.next_power_of_2(SMALL.sense_head_width),
    "TILE": LANES,
    "BLOCK": triton_mix.BLOCK,
    "AT_ONCE": triton_mix.AT_ONCE,
    "SPAN": triton_mix.SPAN,
    "COUNT": SMALL.tokens,
    "TRUNCATED": True,
    "COUNTERS": triton_draw.COUNTERS,
}
OF_THE_MIX = {"WIDTH": SMALL.n_embd, "WIDTH_UP": triton.next_power_of_2(SMALL.n_embd)}
OF_ATTENTION = {"WIDTH": SMALL.n_embd // SMALL.trunk.layer.heads, "WIDTH_UP": SMALL.n_embd // SMALL.trunk.layer.heads}
TYPES = {
    **dict.fromkeys(("ids", "rows", "page_table"), "*i32"),
    **dict.fromkeys(("predictions", "spans"), "*i64"),
    **dict.fromkeys(("annealed_sum", "scores", "norms", "parts"), "*fp32"),
    **dict.fromkeys(("logits", "temperatures"), "*fp32"),
    **dict.fromkeys(("noise_keys", "chosen"), "*i64"),
    "kept": "*i1",
    "scale": "fp32",
}
KERNELS: list[tuple[Any, dict[str, int], str, int]] = [
    (triton_attention.attend, OF_ATTENTION, "", 4),
    (triton_mix.weigh, OF_THE_MIX, "", 4),
    (triton_mix.mix, OF_THE_MIX, "", triton_mix.warps(SMALL.n_embd)),
    (triton_mix.total, OF_THE_MIX, "*fp32", 4),
    (triton_draw.choose, {}, "", 8),
]


def compiled(kernel: Any, sizes: dict[str, int], out: str, warps: int, kind: str, architecture: int) -> bytes:
    constants = {name: value for name, value in {**CONSTANTS, **sizes}.items() if name in kernel.arg_names}
    types = {**TYPES, "out": out or f"*{kind}"}
    signature = {n: "constexpr" if n in constants else types.get(n, f"*{kind}") for n in kernel.arg_names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    return bytes(made.asm["cubin"])


def resources(code: bytes) -> str:
    """What the assembler says of a kernel, read from its code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout + said.stderr))
    return f"registers {used['REG']}, spills {int(used['STACK']) + int(used['LOCAL'])}"


if __name__ == "__main__":
    for kernel, sizes, out, warps in KERNELS:
        for kind in ("fp32", "bf16"):
            for name, architecture in ARCHITECTURES.items():
                code = compiled(kernel, sizes, out, warps, kind, architecture)
                print(f"{kernel.__name__} {kind} {name}: {resources(code)}")
