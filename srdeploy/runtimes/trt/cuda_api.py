"""CUDA's runtime API, checked: what fails becomes one line that says what to do.

Streams are plain handles (int) here, events and graphs what the bindings return.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from srdeploy.artifacts.artifact import Builder
from srdeploy.errors import MissingPackageError, UserError

LEGACY_STREAM = 1
"""Handle of the legacy default stream, in CUDA as in __cuda_array_interface__."""

_LOST = (
    "cudaErrorIllegalAddress",
    "cudaErrorLaunchFailure",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalInstruction",
    "cudaErrorMisalignedAddress",
    "cudaErrorECCUncorrectable",
    "cudaErrorAssert",
)
"""After these, every further call of the process fails."""


class CudaMemoryError(UserError):
    """The GPU's memory, or the memory that can be pinned, does not suffice."""


def import_cuda_runtime(extra: Builder) -> Any:
    """The bindings of CUDA's runtime API. Raises MissingPackageError with the pip line of `extra`.

    cuda-python named them cuda.cudart until 12.6.0.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        try:
            from cuda import cudart
        except ImportError as error:
            raise MissingPackageError("cuda-python", extra, "running a TensorRT engine") from error
        return cudart
    return runtime


class Cuda:
    """One GPU through `api`, the module of import_cuda_runtime or one with its functions.

    Whatever takes memory or waits raises UserError where it fails, CudaMemoryError where memory
    does not suffice. What frees never raises: a code returned there speaks of earlier work.
    """

    def __init__(self, api: Any, index: int) -> None:
        """Raises UserError where there is no driver or no GPU `index`."""
        self.api = api
        self.index = index
        self.device = f"cuda:{index}"
        try:
            counted = api.cudaGetDeviceCount()
        except RuntimeError as error:  # bindings of CUDA 12, where the driver's library is absent
            raise UserError(
                f"device {self.device} was asked for, but there is no NVIDIA driver on this "
                "machine: install it (nvidia-smi shows it)"
            ) from error
        count = self._checked(counted, "asking for the GPUs")
        if index >= count:
            raise UserError(
                f"device {self.device} was asked for, but CUDA sees {count} GPUs: see nvidia-smi "
                "and CUDA_VISIBLE_DEVICES"
            )

    @contextmanager
    def on_device(self, freeing: bool = False) -> Iterator[None]:
        """Makes this GPU the calling thread's; the caller's own is his again afterwards.

        Where it is the thread's already, nothing is touched, so that a context that other
        libraries made for it (pycuda's) stays current. freeing: go on where CUDA refuses.
        """
        before = self.index
        try:
            before = self._checked(self.api.cudaGetDevice(), "asking for the current GPU")
            if before != self.index:
                self._checked(self.api.cudaSetDevice(self.index), f"choosing {self.device}")
        except UserError:
            if not freeing:
                raise
        try:
            yield
        finally:
            if before != self.index:
                self.api.cudaSetDevice(before)

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the GPU."""
        doing = f"reserving {size:,} bytes"
        return int(self._checked(self.api.cudaMalloc(size), doing))

    def free(self, address: int) -> None:
        """Waits for the GPU's work on all streams, then frees."""
        self.api.cudaFree(address)

    def allocate_pinned(self, size: int) -> int:
        """Address of `size` bytes of the host's memory that the GPU copies from and to itself."""
        doing = f"pinning {size:,} bytes of the host's memory"
        return int(self._checked(self.api.cudaMallocHost(size), doing))

    def free_pinned(self, address: int) -> None:
        """Frees what allocate_pinned gave."""
        self.api.cudaFreeHost(address)

    def memory_device(self, address: int) -> int | None:
        """The index of the GPU whose memory `address` is in; None for memory of the host."""
        found = self._checked(self.api.cudaPointerGetAttributes(address), "looking at an address")
        kinds = self.api.cudaMemoryType
        if found.type in (kinds.cudaMemoryTypeDevice, kinds.cudaMemoryTypeManaged):
            return int(found.device)
        return None

    def copy_to_device(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueues a copy from the host's memory, pinned."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        copied = self.api.cudaMemcpyAsync(target, source, size, kind, stream)
        self._checked(copied, "copying to the GPU")

    def copy_to_host(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueues a copy to the host's memory, pinned."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        copied = self.api.cudaMemcpyAsync(target, source, size, kind, stream)
        self._checked(copied, "copying from the GPU")

    def fetch(self, target: int, source: int, size: int) -> None:
        """Copies to any memory of the host, at once; what wrote `source` must be done."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._checked(self.api.cudaMemcpy(target, source, size, kind), "copying from the GPU")

    def new_stream(self) -> int:
        """A stream that waits for no other one by itself."""
        flags = self.api.cudaStreamNonBlocking
        return int(self._checked(self.api.cudaStreamCreateWithFlags(flags), "creating a stream"))

    def free_stream(self, stream: int) -> None:
        """Frees what new_stream gave."""
        self.api.cudaStreamDestroy(stream)

    def synchronize(self, stream: int) -> None:
        """Waits until the stream's work is done. Its failures arrive here."""
        self._checked(self.api.cudaStreamSynchronize(stream), "computing on the GPU")

    def drain(self, stream: int) -> None:
        """synchronize for cleaning up after an error: says nothing of further ones."""
        self.api.cudaStreamSynchronize(stream)

    def order(self, first: int, then: int) -> None:
        """What `then` is given from now on waits, on the GPU, for what `first` was given so far."""
        if first == then:
            return
        flags = self.api.cudaEventDisableTiming
        event = self._checked(self.api.cudaEventCreateWithFlags(flags), "creating an event")
        try:
            self._checked(self.api.cudaEventRecord(event, first), f"using the stream {first:#x}")
            self._checked(
                self.api.cudaStreamWaitEvent(then, event, 0), f"using the stream {then:#x}"
            )
        finally:
            # Destroying it at once is allowed: CUDA keeps it until the waiting is over.
            self.api.cudaEventDestroy(event)

    def record(self, stream: int) -> Any:
        """A new event that keeps the time at which `stream` reaches it."""
        flags = self.api.cudaEventDefault
        event = self._checked(self.api.cudaEventCreateWithFlags(flags), "creating an event")
        try:
            self._checked(self.api.cudaEventRecord(event, stream), "recording an event")
        except UserError:
            self.free_event(event)
            raise
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Device time from one event to another; both must have been reached."""
        return float(self._checked(self.api.cudaEventElapsedTime(start, end), "reading events"))

    def free_event(self, event: Any) -> None:
        """Frees what record gave."""
        self.api.cudaEventDestroy(event)

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """What `enqueue` gives to `stream`, as a graph that can be launched; nothing runs yet."""
        mode = self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._checked(self.api.cudaStreamBeginCapture(stream, mode), "capturing")
        try:
            enqueue()
        except BaseException:
            # The stream must leave its capture, or it takes no further work.
            code, graph = self.api.cudaStreamEndCapture(stream)
            if code == self.api.cudaError_t.cudaSuccess:
                self.api.cudaGraphDestroy(graph)
            raise
        graph = self._checked(self.api.cudaStreamEndCapture(stream), "capturing")
        try:
            return self._checked(self.api.cudaGraphInstantiate(graph, 0), "capturing")
        finally:
            self.api.cudaGraphDestroy(graph)

    def launch(self, graph: Any, stream: int) -> None:
        """Enqueues what capture gave."""
        self._checked(self.api.cudaGraphLaunch(graph, stream), "launching a CUDA graph")

    def free_graph(self, graph: Any) -> None:
        """Frees what capture gave."""
        self.api.cudaGraphExecDestroy(graph)

    def _checked(self, result: tuple[Any, ...], doing: str) -> Any:
        """The value of a call, which comes as (code, value). Raises UserError for other codes."""
        code, *values = result
        if code == self.api.cudaError_t.cudaSuccess:
            return values[0] if values else None
        # Libraries that ask CUDA for its last error must not take this one for theirs.
        self.api.cudaGetLastError()
        raise self._explained(code, doing)

    def _explained(self, code: Any, doing: str) -> UserError:
        name = str(getattr(code, "name", code))
        if name == "cudaErrorMemoryAllocation":
            return CudaMemoryError(
                f"out of memory on {self.device} while {doing}: use smaller images or a smaller "
                "batch, or end what else runs there (nvidia-smi lists it)"
            )
        if name == "cudaErrorNoDevice":
            return UserError(
                f"device {self.device} was asked for, but CUDA sees no GPU: see nvidia-smi and "
                "CUDA_VISIBLE_DEVICES"
            )
        if name == "cudaErrorInsufficientDriver":
            return UserError(
                f"device {self.device} was asked for, but the NVIDIA driver is absent or too old "
                "for this cuda-python: install or update it (nvidia-smi shows the CUDA version "
                "that it offers)"
            )
        text = self.api.cudaGetErrorString(code)[1]
        text = text.decode() if isinstance(text, bytes) else str(text)
        remedy = "start the process again" if name in _LOST else "check the NVIDIA driver"
        return UserError(f"CUDA failed on {self.device} while {doing} ({name}: {text}): {remedy}")


# Reusable memory


class DeviceBuffer:
    """Memory on the GPU. It moves where it grows."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.address = 0
        self.capacity = 0
        """Bytes."""

    def fit(self, size: int) -> int:
        """The address of at least `size` bytes; what they held is lost where it had to grow.

        Raises CudaMemoryError; the buffer is empty then, and can be asked again.
        """
        if size > self.capacity:
            self.free()
            self.address = self._allocate(size)
            self.capacity = size
        return self.address

    def free(self) -> None:
        """Gives the memory back; fit takes it anew."""
        if self.capacity:
            address, self.address, self.capacity = self.address, 0, 0
            self._release(address)

    def _allocate(self, size: int) -> int:
        return self._cuda.allocate(size)

    def _release(self, address: int) -> None:
        self._cuda.free(address)


class PinnedBuffer(DeviceBuffer):
    """Memory of the host that the GPU copies from and to by itself, while the CPU continues."""

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Its first bytes as an array, valid until the buffer grows or is freed."""
        size = array_bytes(shape, dtype)
        return host_array(self.fit(size), shape, dtype)

    def _allocate(self, size: int) -> int:
        return self._cuda.allocate_pinned(size)

    def _release(self, address: int) -> None:
        self._cuda.free_pinned(address)


def array_bytes(shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    """Bytes of a contiguous array."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def host_array(address: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The host's memory at `address` as an array, without a copy; the caller keeps it alive."""
    memory = (ctypes.c_uint8 * array_bytes(shape, dtype)).from_address(address)
    return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)


# Device timing


class DeviceClock:
    """Marks where phases begin on a stream. A context manager; read comes before it ends."""

    def __init__(self, cuda: Cuda, stream: int) -> None:
        self._cuda = cuda
        self._stream = stream
        self._events = ExitStack()
        self._marks: list[tuple[str | None, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    def mark(self, phase: str | None) -> None:
        """What the stream is given from here on belongs to `phase`; None: to none."""
        event = self._cuda.record(self._stream)
        self._events.callback(self._cuda.free_event, event)
        self._marks.append((phase, event))

    def read(self, phases: Sequence[str]) -> dict[str, float]:
        """Milliseconds by phase, 0 where it was not marked; the stream must be idle."""
        times = dict.fromkeys(phases, 0.0)
        for (phase, start), (_, end) in pairwise(self._marks):
            if phase is not None:
                times[phase] += self._cuda.milliseconds(start, end)
        return times
