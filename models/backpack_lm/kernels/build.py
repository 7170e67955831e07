"""Compile cpp/ for this machine, once; later processes find the library by what it was made from.

Where an image's build has compiled it for this processor's family (`prebuilt`), nothing is compiled here.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from backpack_lm.cache import folder
from backpack_lm.kernels.families import Family, fitting, flags_line
from backpack_lm.kernels.structs import check_layouts
from backpack_lm.processor import compiler_options

SOURCES = Path(__file__).with_name("cpp")
PREBUILT = Path(__file__).with_name("prebuilt")
"""Where an image's build leaves libraries: in the package, where nobody writes afterwards."""
OPTIONS = (
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-schedule-insns",  # on ARM, where it is done by default, it loads too far ahead and sums leave the registers
)
_CHECKSUM = hashlib.sha256().digest_size
"""Bytes at the end of a library's file."""


class NotBuilt(Exception):
    """There is no library for this machine and no way to make it; the plain kernels do the same, slower."""


@cache
def library() -> ctypes.CDLL:
    """The compiled library. Raises NotBuilt if it can't be had, LayoutMismatch if its structures aren't ours."""
    try:
        file = _prebuilt() or _path()
        if not _whole(file):
            _compile_library(file, compiler_options())
        # Loaded, it shares torch's OpenMP threads: its libgomp is here already.
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        raise NotBuilt(f"the library can't be kept or loaded: {error}") from None
    check_layouts(loaded)
    return loaded


def compile_for(family: Family) -> Path:
    """Compile the library for a family of processors, for all who run this installation. Raises NotBuilt."""
    try:
        PREBUILT.mkdir(exist_ok=True)
        file = PREBUILT / _name(family.name, *family.options)
        if not _whole(file):
            _compile_library(file, family.options)
    except OSError as error:
        raise NotBuilt(f"the library can't be kept: {error}") from None
    return file


def _prebuilt() -> Path | None:
    """The library that `compile_for` made for the newest family that this processor belongs to."""
    files = (PREBUILT / _name(family.name, *family.options) for family in fitting())
    return next((file for file in files if _whole(file)), None)


def _path() -> Path:
    """The file's name depends on sources, options and processor, so another machine's library is never loaded."""
    processor = flags_line() or platform.processor()
    return folder("kernels") / _name("native", *compiler_options(), platform.machine(), processor)


def _name(kind: str, *made_for: str) -> str:
    sources = [file.read_text("utf-8") for file in sorted(SOURCES.iterdir())]
    made_from = [*sources, *OPTIONS, *made_for, torch.__version__]
    return f"{kind}-{hashlib.sha256(chr(0).join(made_from).encode()).hexdigest()[:16]}.so"


def _whole(file: Path) -> bool:
    """Whether the file is exactly what `_compile_library` wrote. Loading a damaged one may kill the process."""
    with suppress(FileNotFoundError):
        data = file.read_bytes()
        return _checksum(data[:-_CHECKSUM]) == data[-_CHECKSUM:]
    return False


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _compile_library(file: Path, processor: tuple[str, ...]) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise NotBuilt("no C++ compiler; install g++ for the fast CPU kernels")
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch) / file.name
        options = *OPTIONS, *processor, str(SOURCES / "exports.cpp"), "-o", str(made)
        done = subprocess.run([compiler, *options], capture_output=True, text=True)
        if done.returncode:
            raise NotBuilt(f"{compiler} failed: {done.stderr.strip()[-2000:]}")
        with made.open("rb+") as written:
            written.write(_checksum(written.read()))  # behind all that is loaded
            written.flush()
            os.fsync(written.fileno())  # or a power cut may leave the name with nothing behind it
        made.replace(file)  # at once whole: another process may be looking
