"""Every precision computes on every processor, and what this one has is asked in one place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backpack_lm import processor
from backpack_lm.kernels import Precision, build

ROOT = Path(__file__).parents[2]
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
X86 = torch.cpu.get_capabilities().get("architecture") == "x86_64"


@pytest.fixture
def having(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What torch says that the processor has: all that we know of, until a test says otherwise."""
    found: dict[str, object] = dict.fromkeys((name for names in processor._NEEDED.values() for name in names), True)
    found["architecture"] = "x86_64"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    return found


LIMITS = [
    ("", "avx2 avx512 avx512_bf16 amx_bf16", "native"),
    ("AVX512_CORE_BF16", "avx2 avx512 avx512_bf16", "native"),
    ("avx512_core", "avx2 avx512", "x86-64-v4"),
    ("AVX2_VNNI", "avx2", "x86-64-v3"),
    ("SSE41", "", "x86-64-v2"),
    ("of the year 2040", "avx2 avx512 avx512_bf16 amx_bf16", "native"),
]


@pytest.mark.parametrize(("limit", "features", "march"), LIMITS)
def test_what_is_hidden_from_onednn_is_hidden_from_our_compiler(
    having: dict[str, object], monkeypatch: pytest.MonkeyPatch, limit: str, features: str, march: str
) -> None:
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert " ".join(processor.features()) == features
    assert processor.compiler_options() == (f"-march={march}",)


def test_auto_is_bfloat16_where_the_processor_multiplies_it(
    having: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Precision.AUTO.dtype() is torch.bfloat16
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert Precision.AUTO.dtype() is torch.float32
    assert Precision.BFLOAT16.dtype() is torch.bfloat16


def test_a_processor_of_another_make_has_none_of_it(having: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    having.clear()
    having["architecture"] = "aarch64"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert processor.features() == ()
    assert processor.compiler_options() == ("-march=native",)


def test_libraries_for_what_is_there_and_for_less_have_names_of_their_own(
    having: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build._path()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert build._path() != whole


WITHOUT = """
import torch
from backpack_lm import processor
from backpack_lm.kernels import Precision
from backpack_lm.kernels.build import library
assert processor.features() == ("avx2",), processor.described()
assert not torch.ops.mkldnn._is_mkldnn_bf16_supported(), "oneDNN isn't limited"
print(Precision.AUTO.dtype(), library()._name)
"""

REPLICA = """
from backpack_lm.kernels import Precision
from backpack_serving.engine.runner import Runner
from backpack_serving.inference.served_model import ServedModel
from backpack_lm.installed import folder_of
for precision in "float32", "bfloat16":
    served = ServedModel.read(folder_of("micro"), Precision(precision))
    runner = Runner(served.model, served.storage, slots=2)
    print(runner.kernels.name, type(runner._trunk).__name__)
"""


@pytest.fixture(scope="module")
def limited() -> list[str]:
    """Where AVX-512 is hidden: the type that `auto` is, and the file of our library."""
    done = _with_avx2_alone("-c", WITHOUT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif("not X86 or 'avx2' not in processor.features()", reason="needs AVX2")
def test_without_avx512_every_precision_computes_and_gives_the_same_bits_in_any_company(limited: list[str]) -> None:
    """On any machine: AVX-512 is hidden from oneDNN, from torch and from the compiler of our library.

    What a machine with AVX2 alone runs of the suite, run here by a process of its own.
    """
    assert limited[0] == "torch.float32"
    what = "company or fastest_way"
    files = ("tests/models/test_kernels.py", "tests/engine/test_company.py")
    done = _with_avx2_alone("-m", "pytest", *files, "-p", "no:cacheprovider", "-k", what)
    assert done.returncode == 0, done.stdout
    assert "processor: avx2; torch uses AVX2; ONEDNN_MAX_CPU_ISA=AVX2" in done.stdout
    assert "skipped" not in done.stdout, done.stdout


@pytest.mark.skipif("not X86 or 'avx2' not in processor.features()", reason="needs AVX2")
def test_without_avx512_a_replica_has_the_compiled_kernels_in_every_precision(limited: list[str]) -> None:
    done = _with_avx2_alone("-c", REPLICA)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["native float32 NativeTrunk", "native bfloat16 NativeTrunk"]


@pytest.mark.skipif("not X86 or 'avx2' not in processor.features()", reason="needs AVX2")
@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump: apt install binutils")
def test_a_library_that_is_compiled_for_avx2_has_no_instruction_of_avx512(limited: list[str]) -> None:
    shown = subprocess.run(["objdump", "-d", limited[1]], capture_output=True, check=True).stdout
    assert b"ymm" in shown
    assert b"zmm" not in shown


def _with_avx2_alone(*words: str) -> subprocess.CompletedProcess[str]:
    """What Python says to these arguments where AVX-512 is hidden."""
    environment = {**os.environ, **AVX2, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment.pop("BACKPACK_PRECISION", None)
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
