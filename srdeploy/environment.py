"""Where figures were taken: machine, device, versions. Recorded beside every measurement and
certificate."""

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from srdeploy import __version__

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of srdeploy, Python and the installed ones of `packages`: what made a file."""
    found = {"srdeploy": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_environment(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Name -> value: srdeploy, Python, system, processor, cores, and the versions of installed
    `packages`.

    Reads package metadata only, so nothing heavy is imported. Holds no host name, user or path.
    """
    return {
        **versions(packages),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
    }


def _processor() -> str:
    """The processor's model as Linux tells it; platform.processor() is empty there."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def usable_cores() -> int:
    """CPU cores that this process may use, whether limited by affinity or by a container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
