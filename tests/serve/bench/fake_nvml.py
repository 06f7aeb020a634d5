"""A driver's NVML for one GPU, in place of the package pynvml: names, arguments and constants as
there, which a test compares."""

import os
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """What NVML refuses."""


class FakeNvml:
    """One GPU. `clocks` and `reasons` are those of one sample after the other."""

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0
    nvmlClocksEventReasonGpuIdle = 0x01
    nvmlClocksEventReasonSwPowerCap = 0x04
    nvmlClocksEventReasonSwThermalSlowdown = 0x20
    nvmlClocksEventReasonHwThermalSlowdown = 0x40
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80

    def __init__(self) -> None:
        self.clocks = [1980, 1980, 1980]
        self.reasons = [0, 0, 0]
        self.refused: set[str] = set()
        """Names of what this GPU does not tell."""
        self.processes: list[Any] = []
        self.opened = 0
        self.asked_for: list[str] = []
        self.since = 0

    def nvmlInit(self) -> None:
        self._answer("nvmlInit")
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return str(self._answer("nvmlSystemGetDriverVersion", "580.95"))

    def nvmlDeviceGetHandleByPciBusId(self, pciBusId: str) -> str:
        self.asked_for.append(pciBusId)
        return str(self._answer("nvmlDeviceGetHandleByPciBusId", "handle"))

    def nvmlDeviceGetName(self, handle: str) -> str:
        return str(self._answer("nvmlDeviceGetName", "NVIDIA L4"))

    def nvmlDeviceGetPersistenceMode(self, handle: str) -> int:
        return int(self._answer("nvmlDeviceGetPersistenceMode", 1))

    def nvmlDeviceGetClockInfo(self, handle: str, type: int) -> int:
        self._answer("nvmlDeviceGetClockInfo")
        return self.clocks.pop(0) if type == self.NVML_CLOCK_SM else 6251

    def nvmlDeviceGetMaxClockInfo(self, handle: str, type: int) -> int:
        return 2040 if type == self.NVML_CLOCK_SM else 6251

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return int(self._answer("nvmlDeviceGetTemperature", 61))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return int(self._answer("nvmlDeviceGetPowerUsage", 70900))

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 72000

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        self._answer("nvmlDeviceGetCurrentClocksEventReasons")
        return self.reasons.pop(0)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        self._answer("nvmlDeviceGetCurrentClocksThrottleReasons")
        return self.reasons.pop(0)

    def nvmlDeviceGetProcessUtilization(self, handle: str, timeStamp: int) -> list[Any]:
        self.since = timeStamp
        return list(self._answer("nvmlDeviceGetProcessUtilization", self.processes))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return list(self._answer("nvmlDeviceGetComputeRunningProcesses", self.processes))

    def _answer(self, name: str, value: Any = None) -> Any:
        if name in self.refused:
            raise NVMLError("Not Supported")
        return value


def process(
    sm_util: int = 0, when: int = 0, pid: int | None = None, memory: int | None = None
) -> SimpleNamespace:
    """As NVML lists one; this one by default."""
    return SimpleNamespace(
        pid=os.getpid() if pid is None else pid,
        smUtil=sm_util,
        timeStamp=when,
        usedGpuMemory=memory,
    )
