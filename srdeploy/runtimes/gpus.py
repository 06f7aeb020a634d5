"""The NVIDIA GPUs of this machine, through the driver, without torch or TensorRT."""

from dataclasses import dataclass
from typing import Any

from srdeploy.errors import MissingPackageError, UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU as CUDA counts them, so that CUDA_VISIBLE_DEVICES is respected."""

    index: int
    name: str
    memory_bytes: int
    compute_capability: str
    """E.g. "8.9"."""


def list_gpus() -> tuple[Gpu, ...]:
    """Every GPU that CUDA sees; none where there are none.

    Raises MissingPackageError without CUDA's Python package, UserError without a driver.
    """
    cuda = _initialised()
    return tuple(_describe(cuda, index) for index in range(_checked(cuda, cuda.cuDeviceGetCount())))


def find_gpu(index: int) -> Gpu:
    """The GPU cuda:`index`. Raises UserError where it is absent, and as list_gpus."""
    gpus = list_gpus()
    if index >= len(gpus):
        raise UserError(f"device cuda:{index} was asked for, but CUDA sees {len(gpus)} GPUs")
    return gpus[index]


def pci_bus_id(index: int) -> str:
    """Where the GPU cuda:`index` sits, e.g. "0000:65:00.0": what other libraries know it by.
    Raises as find_gpu."""
    find_gpu(index)
    cuda = _initialised()
    text = _checked(cuda, cuda.cuDeviceGetPCIBusId(32, _checked(cuda, cuda.cuDeviceGet(index))))
    return str(text.split(b"\0", 1)[0].decode())


def cuda_driver_version() -> str:
    """Newest CUDA version that the driver runs, e.g. "13.0". Raises as list_gpus."""
    cuda = _initialised()
    version = _checked(cuda, cuda.cuDriverGetVersion())
    return f"{version // 1000}.{version % 1000 // 10}"


def _initialised() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingPackageError("cuda-python", "tensorrt", "asking CUDA for its GPUs") from error
    try:
        code = driver.cuInit(0)[0]
    except RuntimeError as error:  # the library itself is absent
        raise UserError(
            "no NVIDIA driver on this machine (libcuda is absent): install it"
        ) from error
    if code == driver.CUresult.CUDA_ERROR_NO_DEVICE:
        return driver
    _checked(driver, (code,))
    return driver


def _describe(cuda: Any, index: int) -> Gpu:
    handle = _checked(cuda, cuda.cuDeviceGet(index))
    attribute = cuda.CUdevice_attribute
    major = _checked(
        cuda,
        cuda.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle),
    )
    minor = _checked(
        cuda,
        cuda.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle),
    )
    name = _checked(cuda, cuda.cuDeviceGetName(128, handle))
    return Gpu(
        index=index,
        name=name.split(b"\0", 1)[0].decode(),
        memory_bytes=int(_checked(cuda, cuda.cuDeviceTotalMem(handle))),
        compute_capability=f"{major}.{minor}",
    )


def _checked(cuda: Any, result: tuple[Any, ...]) -> Any:
    """The value of a call, which comes as (code, value). Raises UserError for other codes."""
    code, *values = result
    if code != cuda.CUresult.CUDA_SUCCESS:
        raise UserError(f"CUDA fails on this machine ({code.name}): check the NVIDIA driver")
    return values[0] if values else None
