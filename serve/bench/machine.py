"""What else the machine does while it is measured: what of it makes latencies unreliable."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from srdeploy.errors import UserError
from srdeploy.runtimes.base import parse_device
from srdeploy.serve.bench.gpu_monitor import GpuMonitor, open_nvml
from srdeploy.serve.bench.results import MachineReport

OTHERS = 0.05
"""Share of the CPU's time that other processes may take without a warning."""
STOLEN = 0.01
"""The same for time that the host of a virtual machine steals."""
SHORTEST = 0.5
"""Seconds of all cores together from which shares are known: the system counts in steps of 0.01."""
CPU_FOLDER = Path("/sys/devices/system/cpu")
CGROUP_FOLDER = Path("/sys/fs/cgroup")


class MachineMonitor:
    """Monitors the CPU, and the GPU that `device` names, while in a with block.

    Call `sample` between measurements and `report` at the end. threads: CPU threads that the
    measured runtimes were given; None: their default.
    """

    def __init__(self, device: str, threads: int | None = None) -> None:
        """device: cpu, cuda or cuda:N. Raises UserError for anything else."""
        self._kind, self._index = parse_device(device)
        self._threads = threads
        self._cores = sorted(os.sched_getaffinity(0))
        self._stack = ExitStack()
        self._gpu: GpuMonitor | None = None
        self._gpu_absent: str | None = None
        self._start: CpuState | None = None
        self._report: MachineReport | None = None

    def __enter__(self) -> Self:
        if self._kind == "cuda":
            try:
                self._gpu = GpuMonitor(*self._stack.enter_context(open_nvml(self._index)))
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
        """Reads the GPU's clocks; call it right after a run. The CPU is read at both ends."""
        if self._gpu is not None:
            self._gpu.sample()

    def report(self) -> MachineReport:
        """What was found from the beginning of the block until now, or until its end."""
        if self._report is not None:
            return self._report
        assert self._start is not None, "a report needs a with block"
        end = CpuState.now(self._cores)
        figures = _cpu_figures(self._start, end, self._cores, self._threads)
        warnings = _cpu_warnings(self._start, end, self._cores, self._threads)
        if self._gpu is not None:
            gpu_figures, gpu_warnings = self._gpu.report()
            figures |= gpu_figures
            warnings += gpu_warnings
        if self._gpu_absent is not None:
            warnings.append(
                f"the GPU's clocks, throttling and temperature are not known: {self._gpu_absent}"
            )
        return MachineReport(figures=figures, warnings=tuple(warnings))


@dataclass(frozen=True)
class CpuState:
    """The CPU at one moment. Times in seconds since some start, over the cores that this process
    may use."""

    total: float
    """All time, idle or busy."""
    busy: float
    """Time that processes took, this one included."""
    stolen: float
    """Time that the host of a virtual machine gave to others."""
    own: float
    """Time that this process and its ended children took."""
    load: float
    """Load average of the last minute."""
    megahertz: float | None
    governors: frozenset[str]
    periods: tuple[int, int] | None
    """Periods of a container's CPU limit so far, and those in which it throttled the container."""
    on_battery: bool | None

    @classmethod
    def now(cls, cores: Sequence[int]) -> Self:
        """cores: their numbers, as the system counts them."""
        every = psutil.cpu_times(percpu=True)
        # Where a container sees fewer cores than their numbers suggest, all visible ones count.
        seen = [every[core] for core in cores] if max(cores) < len(every) else every
        mine = psutil.Process().cpu_times()
        battery = psutil.sensors_battery()
        return cls(
            # Guest time is part of user and nice.
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
    """Shares of the cores' time between two states; None where that was too short."""

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
    """Mean frequency of the cores, where the system reports it."""
    try:
        found = psutil.cpu_freq()
    except NotImplementedError:
        return None
    return None if found is None else float(found.current)


def _governors(cores: Sequence[int]) -> frozenset[str]:
    """Frequency governors of the cores; none where the system does not control them, as in virtual
    machines."""
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
