"""CUDA's runtime API in Python: its names, its tuples, and its lack of hurry.

Work given to a stream runs only when somebody waits for that stream, and memory is full of garbage
until then: what is read without the order that CUDA asks for is read wrong, every time.
"""

import ctypes
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

GARBAGE = 0xCD
FREED = 0xDD
ALIGNMENT = 256
Work = Callable[[], None]


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaMemoryType(IntEnum):
    cudaMemoryTypeUnregistered = 0
    cudaMemoryTypeHost = 1
    cudaMemoryTypeDevice = 2
    cudaMemoryTypeManaged = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class Stream:
    """Work in order; `done` counts what has run."""

    def __init__(self) -> None:
        self.queue: list[Work] = []
        self.done = 0
        self.captured: list[Work] | None = None

    def add(self, work: Work) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def run(self, until: int | None = None) -> None:
        while self.done < (len(self.queue) if until is None else until):
            self.done += 1
            self.queue[self.done - 1]()


class Event:
    """The place in a stream where it was recorded, and the ticks that had passed there."""

    def __init__(self) -> None:
        self.at: tuple[Stream, int] | None = None
        self.time: float | None = None


class FakeCuda:
    """Has what serve uses of cuda.bindings.runtime, for `count` GPUs."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaMemoryType = cudaMemoryType
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1
    cudaEventDefault = 0
    cudaEventDisableTiming = 2

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.current = 0
        self.fails: dict[str, cudaError_t] = {}
        """Functions that fail at their next call, and how."""
        self.fail_at: int | None = None
        """Number of the call that fails, counted from 0."""
        self.calls: list[str] = []
        self.memory: dict[int, tuple[Any, int, int | None]] = {}
        """Address -> what owns it, bytes, GPU or None for pinned memory of the host."""
        self.freed: list[Any] = []  # kept, so that a late read finds 0xDD and no crash
        self.streams: dict[int, Stream] = {1: Stream(), 2: Stream()}
        self.events: set[Event] = set()
        self.graphs: list[Any] = []
        self.launchable: list[Any] = []
        self.ticks = 0.0
        self.cleared = 0

    def leaks(self) -> list[str]:
        """What was taken and not given back."""
        kinds = {
            "memory": self.memory,
            "streams": {key for key in self.streams if key > 2},
            "events": self.events,
            "graphs": self.graphs,
            "launchable graphs": self.launchable,
        }
        return [f"{len(held)} {kind}" for kind, held in kinds.items() if held]

    def write(self, address: int, content: np.ndarray, stream: int) -> None:
        """Work on a stream that makes an array, as another library would give it."""
        copy = np.ascontiguousarray(content).copy()

        def make() -> None:
            ctypes.memmove(address, copy.ctypes.data, copy.nbytes)

        self.streams[stream].add(make)

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """What is in memory now, whatever still waits to run."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)

    def tick(self, milliseconds: float) -> None:
        """What device work took; it calls this as it runs."""
        self.ticks += milliseconds

    # Devices

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return self._result("cudaGetDeviceCount", lambda: self.count)

    def cudaGetDevice(self) -> tuple[Any, ...]:
        return self._result("cudaGetDevice", lambda: self.current)

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        def choose() -> None:
            self.current = device

        return self._result("cudaSetDevice", choose)

    def cudaGetLastError(self) -> tuple[Any, ...]:
        self.cleared += 1
        return (cudaError_t.cudaSuccess,)

    def cudaGetErrorString(self, error: IntEnum) -> tuple[Any, ...]:
        return (cudaError_t.cudaSuccess, f"the text of {int(error)}".encode())

    # Memory

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._result("cudaMalloc", lambda: self._take(size, self.current))

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        return self._result("cudaMallocHost", lambda: self._take(size, None))

    def cudaFree(self, devPtr: int) -> tuple[Any, ...]:
        def free() -> None:
            for stream in self.streams.values():
                stream.run()  # it waits for everything, as the real one
            self._give_back(devPtr, host=False)

        return self._result("cudaFree", free)

    def cudaFreeHost(self, ptr: int) -> tuple[Any, ...]:
        return self._result("cudaFreeHost", lambda: self._give_back(ptr, host=True))

    def cudaPointerGetAttributes(self, ptr: int) -> tuple[Any, ...]:
        def look() -> SimpleNamespace:
            for start, (_, size, device) in self.memory.items():
                if start <= ptr < start + size:
                    kinds = cudaMemoryType
                    kind = kinds.cudaMemoryTypeHost
                    if device is not None:
                        kind = kinds.cudaMemoryTypeDevice
                    return SimpleNamespace(type=kind, device=device or 0)
            return SimpleNamespace(type=cudaMemoryType.cudaMemoryTypeUnregistered, device=-2)

        return self._result("cudaPointerGetAttributes", look)

    def cudaMemcpy(self, dst: int, src: int, count: int, kind: Any) -> tuple[Any, ...]:
        assert isinstance(kind, cudaMemcpyKind)
        # Non-blocking streams are not waited for.
        return self._result("cudaMemcpy", lambda: (ctypes.memmove(dst, src, count), None)[1])

    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: Any, stream: int
    ) -> tuple[Any, ...]:
        down = kind is cudaMemcpyKind.cudaMemcpyHostToDevice
        host, device = (src, dst) if down else (dst, src)
        assert self._owner(host, count) is None, "the host's side must be pinned"
        assert self._owner(device, count) is not None

        def copy() -> None:
            self.tick(1.0 if down else 4.0)
            ctypes.memmove(dst, src, count)

        return self._result("cudaMemcpyAsync", lambda: self.streams[stream].add(copy))

    # Streams and events

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        def create() -> int:
            handle = 0x1000 + 16 * len(self.streams)
            self.streams[handle] = Stream()
            return handle

        return self._result("cudaStreamCreateWithFlags", create)

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        def destroy() -> None:
            self.streams.pop(stream).run()

        return self._result("cudaStreamDestroy", destroy)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        return self._result("cudaStreamSynchronize", lambda: self.streams[stream].run())

    def cudaStreamWaitEvent(self, stream: int, event: Event, flags: int) -> tuple[Any, ...]:
        assert event in self.events
        at = event.at

        def wait() -> None:
            if at is not None:
                at[0].run(at[1])

        return self._result("cudaStreamWaitEvent", lambda: self.streams[stream].add(wait))

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        def create() -> Event:
            event = Event()
            self.events.add(event)
            return event

        return self._result("cudaEventCreateWithFlags", create)

    def cudaEventRecord(self, event: Event, stream: int) -> tuple[Any, ...]:
        def record() -> None:
            own = self.streams[stream]

            def reach() -> None:
                event.time = self.ticks

            own.add(reach)
            event.at = (own, len(own.queue))

        return self._result("cudaEventRecord", record)

    def cudaEventElapsedTime(self, start: Event, end: Event) -> tuple[Any, ...]:
        def measure() -> float:
            assert start.time is not None
            assert end.time is not None
            return end.time - start.time

        return self._result("cudaEventElapsedTime", measure)

    def cudaEventDestroy(self, event: Event) -> tuple[Any, ...]:
        return self._result("cudaEventDestroy", lambda: self.events.remove(event))

    # Graphs

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any, ...]:
        assert isinstance(mode, cudaStreamCaptureMode)

        def begin() -> None:
            self.streams[stream].captured = []

        return self._result("cudaStreamBeginCapture", begin)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        def end() -> list[Work] | None:
            own = self.streams[stream]
            graph, own.captured = own.captured, None
            self.graphs.append(graph)
            return graph

        return self._result("cudaStreamEndCapture", end)

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[Any, ...]:
        def instantiate() -> list[Work]:
            made = list(graph)
            self.launchable.append(made)
            return made

        return self._result("cudaGraphInstantiate", instantiate)

    def cudaGraphDestroy(self, graph: list[Work]) -> tuple[Any, ...]:
        return self._result("cudaGraphDestroy", lambda: _remove(self.graphs, graph))

    def cudaGraphLaunch(self, graphExec: list[Work], stream: int) -> tuple[Any, ...]:
        def launch() -> None:
            assert any(graphExec is one for one in self.launchable)
            for work in graphExec:
                self.streams[stream].add(work)

        return self._result("cudaGraphLaunch", launch)

    def cudaGraphExecDestroy(self, graphExec: list[Work]) -> tuple[Any, ...]:
        return self._result("cudaGraphExecDestroy", lambda: _remove(self.launchable, graphExec))

    def _result(self, name: str, work: Callable[[], Any]) -> tuple[Any, ...]:
        """(code, value), or the code alone for functions without a value."""
        self.calls.append(name)
        failing = len(self.calls) - 1 == self.fail_at
        if name in self.fails or failing:
            if "Free" in name or "Destroy" in name:
                work()  # it frees all the same: the code is that of earlier work
            elif name == "cudaStreamEndCapture":
                for stream in self.streams.values():
                    stream.captured = None  # it ends all the same, without a graph
            return (self.fails.pop(name, cudaError_t.cudaErrorInvalidValue), None)
        capturing = any(stream.captured is not None for stream in self.streams.values())
        if capturing and name in ("cudaMalloc", "cudaFree", "cudaStreamSynchronize"):
            return (cudaError_t.cudaErrorStreamCaptureUnsupported, None)
        value = work()
        return (cudaError_t.cudaSuccess,) if value is None else (cudaError_t.cudaSuccess, value)

    def _take(self, size: int, device: int | None) -> int:
        assert size > 0
        owner = (ctypes.c_uint8 * (size + ALIGNMENT))()
        address = -(-ctypes.addressof(owner) // ALIGNMENT) * ALIGNMENT
        ctypes.memset(address, GARBAGE, size)
        self.memory[address] = (owner, size, device)
        return address

    def _give_back(self, address: int, host: bool) -> None:
        owner, size, device = self.memory.pop(address)
        assert (device is None) == host
        ctypes.memset(address, FREED, size)
        self.freed.append(owner)

    def _owner(self, address: int, count: int) -> int | None:
        """The GPU that memory is on. Raises AssertionError outside of all that was taken."""
        for start, (_, size, device) in self.memory.items():
            if start <= address and address + count <= start + size:
                return device
        raise AssertionError(f"{count} bytes at {address:#x} are nobody's")


def _remove(held: list[Any], one: Any) -> None:
    (index,) = [index for index, other in enumerate(held) if other is one]
    del held[index]
