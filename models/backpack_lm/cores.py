"""How many cores this process may use: the one place that counts them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def cores() -> int:
    """Those that this process may use, by its affinity and by the CPU quotas of its control groups; at least one.

    A quota that ends within a core counts as that core: half a core is one, one and a half are two.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(math.ceil(share) for share in _quotas())]))


def set_threads(count: int) -> None:
    """Let torch compute with so many threads; 0: with as many as it would, but no more than there are cores.

    Under a quota more threads are slower than one: they spend it waiting for each other. To be called before a
    worker thread computes anything: it would keep the number that held then.
    """
    import torch

    wanted = count or min(torch.get_num_threads(), cores())
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)


def _quotas() -> Iterator[float]:
    """In cores: of this process's control group and of those that it is in, version 2 and version 1."""
    for folder in _folders():
        with suppress(OSError, ValueError):  # no such file, or no quota: "max"
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            yield quota / period
        with suppress(OSError, ValueError):
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            if quota > 0:  # −1: none
                yield quota / int((folder / "cpu.cfs_period_us").read_text())


def _folders() -> Iterator[Path]:
    """Where the quotas stand: a container sees its own group as the root, a service of systemd stands below it."""
    paths = {"": PurePosixPath("/"), "cpu": PurePosixPath("/"), "cpu,cpuacct": PurePosixPath("/")}
    with suppress(OSError, ValueError):
        for line in OWN_CGROUPS.read_text().splitlines():  # such as "0::/system.slice/backpack.service"
            _, named, group = line.split(":", 2)
            if named in paths:
                paths[named] = PurePosixPath(group)
    for controllers, path in paths.items():
        for place in (path, *path.parents):
            if ".." not in place.parts:  # outside of what this process sees
                yield CGROUPS / controllers / place.relative_to("/")
