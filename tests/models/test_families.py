"""The tests of test_kernels.py that compute, with the library of each family of processors.

Those of this machine's kind are loaded; ARM's is called in an emulator.
"""

from __future__ import annotations

import inspect
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from backpack_lm import processor
from backpack_lm.kernels import build, families, native, structs
from backpack_lm.kernels.families import Family

from tests.models import test_kernels
from tests.models.foreign import ForeignLibrary

for name, each in vars(test_kernels).items():
    computes = name.startswith("test_") and {"config", "dtype"} & {*inspect.signature(each).parameters}
    if computes or type(each).__name__ == "FixtureFunctionDefinition":
        globals()[name] = each

SYSTEM = Path("/usr/aarch64-linux-gnu")
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
(ARM,) = families.of_machine("aarch64")
V2 = Family("x86-64-v2", "x86_64", ("-march=x86-64-v2",), frozenset({"sse4_2"}))
"""What a processor without AVX2 compiles for itself."""
QUICK = {"avx2"}
"""The family that is always tested; test_processor.py compiles its library anyway."""


def _families() -> Iterator[object]:
    for family in (*families.FAMILIES, V2):
        yield pytest.param(family, id=family.name, marks=() if family.name in QUICK else pytest.mark.slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what is compiled for ARM is kept, and nothing prebuilt is found."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(params=_families(), autouse=True)
def library(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """What kernels are made of in a test: the library for a family of processors."""
    family: Family = request.param
    monkeypatch.setattr(build, "PREBUILT", folder)
    monkeypatch.setattr(processor, "onednn_packs_bfloat16", lambda: False)
    if family is ARM and platform.machine() != ARM.machine:
        opened = _emulated(folder, monkeypatch)
        monkeypatch.setattr(native, "library", lambda: opened)
        yield opened
        opened.close()
        return
    if family.machine != platform.machine() or not family.needs <= families.flags():
        pytest.skip(f"this processor doesn't run {family.name}")
    monkeypatch.setattr(build, "compiler_options", lambda: family.options)
    loaded = build.library.__wrapped__()
    monkeypatch.setattr(native, "library", lambda: loaded)
    yield loaded


def _emulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ForeignLibrary:
    """ARM's library as an image's build makes it, but by a cross compiler."""
    if not (shutil.which(CROSS) and shutil.which(EMULATOR)):
        pytest.skip(f"needs {CROSS} and {EMULATOR}: apt install g++-aarch64-linux-gnu qemu-user")
    caller = folder / "caller"
    if not caller.exists():
        source = Path(__file__).with_name("caller.cpp")
        subprocess.run(
            [CROSS, "-std=c++17", "-O1", "-Wall", "-Werror", str(source), "-o", str(caller), "-ldl"], check=True
        )
    with monkeypatch.context() as patch:
        patch.setattr(build.shutil, "which", lambda _: CROSS)
        made = build.compile_for(ARM)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # of the emulated process
    return ForeignLibrary([EMULATOR, "-L", str(SYSTEM), str(caller), str(made)], monkeypatch)


def test_structures_are_laid_out_alike(library: object) -> None:
    assert structs.reported_layouts(library).keys() == structs.LAYOUTS.keys()
    structs.check_layouts(library)
