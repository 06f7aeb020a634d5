"""Memory that runs share: it grows to the largest that was asked for, and is reused."""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from srdeploy.serve.cuda_runtime import Cuda


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
    """Memory of the host that the GPU copies from and to by itself, while the CPU goes on."""

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
