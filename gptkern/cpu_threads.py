"""The number of threads that the extension's CPU part works with: no more than there are cores for them."""

from __future__ import annotations

import math
import os
from functools import lru_cache
from pathlib import Path

import torch

VARIABLE = "GPTKERN_CPU_THREADS"


def cpu_threads() -> int:
    """PyTorch's number of threads, or as many cores as the process may use if these are fewer.

    They are fewer where the process is bound to some cores, or its control group may use only so much
    processor time. ``GPTKERN_CPU_THREADS`` comes before all of it.

    Raises:
        ValueError: The variable is no whole number from 1 on.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return min(torch.get_num_threads(), len(os.sched_getaffinity(0)), _cores_of_quota())
    if not wanted.isascii() or not wanted.isdecimal() or int(wanted) < 1:
        raise ValueError(f"{VARIABLE}={wanted!r}: it takes a whole number of threads from 1 on")
    return int(wanted)


@lru_cache
def _cores_of_quota() -> int:
    return cores_of_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))


def cores_of_quota(root: Path, own: Path) -> int:
    """The cores' worth of processor time that a control group and those above it allow, rounded up.

    Args:
        root: Where the control groups are mounted.
        own: The file that names the process's groups, a line ``number:controllers:path`` each.

    Returns:
        At least 1; a number that no machine reaches where there is no limit, or nothing to read.
    """
    cores = float(1 << 20)
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct"):
            continue
        mounted = root / controllers
        group = mounted / path.lstrip("/")
        # Inside a container the path may be the host's: then the mounted folder is the container's own.
        for folder in (group, *group.parents):
            cores = min(cores, _limit(folder))
            if folder == mounted:
                break
    return max(1, math.ceil(cores))


def _limit(folder: Path) -> float:
    """The cores' worth of a group's own quota, infinite without one."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return int(quota) / int(period) if quota not in ("max", "-1") else math.inf
    except (OSError, ValueError):
        return math.inf
