"""Arrays on the GPU, exchanged with CuPy, torch, pycuda and others without copies.

The protocol is __cuda_array_interface__, versions 2 and 3:
https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from srdeploy.errors import UserError
from srdeploy.runtimes.trt.cuda_api import LEGACY_STREAM, Cuda, array_bytes


@dataclass(frozen=True)
class DeviceView:
    """A contiguous array of somebody else on the GPU."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    ready_on: int | None
    """Handle of the stream whose work so far makes the array; None: it is ready."""


class Stream:
    """The stream of a runtime, as arrays that it made name it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.is_open = True
        """False once it was waited for and freed."""


def read_interface(value: object, what: str = "images") -> DeviceView:
    """What `value` says of itself. Raises UserError where it is not an array that can be used."""
    try:
        interface = getattr(value, "__cuda_array_interface__", None)
    except (RuntimeError, TypeError) as error:  # torch: a tensor that requires grad
        raise UserError(
            f"the {what} don't give their memory away ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(interface, Mapping):
        raise UserError(
            f"the {what} ({type(value).__name__}) are no array on a GPU (no "
            "__cuda_array_interface__): use run for arrays in the host's memory"
        )
    try:
        shape = tuple(int(size) for size in interface["shape"])
        dtype = np.dtype(interface["typestr"])
        address = int(interface["data"][0])
        version = int(interface["version"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"the {what} ({type(value).__name__}) have a __cuda_array_interface__ that can't be "
            f"read ({type(error).__name__}: {error})"
        ) from error
    if version < 2:
        raise UserError(
            f"the {what} have a __cuda_array_interface__ of version {version}: 2 or 3 is needed"
        )
    if interface.get("mask") is not None:
        raise UserError(f"the {what} are masked, and masks are not understood: give them without")
    strides = interface.get("strides")
    if strides is not None and not _is_contiguous(shape, dtype.itemsize, tuple(strides)):
        raise UserError(
            f"the {what} {list(shape)} are not contiguous (strides {list(strides)} bytes): "
            "make a C-contiguous copy of them first"
        )
    if 0 not in shape and address == 0:
        raise UserError(f"the {what} {list(shape)} have no memory (their address is 0)")
    return DeviceView(address, shape, dtype, _ready_on(interface, version, what))


def _is_contiguous(shape: tuple[int, ...], itemsize: int, strides: tuple[int, ...]) -> bool:
    """In C's order. Where there is one element along an axis, or none at all, its stride means
    nothing."""
    if len(strides) != len(shape):
        return False
    if 0 in shape:
        return True
    expected = itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _ready_on(interface: Mapping[str, Any], version: int, what: str) -> int | None:
    """Version 2 says nothing of streams: then the legacy default stream is waited for, which
    itself waits for the streams that other libraries create by default."""
    if version < 3:
        return LEGACY_STREAM
    stream = interface.get("stream")
    if stream is None:
        return None
    if isinstance(stream, bool) or not isinstance(stream, int) or stream < 1:
        raise UserError(
            f"the {what} name the stream {stream!r}: the protocol has None, 1, 2 or a handle, "
            "and 0 is ambiguous"
        )
    return stream


def stream_handle(stream: object) -> int:
    """The handle of an int, or of a stream of torch, CuPy, pycuda or cuda.core.

    0, as torch calls the default stream, is the legacy default stream. Raises UserError for
    anything else.
    """
    handle: Any = stream
    if hasattr(stream, "__cuda_stream__"):
        own = stream.__cuda_stream__  # a method; a property in early versions of cuda.core
        handle = (own() if callable(own) else own)[1]
    else:
        for name in ("cuda_stream", "ptr", "handle"):  # torch, CuPy, pycuda
            if hasattr(stream, name):
                handle = getattr(stream, name)
                break
    if isinstance(handle, bool) or not isinstance(handle, int) or handle < 0:
        raise UserError(
            f"stream {stream!r}: a handle (int) or a stream of torch, CuPy, pycuda or cuda.core "
            "is needed"
        )
    return handle or LEGACY_STREAM


class DeviceArray:
    """An array on the GPU that owns its memory, as a runtime returns it.

    Its content is there once the work that the runtime's stream was given is done. Consumers of
    __cuda_array_interface__ version 3 wait for it by themselves; for others, and before anything
    else touches the memory, call synchronize, or give run_device the stream that uses it next.
    The images it was computed from are kept alive until then.
    """

    def __init__(
        self,
        cuda: Cuda,
        stream: Stream,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        source: object,
    ) -> None:
        """Reserves the memory. Raises CudaMemoryError."""
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._cuda = cuda
        self._stream = stream
        self._source: object = source
        self._address = cuda.allocate(self.nbytes)
        self._free = weakref.finalize(self, _free, cuda, self._address)
        self._free.atexit = False  # with the process, the driver frees everything

    @property
    def nbytes(self) -> int:
        """Bytes of its memory."""
        return array_bytes(self.shape, self.dtype)

    @property
    def address(self) -> int:
        """Where it lies on the GPU. Raises UserError once it was freed."""
        if not self._free.alive:
            raise UserError(f"the array {list(self.shape)} was freed: take what you need before")
        return self._address

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            "stream": self._stream.handle if self._stream.is_open else None,
        }

    def synchronize(self) -> None:
        """Waits until its content is there. Raises UserError where computing it failed."""
        if self._stream.is_open:
            self._cuda.synchronize(self._stream.handle)
        self._source = None

    def numpy(self) -> npt.NDArray[Any]:
        """A copy in the host's memory."""
        address = self.address
        with self._cuda.on_device():
            self.synchronize()
            copy = np.empty(self.shape, self.dtype)
            self._cuda.fetch(copy.ctypes.data, address, self.nbytes)
        return copy

    def free(self) -> None:
        """Gives the memory back now, rather than with the last reference to the array."""
        self._free()
        self._source = None

    def __repr__(self) -> str:
        return f"DeviceArray({list(self.shape)}, {self.dtype}, {self._cuda.device})"


def _free(cuda: Cuda, address: int) -> None:
    with cuda.on_device(freeing=True):
        cuda.free(address)
