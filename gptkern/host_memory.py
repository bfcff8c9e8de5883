"""The memory that this machine still gives to the process."""

from __future__ import annotations

from pathlib import Path


def memory_left() -> int:
    """Bytes this machine can still give: running out of them on a CPU kills instead of raising.

    Raises:
        OSError: The system does not say.
    """
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(1024 * int(line.split()[1]), _left_of_group(Path("/sys/fs/cgroup")))
    raise OSError("/proc/meminfo does not say how much memory is left")


def _left_of_group(group: Path) -> int:
    """Bytes that the process's control group may still take: without a limit, more than any machine has."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return 1 << 62
        return max(int(limit) - int((group / "memory.current").read_text()), 0)
    except (OSError, ValueError):
        return 1 << 62
