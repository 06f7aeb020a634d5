"""A GPU's clocks, temperature and power while it is measured, through NVML."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from srdeploy.errors import MissingPackageError, UserError
from srdeploy.runtimes.gpus import pci_bus_id

CLOCK_RANGE = 0.05
"""Clocks that move by a larger share of their maximum cause a warning."""
OTHERS = 5
"""Percent of the GPU that other processes may use without a warning."""

_MEASURES: dict[str, tuple[str, Callable[[Any, Any], float]]] = {
    "GPU SM clock": ("MHz", lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
    "GPU memory clock": (
        "MHz",
        lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    ),
    "GPU temperature": (
        "°C",
        lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    ),
    "GPU power": ("W", lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
}
"""Name -> its unit, and the query."""
_LIMITS: dict[str, Callable[[Any, Any], float]] = {
    "GPU SM clock": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "GPU memory clock": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "GPU power": lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
}
"""Name -> the most that is allowed, in the same unit."""
_LOCK = "lock them lower with nvidia-smi --lock-gpu-clocks=MHZ"
_THROTTLE_REASONS = {
    "SwPowerCap": ("power capping", f"{_LOCK}, or raise the limit with nvidia-smi --power-limit"),
    "SwThermalSlowdown": ("heat (driver)", f"cool it, or {_LOCK}"),
    "HwThermalSlowdown": ("heat (hardware)", f"cool it, or {_LOCK}"),
    "HwPowerBrakeSlowdown": ("the power supply's brake", f"check the supply, or {_LOCK}"),
}
"""NVML's name of a throttle reason -> the reason in words, and what to do. HwSlowdown is left out:
it only says that one of the last two holds."""


class GpuMonitor:
    """Samples one GPU; counts what other processes use from its creation on."""

    def __init__(self, nvml: Any, gpu: Any) -> None:
        """nvml: the module, and gpu: its handle, as open_nvml gives them."""
        self._nvml = nvml
        self._gpu = gpu
        self._values: dict[str, list[float]] = {name: [] for name in _MEASURES}
        self._busy_clocks: list[float] = []
        self._reasons: list[int] = []
        self._since = int(time.time() * 1e6)

    def sample(self) -> None:
        """Reads what changes. Call it right after a run, while the clocks are still those of the
        run."""
        reasons = self._query(self._read_reasons)
        if reasons is not None:
            self._reasons.append(reasons)
        for name, (_, read) in _MEASURES.items():
            value = self._query(read)
            if value is None:
                continue
            self._values[name].append(value)
            if name == "GPU SM clock" and not (reasons or 0) & self._bit("GpuIdle"):
                self._busy_clocks.append(value)

    def report(self) -> tuple[dict[str, str], list[str]]:
        """The figures, name -> value with its unit, and the warnings. Figures that the driver does
        not report are left out."""
        others = self._query(self._read_others)
        return self._figures(others), self._warnings(others)

    def _figures(self, others: float | None) -> dict[str, str]:
        found: dict[str, str | None] = {
            "GPU": self._query(lambda nvml, gpu: nvml.nvmlDeviceGetName(gpu)),
            "NVIDIA driver": self._query(lambda nvml, _: nvml.nvmlSystemGetDriverVersion()),
        }
        persistence = self._query(lambda nvml, gpu: nvml.nvmlDeviceGetPersistenceMode(gpu))
        if persistence is not None:
            found["GPU persistence mode"] = "on" if persistence else "off"
        for name, values in self._values.items():
            limit = self._query(_LIMITS[name]) if name in _LIMITS else None
            found[name] = _spread(values, _MEASURES[name][0], limit)
        if others is not None:
            found["GPU use by other processes"] = f"{others:.0f} %"
        return {name: value for name, value in found.items() if value is not None}

    def _warnings(self, others: float | None) -> list[str]:
        found = []
        for name, (why, remedy) in _THROTTLE_REASONS.items():
            count = sum(bool(reasons & self._bit(name)) for reasons in self._reasons)
            if count:
                found.append(
                    f"the GPU's clocks were lowered by {why} in {count} of {len(self._reasons)} "
                    f"samples: {remedy}"
                )
        clocks = self._busy_clocks
        if clocks and max(clocks) - min(clocks) > CLOCK_RANGE * max(clocks):
            found.append(
                f"the GPU's clock moved between {min(clocks):.0f} and {max(clocks):.0f} MHz: lock "
                "it with nvidia-smi --lock-gpu-clocks=MHZ"
            )
        if others is not None and others > OTHERS:
            found.append(
                f"other processes used {others:.0f} % of the GPU: end them (nvidia-smi lists them)"
            )
        return found

    def _query(self, read: Callable[[Any, Any], Any]) -> Any:
        """The value; None where this GPU or driver does not report it."""
        try:
            return read(self._nvml, self._gpu)
        except self._nvml.NVMLError:
            return None

    def _read_reasons(self, nvml: Any, gpu: Any) -> int:
        try:
            return int(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu))
        except (AttributeError, nvml.NVMLError):  # a package or driver from before 2023
            return int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))

    def _bit(self, reason: str) -> int:
        name = f"nvmlClocksEventReason{reason}"
        if not hasattr(self._nvml, name):
            name = f"nvmlClocksThrottleReason{reason}"
        return int(getattr(self._nvml, name))

    def _read_others(self, nvml: Any, gpu: Any) -> float | None:
        """Percent of the GPU's time in each process's last sample, about a second. None where
        this process is not listed either: a container may see process ids of the host."""
        samples = nvml.nvmlDeviceGetProcessUtilization(gpu, self._since)
        used = {one.pid: one.smUtil for one in sorted(samples, key=lambda one: one.timeStamp)}
        if used.pop(os.getpid(), None) is None:
            return None
        return float(sum(used.values()))


@contextmanager
def open_nvml(index: int) -> Iterator[tuple[Any, Any]]:
    """The NVML module and its handle of the GPU cuda:`index`, in CUDA's order of visible GPUs.

    Raises MissingPackageError without its Python package or CUDA's, UserError without a driver or
    such a GPU.
    """
    try:
        import pynvml
    except ImportError as error:
        raise MissingPackageError("nvidia-ml-py", "tensorrt", "asking for GPUs") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise UserError(f"NVML does not start ({error}): check the NVIDIA driver") from error
    try:
        # NVML numbers the GPUs in another order, and ignores CUDA_VISIBLE_DEVICES.
        where = pci_bus_id(index)
        try:
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(where)
        except pynvml.NVMLError as error:
            raise UserError(
                f"NVML does not know the GPU cuda:{index} at {where} ({error}): check the NVIDIA "
                "driver"
            ) from error
        yield pynvml, handle
    finally:
        pynvml.nvmlShutdown()


def process_memory(index: int) -> int | None:
    """Bytes that this process holds on the GPU cuda:`index`; None where NVML does not report
    it."""
    try:
        with open_nvml(index) as (nvml, gpu):
            try:
                listed = nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
            except nvml.NVMLError:
                return None
    except UserError:
        return None
    held = [one.usedGpuMemory for one in listed if one.pid == os.getpid()]
    return held[0] if held else None


def _spread(values: Sequence[float], unit: str, limit: float | None) -> str | None:
    if not values:
        return None
    least, middle, most = (f"{value:.0f}" for value in (min(values), median(values), max(values)))
    text = middle if least == most else f"{least} to {most}, median {middle}"
    allowed = f" (at most {limit:.0f} {unit})" if limit is not None else ""
    return f"{text} {unit}{allowed}"
