"""Families of processors that an image's build compiles the library for, and which of them this one is of."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

_V3 = frozenset("avx avx2 bmi1 bmi2 f16c fma abm movbe xsave".split())
_V4 = _V3 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())


@dataclass(frozen=True)
class Family:
    """What a compiler is told, and what a processor has to have, in /proc/cpuinfo's words."""

    name: str
    machine: str
    options: tuple[str, ...]
    needs: frozenset[str]


FAMILIES = (
    Family(
        "avx512-bf16",
        "x86_64",
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
        _V4 | {"avx512_bf16", "avx512_vnni"},
    ),
    Family("avx512", "x86_64", ("-march=x86-64-v4",), _V4),
    Family("avx2", "x86_64", ("-march=x86-64-v3",), _V3),
    Family("armv8", "aarch64", ("-march=armv8-a",), frozenset({"asimd"})),
)
"""The newest first: a processor takes the first that it has all of."""


def of_machine(machine: str | None = None) -> list[Family]:
    """Those that a compiler of this machine makes, as `platform.machine()` names it."""
    return [family for family in FAMILIES if family.machine == (machine or platform.machine())]


def fitting() -> list[Family]:
    """Those that this processor runs, the newest first; none where oneDNN is told to hide some of it."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        return []
    found = flags()
    return [family for family in of_machine() if family.needs <= found]


def flags() -> frozenset[str]:
    """What the processor has, by /proc/cpuinfo: nothing where there is none."""
    return frozenset(flags_line().partition(":")[2].split())


def flags_line() -> str:
    """The first line of /proc/cpuinfo that lists what a processor has; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
