"""What the machine did while it was measured: its CPU, for real and as made-up states."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from srdeploy.serve.bench import machine
from srdeploy.serve.bench.machine import CpuState, MachineMonitor
from srdeploy.serve.bench.results import MachineReport

CORES = list(range(4))
START = CpuState(
    total=1000,
    busy=400,
    stolen=10,
    own=50,
    load=0.5,
    megahertz=2400,
    governors=frozenset({"performance"}),
    periods=None,
    on_battery=None,
)
QUIET = replace(START, total=1100, busy=441, own=90)
"""100 s later: others took 1 s."""


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MachineReport]:
    """What a watch says whose CPU went from START to the given state."""

    def watch(end: CpuState, start: CpuState = START, threads: int | None = None) -> MachineReport:
        states = [start, end]
        monkeypatch.setattr(CpuState, "now", lambda cores: states.pop(0))
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(CORES))
        with MachineMonitor("cpu", threads) as watch:
            watch.sample()
        return watch.report()

    return watch


def test_time_of_another_process_counts_as_others_and_ours_does_not() -> None:
    cores = sorted(psutil.Process().cpu_affinity())
    start = CpuState.now(cores)
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        ours = time.process_time()
        while time.process_time() - ours < 0.2 or sum(used_by(other)) < 0.3:
            pass
        taken = sum(used_by(other))
        end = CpuState.now(cores)
    finally:
        other.kill()
        other.wait()
    assert end.own - start.own >= 0.15
    assert (end.busy - start.busy) - (end.own - start.own) >= taken / 2
    assert end.total - start.total >= (end.busy - start.busy) * 0.9


def used_by(other: "subprocess.Popen[bytes]") -> tuple[float, float]:
    times = psutil.Process(other.pid).cpu_times()
    return times.user, times.system


def test_on_a_cpu_the_report_says_nothing_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with MachineMonitor("cpu", threads=1) as watch:
        watch.sample()
        found = watch.report()
    assert found.figures["CPU cores"].endswith(f"of {psutil.cpu_count()} usable")
    assert found.figures["CPU threads"] == "1"
    assert "load average at the start" in found.figures
    assert not [text for text in (*found.figures, *found.warnings) if "GPU" in text]


def test_a_quiet_machine_has_figures_and_no_warnings(watched: Callable[..., MachineReport]) -> None:
    found = watched(QUIET)
    assert found.warnings == ()
    assert found.figures["CPU time of other processes"] == "1.0 %"
    assert found.figures["CPU time stolen by the host"] == "0.0 %"
    assert found.figures["CPU frequency"] == "2400 MHz at the start, 2400 MHz at the end"
    assert found.figures["CPU governor"] == "performance"
    assert "power supply" not in found.figures


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"busy": 471}, "other processes took 31 % of the CPU while measuring: close them, or"),
        ({"stolen": 13}, "3 % steal time: the host gave this virtual machine's cores to others"),
        ({"governors": frozenset({"powersave"})}, "the CPU's governor is powersave, which"),
        ({"on_battery": True}, "the machine runs on battery"),
        ({"periods": (300, 12)}, "the container's CPU limit stopped it in 10 of 200 periods"),
    ],
)
def test_what_makes_times_weak_is_a_warning(
    watched: Callable[..., MachineReport], change: dict[str, Any], expected: str
) -> None:
    (warning,) = watched(replace(QUIET, **change), start=replace(START, periods=(100, 2))).warnings
    assert warning.startswith(expected)


def test_more_threads_than_cores_are_a_warning(watched: Callable[..., MachineReport]) -> None:
    assert watched(QUIET, threads=4).warnings == ()
    assert watched(QUIET, threads=8).warnings == (
        "8 threads share 4 cores: take at most 4 threads",
    )


def test_too_short_a_time_tells_no_shares(watched: Callable[..., MachineReport]) -> None:
    found = watched(replace(START, total=START.total + 0.1, busy=START.busy + 0.1))
    assert found.warnings == ()
    assert "CPU time of other processes" not in found.figures


def test_governor_and_limit_are_read_from_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = sorted(psutil.Process().cpu_affinity())[0]
    folder = tmp_path / f"cpu{core}" / "cpufreq"
    folder.mkdir(parents=True)
    (folder / "scaling_governor").write_text("schedutil\n")
    (tmp_path / "cpu.stat").write_text(
        "usage_usec 5\nnr_periods 40\nnr_throttled 7\nthrottled_usec 90\n"
    )
    monkeypatch.setattr(machine, "CPU_FOLDER", tmp_path)
    monkeypatch.setattr(machine, "CGROUP_FOLDER", tmp_path)
    state = CpuState.now([core])
    assert state.governors == {"schedutil"}
    assert state.periods == (40, 7)
    monkeypatch.setattr(machine, "CPU_FOLDER", tmp_path / "absent")
    monkeypatch.setattr(machine, "CGROUP_FOLDER", tmp_path / "absent")
    bare = CpuState.now([core])
    assert bare.governors == frozenset()
    assert bare.periods is None
