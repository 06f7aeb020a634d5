"""What a GPU did while it was measured, reported by a fake driver."""

import inspect
import sys
import time
from types import SimpleNamespace

import pytest

from srdeploy.errors import UserError
from srdeploy.runtimes import gpus
from srdeploy.serve.bench import gpu_monitor
from srdeploy.serve.bench.gpu_monitor import process_memory
from srdeploy.serve.bench.machine import MachineMonitor
from srdeploy.serve.bench.results import MachineReport
from tests.serve.bench.fake_nvml import FakeNvml, process


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """The GPU of this machine, CUDA's cuda:0."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(gpu_monitor, "pci_bus_id", lambda index: f"0000:{index:02}:00.0")
    return fake


def on_gpu(samples: int = 3) -> MachineReport:
    with MachineMonitor("cuda") as watch:
        for _ in range(samples):
            watch.sample()
    return watch.report()


def about_gpu(found: MachineReport) -> list[str]:
    """Whatever this machine's CPU does meanwhile is left out."""
    return [one for one in found.warnings if "GPU" in one]


def test_a_steady_gpu_has_figures_and_no_warnings(nvml: FakeNvml) -> None:
    nvml.processes = [process(sm_util=97)]
    before = int(time.time() * 1e6)
    found = on_gpu()
    assert about_gpu(found) == []
    told = {name: value for name, value in found.figures.items() if "GPU" in name}
    assert told == {
        "GPU": "NVIDIA L4",
        "GPU persistence mode": "on",
        "GPU SM clock": "1980 MHz (at most 2040 MHz)",
        "GPU memory clock": "6251 MHz (at most 6251 MHz)",
        "GPU temperature": "61 °C",
        "GPU power": "71 W (at most 72 W)",
        "GPU use by other processes": "0 %",
    }
    assert found.figures["NVIDIA driver"] == "580.95"
    assert nvml.since >= before
    assert nvml.opened == 0


def test_lowered_clocks_are_counted_by_their_reason(nvml: FakeNvml) -> None:
    nvml.clocks = [1980, 1410, 1700]
    nvml.reasons = [
        0,
        nvml.nvmlClocksEventReasonSwPowerCap,
        nvml.nvmlClocksEventReasonSwPowerCap | nvml.nvmlClocksEventReasonHwThermalSlowdown,
    ]
    found = on_gpu()
    capped, heat, moved = about_gpu(found)
    assert "lowered by power capping in 2 of 3 samples: lock them" in capped
    assert "lowered by heat (hardware) in 1 of 3 samples: cool it" in heat
    assert "moved between 1410 and 1980 MHz: lock it with nvidia-smi" in moved
    assert found.figures["GPU SM clock"] == "1410 to 1980, median 1700 MHz (at most 2040 MHz)"


def test_clocks_of_an_idle_moment_are_no_warning(nvml: FakeNvml) -> None:
    nvml.clocks = [1980, 210, 1980]
    nvml.reasons = [0, nvml.nvmlClocksEventReasonGpuIdle, 0]
    found = on_gpu()
    assert about_gpu(found) == []
    assert found.figures["GPU SM clock"].startswith("210 to 1980")


@pytest.mark.parametrize("old", ["driver", "package"])
def test_what_older_drivers_and_packages_call_throttling_counts_too(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, old: str
) -> None:
    nvml.reasons = [0x20, 0, 0]
    if old == "driver":
        nvml.refused.add("nvmlDeviceGetCurrentClocksEventReasons")
    else:
        monkeypatch.delattr(FakeNvml, "nvmlDeviceGetCurrentClocksEventReasons")
        for name in [name for name in vars(FakeNvml) if name.startswith("nvmlClocksEvent")]:
            older = name.replace("EventReason", "ThrottleReason")
            monkeypatch.setattr(FakeNvml, older, getattr(FakeNvml, name), raising=False)
            monkeypatch.delattr(FakeNvml, name)
    (warning,) = about_gpu(on_gpu())
    assert "lowered by heat (driver) in 1 of 3 samples" in warning


def test_what_a_gpu_does_not_tell_is_left_out(nvml: FakeNvml) -> None:
    nvml.refused = {
        "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetPersistenceMode",
        "nvmlDeviceGetProcessUtilization",
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
    }
    found = on_gpu()
    assert about_gpu(found) == []
    assert {name for name in found.figures if "GPU" in name} == {
        "GPU",
        "GPU SM clock",
        "GPU memory clock",
        "GPU temperature",
    }


def test_the_gpus_other_users_are_named_by_their_latest_share(nvml: FakeNvml) -> None:
    nvml.processes = [process(sm_util=60, when=2), process(20, 3, pid=1), process(90, 1, pid=1)]
    assert about_gpu(on_gpu()) == [
        "other processes used 20 % of the GPU: end them (nvidia-smi lists them)"
    ]


def test_foreign_process_numbers_tell_nothing_of_others(nvml: FakeNvml) -> None:
    nvml.processes = [process(sm_util=90, pid=1)]
    found = on_gpu()
    assert about_gpu(found) == []
    assert "GPU use by other processes" not in found.figures


def test_cudas_number_of_the_gpu_is_the_one_that_counts(nvml: FakeNvml) -> None:
    with MachineMonitor("cuda:1"):
        assert nvml.opened == 1
    assert nvml.asked_for == ["0000:01:00.0"]


def test_without_nvml_the_watch_warns(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.refused = {"nvmlInit"}
    (warning,) = about_gpu(on_gpu())
    assert "not known: NVML does not start (Not Supported): check the NVIDIA driver" in warning
    nvml.refused = {"nvmlDeviceGetHandleByPciBusId"}
    (warning,) = about_gpu(on_gpu())
    assert "NVML does not know the GPU cuda:0 at 0000:00:00.0" in warning
    assert nvml.opened == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (warning,) = about_gpu(on_gpu())
    assert "pip install tensorrt cuda-python nvidia-ml-py" in warning


def test_a_report_can_be_had_before_the_end_and_after_it(nvml: FakeNvml) -> None:
    with MachineMonitor("cuda") as watch:
        watch.sample()
        within = watch.report().figures["GPU SM clock"]
    assert watch.report().figures["GPU SM clock"] == within
    assert watch.report() is watch.report()


def test_a_process_has_the_memory_that_nvml_lists_for_it(nvml: FakeNvml) -> None:
    nvml.processes = [process(pid=1, memory=5), process(memory=7)]
    assert process_memory(0) == 7
    nvml.processes = [process(pid=1, memory=5)]
    assert process_memory(0) is None
    nvml.refused = {"nvmlDeviceGetComputeRunningProcesses"}
    assert process_memory(0) is None
    nvml.refused = {"nvmlInit"}
    assert process_memory(0) is None
    assert nvml.opened == 0


def test_names_arguments_and_constants_of_our_driver_are_nvmls() -> None:
    real = pytest.importorskip("pynvml", reason="no nvidia-ml-py: NVML's names were NOT compared")
    names = [name for name in vars(FakeNvml) if name.lower().startswith("nvml")]
    assert len(names) > 20
    for name in names:
        ours = getattr(FakeNvml(), name)
        theirs = getattr(real, name)
        if isinstance(ours, int):
            assert ours == theirs, name
        elif inspect.isfunction(theirs):
            assert list(inspect.signature(ours).parameters) == list(
                inspect.signature(theirs).parameters
            ), name
    for name, value in vars(FakeNvml).items():
        if name.startswith("nvmlClocksEventReason"):
            assert getattr(real, name.replace("EventReason", "ThrottleReason")) == value
    fields = dict(real.c_nvmlProcessUtilizationSample_t._fields_)
    assert {"pid", "smUtil", "timeStamp"} <= set(fields)
    assert {"pid", "usedGpuMemory"} <= {name for name, _ in real.c_nvmlProcessInfo_v3_t._fields_}


def test_a_gpus_place_is_that_of_cudas_number(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [b"0000:65:00.0\0", b"0000:17:00.0\0"]
    driver = SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
        CUdevice_attribute=SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
        ),
        cuDeviceGetCount=lambda: (0, 2),
        cuDeviceGet=lambda index: (0, index),
        cuDeviceGetAttribute=lambda attribute, device: (0, 8),
        cuDeviceGetName=lambda length, device: (0, b"NVIDIA L4\0"),
        cuDeviceTotalMem=lambda device: (0, 1),
        cuDeviceGetPCIBusId=lambda length, device: (0, places[device]),
    )
    monkeypatch.setattr(gpus, "_initialised", lambda: driver)
    assert gpus.pci_bus_id(1) == "0000:17:00.0"
    with pytest.raises(UserError, match="cuda:2 was asked for, but CUDA sees 2 GPUs"):
        gpus.pci_bus_id(2)
    real = pytest.importorskip("cuda.bindings.driver", reason="no cuda-python: NOT compared")
    assert all(hasattr(real, name) for name in vars(driver))
