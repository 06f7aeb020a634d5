"""How many CPU cores there are to use."""

import os
from pathlib import Path


def usable_cores() -> int:
    """CPU cores that this process may use, whether limited by affinity or by a container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
