"""How many cores a process may use, as a container's files say, and that torch uses no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backpack_lm import cores


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight cores by the affinity, and no control group."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "OWN_CGROUPS", tmp_path / "own")
    return tmp_path / "cgroup"


def _write(folder: Path, **texts: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_without_a_quota_the_affinity_counts(groups: Path) -> None:
    assert cores.cores() == 8


QUOTAS = [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("damaged", 8)]


@pytest.mark.parametrize(("quota", "count"), QUOTAS)
def test_a_container_has_the_cores_of_its_quota(groups: Path, quota: str, count: int) -> None:
    _write(groups, cpu__max=quota)
    assert cores.cores() == count


@pytest.mark.parametrize(("quota", "count"), [("-1", 8), ("150000", 2), ("50000", 1)])
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_quotas_of_version_1_count_too(groups: Path, controllers: str, quota: str, count: int) -> None:
    _write(groups / controllers, cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert cores.cores() == count


def test_a_quota_of_any_group_around_the_process_holds(groups: Path) -> None:
    """A service's own group stands below the slice that it is in; a root without a quota has no file of one."""
    cores.OWN_CGROUPS.write_text("1:name=systemd:/x\n0::/some.slice/backpack.service\n")
    _write(groups / "some.slice" / "backpack.service", cpu__max="max 100000")
    _write(groups / "some.slice", cpu__max="300000 100000")
    assert cores.cores() == 3
    _write(groups / "some.slice" / "backpack.service", cpu__max="200000 100000")
    assert cores.cores() == 2


def test_a_group_outside_of_what_the_process_sees_is_not_looked_for(groups: Path) -> None:
    cores.OWN_CGROUPS.write_text("0::/../other\n")
    _write(groups.parent / "other", cpu__max="50000 100000")
    assert cores.cores() == 8


def test_torch_computes_with_no_more_threads_than_there_are_cores(tmp_path: Path) -> None:
    """In a process of its own: threads that computed once keep their number."""
    _write(tmp_path, cpu__max="50000 100000")
    program = f"""
import os, torch
from pathlib import Path
from backpack_lm import cores
cores.CGROUPS = Path({str(tmp_path)!r})
torch.set_num_threads(6)
cores.set_threads(0)
print(torch.get_num_threads())
cores.set_threads(3)
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "3"]
