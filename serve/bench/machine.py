"""A GPU's clocks, temperature and power while it is measured, through NVML."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

import psutil

from srdeploy.errors import MissingPackageError, UserError
from srdeploy.runtimes.base import parse_device
from srdeploy.runtimes.gpus import pci_bus_id
from srdeploy.serve.bench.results import Machine

MOVED = 0.05
"""Clocks that moved by a larger share of their maximum are worth a warning."""
OTHERS_ON_GPU = 5
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
"""Name -> its unit and how to ask for it."""
_LIMITS: dict[str, Callable[[Any, Any], float]] = {
    "GPU SM clock": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "GPU memory clock": lambda nvml, gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "GPU power": lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
}
"""Name -> the most that is allowed, in the same unit."""
_LOCK = "lock them lower with nvidia-smi --lock-gpu-clocks=MHZ"
_LOWERED = {
    "SwPowerCap": ("power capping", f"{_LOCK}, or raise the limit with nvidia-smi --power-limit"),
    "SwThermalSlowdown": ("heat (driver)", f"cool it, or {_LOCK}"),
    "HwThermalSlowdown": ("heat (hardware)", f"cool it, or {_LOCK}"),
    "HwPowerBrakeSlowdown": ("the power supply's brake", f"check the supply, or {_LOCK}"),
}
"""NVML's name of why clocks were lowered -> that in words, and what to do. HwSlowdown is left out:
it only says that one of the last two holds."""


class GpuWatch:
    """Records one GPU from its making on."""

    def __init__(self, nvml: Any, gpu: Any) -> None:
        """nvml: the module, and gpu: its handle, as open_nvml gives them."""
        self._nvml = nvml
        self._gpu = gpu
        self._values: dict[str, list[float]] = {name: [] for name in _MEASURES}
        self._busy_clocks: list[float] = []
        self._reasons: list[int] = []
        self._since = int(time.time() * 1e6)

    def sample(self) -> None:
        """Asks for what changes; at once after a run, while the clocks are still those of the
        run."""
        reasons = self._ask(self._read_reasons)
        if reasons is not None:
            self._reasons.append(reasons)
        for name, (_, read) in _MEASURES.items():
            value = self._ask(read)
            if value is None:
                continue
            self._values[name].append(value)
            if name == "GPU SM clock" and not (reasons or 0) & self._bit("GpuIdle"):
                self._busy_clocks.append(value)

    def report(self) -> tuple[dict[str, str], list[str]]:
        """The figures, name -> value with its unit, and the warnings. What the driver does not
        tell is left out."""
        others = self._ask(self._read_others)
        return self._figures(others), self._warnings(others)

    def _figures(self, others: float | None) -> dict[str, str]:
        told: dict[str, str | None] = {
            "GPU": self._ask(lambda nvml, gpu: nvml.nvmlDeviceGetName(gpu)),
            "NVIDIA driver": self._ask(lambda nvml, _: nvml.nvmlSystemGetDriverVersion()),
        }
        persistence = self._ask(lambda nvml, gpu: nvml.nvmlDeviceGetPersistenceMode(gpu))
        if persistence is not None:
            told["GPU persistence mode"] = "on" if persistence else "off"
        for name, values in self._values.items():
            limit = self._ask(_LIMITS[name]) if name in _LIMITS else None
            told[name] = _spread(values, _MEASURES[name][0], limit)
        if others is not None:
            told["GPU use by other processes"] = f"{others:.0f} %"
        return {name: value for name, value in told.items() if value is not None}

    def _warnings(self, others: float | None) -> list[str]:
        found = []
        for name, (why, remedy) in _LOWERED.items():
            count = sum(bool(reasons & self._bit(name)) for reasons in self._reasons)
            if count:
                found.append(
                    f"the GPU's clocks were lowered by {why} in {count} of {len(self._reasons)} "
                    f"samples: {remedy}"
                )
        clocks = self._busy_clocks
        if clocks and max(clocks) - min(clocks) > MOVED * max(clocks):
            found.append(
                f"the GPU's clock moved between {min(clocks):.0f} and {max(clocks):.0f} MHz: lock "
                "it with nvidia-smi --lock-gpu-clocks=MHZ"
            )
        if others is not None and others > OTHERS_ON_GPU:
            found.append(
                f"other processes used {others:.0f} % of the GPU: end them (nvidia-smi lists them)"
            )
        return found

    def _ask(self, question: Callable[[Any, Any], Any]) -> Any:
        """The answer; None where this GPU or driver has none."""
        try:
            return question(self._nvml, self._gpu)
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
        """Percent of the GPU's time in each process's last sample, about a second. None where this
        process is not listed either: a container may see foreign numbers of processes."""
        samples = nvml.nvmlDeviceGetProcessUtilization(gpu, self._since)
        used = {one.pid: one.smUtil for one in sorted(samples, key=lambda one: one.timeStamp)}
        if used.pop(os.getpid(), None) is None:
            return None
        return float(sum(used.values()))


@contextmanager
def open_nvml(index: int) -> Iterator[tuple[Any, Any]]:
    """NVML's module and its handle of the GPU cuda:`index`, as CUDA counts those that it sees.

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
        # NVML numbers the GPUs in another order, and without regard to CUDA_VISIBLE_DEVICES.
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
    """Bytes that this process holds on the GPU cuda:`index`; None where NVML does not tell."""
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


# What else the machine did while it was measured, and what of that makes the times weak.

OTHERS = 0.05
"""Share of the CPU's time that other processes may take without a warning."""
STOLEN = 0.01
"""The same for what the host of a virtual machine keeps back."""

SHORTEST = 0.5
"""Seconds of all cores together, of which shares can be told: the system counts in steps of 0.01.
"""

CPU_FOLDER = Path("/sys/devices/system/cpu")
CGROUP_FOLDER = Path("/sys/fs/cgroup")


class MachineWatch:
    """Watches the CPU, and the GPU that `device` names, while in a with block.

    `sample` between measurements, `report` at the end. threads: CPU threads that the measured
    runtimes were given; None: their default.
    """

    def __init__(self, device: str, threads: int | None = None) -> None:
        """device: cpu, cuda or cuda:N. Raises UserError for anything else."""
        self._kind, self._index = parse_device(device)
        self._threads = threads
        self._cores = sorted(os.sched_getaffinity(0))
        self._stack = ExitStack()
        self._gpu: GpuWatch | None = None
        self._gpu_absent: str | None = None
        self._start: CpuState | None = None
        self._report: Machine | None = None

    def __enter__(self) -> Self:
        if self._kind == "cuda":
            try:
                self._gpu = GpuWatch(*self._stack.enter_context(open_nvml(self._index)))
            except UserError as error:
                self._gpu_absent = str(error)
        self._start = CpuState.now(self._cores)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._stack:
            if kind is None:
                self._report = self.report()

    def sample(self) -> None:
        """Looks at the GPU's clocks; right after a run. The CPU is counted from start to end."""
        if self._gpu is not None:
            self._gpu.sample()

    def report(self) -> Machine:
        """What was found from the block's beginning until now, or until its end."""
        if self._report is not None:
            return self._report
        assert self._start is not None, "a report needs a with block"
        end = CpuState.now(self._cores)
        figures = _cpu_figures(self._start, end, self._cores, self._threads)
        warnings = _cpu_warnings(self._start, end, self._cores, self._threads)
        if self._gpu is not None:
            of_gpu, weak = self._gpu.report()
            figures |= of_gpu
            warnings += weak
        if self._gpu_absent is not None:
            warnings.append(
                f"the GPU's clocks, throttling and temperature are not known: {self._gpu_absent}"
            )
        return Machine(figures=figures, warnings=tuple(warnings))


@dataclass(frozen=True)
class CpuState:
    """The CPU at one moment. Times in seconds since some start, over the cores that this process
    may use."""

    total: float
    """All time, idle or not."""
    busy: float
    """That processes took, this one included."""
    stolen: float
    """That the host of a virtual machine gave to others."""
    own: float
    """That this process and its ended children took."""
    load: float
    """Average of the last minute."""
    megahertz: float | None
    governors: frozenset[str]
    periods: tuple[int, int] | None
    """Of a container's CPU limit: all so far, and those in which it stopped the container."""
    on_battery: bool | None

    @classmethod
    def now(cls, cores: Sequence[int]) -> Self:
        """cores: their numbers, as the system counts them."""
        every = psutil.cpu_times(percpu=True)
        # Where containers see fewer cores than they are numbered by, all that are seen count.
        seen = [every[core] for core in cores] if max(cores) < len(every) else every
        mine = psutil.Process().cpu_times()
        battery = psutil.sensors_battery()
        return cls(
            # The guests' time is part of user's and nice's.
            total=sum(
                one.user
                + one.nice
                + one.system
                + one.idle
                + one.iowait
                + one.irq
                + one.softirq
                + one.steal
                for one in seen
            ),
            busy=sum(one.user + one.nice + one.system for one in seen),
            stolen=sum(one.steal for one in seen),
            own=mine.user + mine.system + mine.children_user + mine.children_system,
            load=psutil.getloadavg()[0],
            megahertz=_megahertz(),
            governors=_governors(cores),
            periods=_limited_periods(),
            on_battery=None if battery is None else not battery.power_plugged,
        )


@dataclass(frozen=True)
class _Shares:
    """Of the cores' time between two states; None where that was too short to tell."""

    others: float | None
    stolen: float | None

    @classmethod
    def between(cls, start: CpuState, end: CpuState) -> Self:
        total = end.total - start.total
        if total < SHORTEST:
            return cls(None, None)
        # Rounding may make others' time negative.
        others = max(0.0, (end.busy - start.busy) - (end.own - start.own))
        return cls(others / total, (end.stolen - start.stolen) / total)


def _cpu_figures(
    start: CpuState, end: CpuState, cores: Sequence[int], threads: int | None
) -> dict[str, str]:
    shares = _Shares.between(start, end)
    figures = {
        "CPU cores": f"{len(cores)} of {psutil.cpu_count()} usable",
        "CPU threads": str(threads) if threads is not None else "the runtime's default",
        "load average at the start": f"{start.load:.2f}",
    }
    if start.megahertz is not None and end.megahertz is not None:
        figures["CPU frequency"] = (
            f"{start.megahertz:.0f} MHz at the start, {end.megahertz:.0f} MHz at the end"
        )
    if end.governors:
        figures["CPU governor"] = ", ".join(sorted(end.governors))
    if shares.others is not None:
        figures["CPU time of other processes"] = f"{100 * shares.others:.1f} %"
    if shares.stolen is not None:
        figures["CPU time stolen by the host"] = f"{100 * shares.stolen:.1f} %"
    if end.on_battery is not None:
        figures["power supply"] = "battery" if end.on_battery else "mains"
    return figures


def _cpu_warnings(
    start: CpuState, end: CpuState, cores: Sequence[int], threads: int | None
) -> list[str]:
    shares = _Shares.between(start, end)
    found = []
    if shares.others is not None and shares.others > OTHERS:
        found.append(
            f"other processes took {100 * shares.others:.0f} % of the CPU while measuring: close "
            "them, or give a larger --budget"
        )
    if shares.stolen is not None and shares.stolen > STOLEN:
        found.append(
            f"{100 * shares.stolen:.0f} % steal time: the host gave this virtual machine's cores "
            "to others; give a larger --budget, or a machine of your own"
        )
    if slow := end.governors - {"performance"}:
        found.append(
            f"the CPU's governor is {', '.join(sorted(slow))}, which changes its clock: set "
            "performance (cpupower frequency-set -g performance)"
        )
    if start.periods is not None and end.periods is not None:
        periods, stopped = (b - a for a, b in zip(start.periods, end.periods, strict=True))
        if stopped:
            found.append(
                f"the container's CPU limit stopped it in {stopped} of {periods} periods: raise "
                "the limit, or take fewer threads"
            )
    if threads is not None and threads > len(cores):
        found.append(
            f"{threads} threads share {len(cores)} cores: take at most {len(cores)} threads"
        )
    if end.on_battery:
        found.append("the machine runs on battery, which lowers its clocks: plug it in")
    return found


def _megahertz() -> float | None:
    """Mean over the cores, where the system tells."""
    try:
        found = psutil.cpu_freq()
    except NotImplementedError:
        return None
    return None if found is None else float(found.current)


def _governors(cores: Sequence[int]) -> frozenset[str]:
    """Of the cores' clocks; none where the system has no say in them, as in virtual machines."""
    files = (CPU_FOLDER / f"cpu{core}" / "cpufreq" / "scaling_governor" for core in cores)
    return frozenset(file.read_text().strip() for file in files if file.is_file())


def _limited_periods() -> tuple[int, int] | None:
    """As CpuState.periods; None without a limit."""
    file = CGROUP_FOLDER / "cpu.stat"
    if not file.is_file():
        return None
    lines = (line.split() for line in file.read_text().splitlines())
    values = {line[0]: int(line[1]) for line in lines if len(line) == 2}
    if "nr_periods" not in values:
        return None
    return values["nr_periods"], values["nr_throttled"]
