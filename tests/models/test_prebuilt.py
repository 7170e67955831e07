"""Kernels that were compiled when an image was built, for families of processors."""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path

import pytest
from backpack_lm.kernels import build, families
from backpack_lm.kernels.families import FAMILIES, Family
from backpack_serving.cli.main import app
from typer.testing import CliRunner

V4_BF16, V4, V3, ARM = FAMILIES
# What each sees of its options; one, so that a compiler takes no time.
SOURCE = """
extern "C" int level() {
#if defined(__AVX512BF16__)
    return 4;
#elif defined(__AVX512F__)
    return 3;
#elif defined(__AVX2__)
    return 2;
#else
    return 1;
#endif
}
"""
LEVELS = {"avx512-bf16": 4, "avx512": 3, "avx2": 2, "armv8": 1}


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small sources, and folders of the test's own for what is made from them."""
    there = tmp_path / "cpp"
    there.mkdir()
    (there / "exports.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCES", there)
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(build, "folder", lambda name: tmp_path)
    monkeypatch.setattr(build, "check_layouts", lambda library: None)  # small sources have no structures
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    return there


def _processor(monkeypatch: pytest.MonkeyPatch, *has: Family, machine: str = "x86_64") -> None:
    monkeypatch.setattr(families, "flags", lambda: frozenset().union(*(family.needs for family in has)))
    monkeypatch.setattr(families.platform, "machine", lambda: machine)


def _there(*made: Family) -> None:
    """Files as compile_for leaves them, of bytes that nobody loads."""
    build.PREBUILT.mkdir(exist_ok=True)
    for family in made:
        body = family.name.encode()
        (build.PREBUILT / build._name(family.name, *family.options)).write_bytes(body + build._checksum(body))


def _taken() -> str | None:
    file = build._prebuilt()
    return file and file.name.rpartition("-")[0]


@pytest.mark.parametrize("family", families.of_machine(), ids=lambda family: family.name)
def test_a_family_s_library_has_its_instructions_and_no_more(family: Family) -> None:
    file = build.compile_for(family)
    assert file.parent == build.PREBUILT
    before = file.stat().st_mtime_ns
    assert build.compile_for(family).stat().st_mtime_ns == before, "it is made once"
    if family.needs <= families.flags():
        assert ctypes.CDLL(str(file)).level() == LEVELS[family.name]


@pytest.mark.skipif(not families.fitting(), reason="this processor is of no family")
def test_a_processor_takes_its_family_s_library_without_a_compiler_or_a_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (family, *_) = families.fitting()
    made = build.compile_for(family)

    def refuse(*_: object) -> None:
        raise PermissionError("nothing may be written")

    monkeypatch.setattr(build, "folder", refuse)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    library = build.library.__wrapped__()
    assert library._name == str(made)
    assert library.level() == LEVELS[family.name]


def test_the_newest_that_fits_is_taken_and_none_that_doesn_t(monkeypatch: pytest.MonkeyPatch) -> None:
    _there(*FAMILIES)
    for has, name in (((V4_BF16,), "avx512-bf16"), ((V4,), "avx512"), ((V3,), "avx2"), ((), None)):
        _processor(monkeypatch, *has)
        assert _taken() == name
    _processor(monkeypatch, ARM, machine="aarch64")
    assert _taken() == "armv8"


def test_one_that_is_damaged_or_missing_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    _processor(monkeypatch, V4_BF16)
    assert _taken() is None
    _there(V4, V3)
    assert _taken() == "avx512"
    file = build._prebuilt()
    assert file
    file.write_bytes(b"?" + file.read_bytes()[1:])
    assert _taken() == "avx2"


def test_one_from_other_sources_is_not_taken(monkeypatch: pytest.MonkeyPatch, sources: Path) -> None:
    _processor(monkeypatch, V4_BF16)
    _there(*FAMILIES)
    (sources / "exports.cpp").write_text(SOURCE + "\n")
    assert _taken() is None


def test_none_is_taken_where_a_lesser_processor_is_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _processor(monkeypatch, V4_BF16)
    _there(*FAMILIES)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert _taken() is None


def test_what_a_processor_has_is_read_in_the_kernel_s_words() -> None:
    if platform.machine() == "x86_64" and Path("/proc/cpuinfo").exists():
        assert {"fpu", "sse2"} <= families.flags()
        assert not families.flags() & {"flags", ":"}


def test_the_command_compiles_for_those_named_and_refuses_others() -> None:
    (family, *_) = families.of_machine()
    done = CliRunner().invoke(app, ["model", "kernels", "--family", family.name])
    assert done.exit_code == 0, done.output
    assert [file.name.rpartition("-")[0] for file in build.PREBUILT.iterdir()] == [family.name]
    refused = CliRunner().invoke(app, ["model", "kernels", "--family", "sse2"])
    assert refused.exit_code == 1
    assert "no family of processors is called `sse2`: avx512-bf16, avx512, avx2, armv8" in refused.output


def test_an_image_that_is_built_on_arm_has_arm_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(file: Path, options: tuple[str, ...]) -> None:
        assert options == ARM.options
        file.write_bytes(build._checksum(b""))

    _processor(monkeypatch, ARM, machine="aarch64")
    monkeypatch.setattr(build, "_compile_library", write)
    done = CliRunner().invoke(app, ["model", "kernels"])
    assert done.exit_code == 0, done.output
    assert [file.name.rpartition("-")[0] for file in build.PREBUILT.iterdir()] == ["armv8"]
    assert _taken() == "armv8"


def test_the_image_of_inference_has_them() -> None:
    file = (Path(__file__).parents[2] / "deploy" / "Dockerfile").read_text()
    (stage,) = re.findall(r"^FROM process AS inference$(.*)", file, re.M | re.S)
    install, compiled, user = (stage.index(word) for word in ("/wheel/*.whl", "backpack model kernels", "USER 10001"))
    assert install < compiled < user, "by root, into the package, where replicas can't write"
