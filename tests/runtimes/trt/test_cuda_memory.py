"""Memory is reused and freed; streams wait for each other where they are told to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srdeploy.errors import UserError
from srdeploy.runtimes.trt.cuda_api import (
    Cuda,
    CudaMemoryError,
    DeviceBuffer,
    DeviceClock,
    PinnedBuffer,
)
from tests.runtimes.trt.fake_cuda import FakeCuda, cudaError_t


@pytest.mark.parametrize("kind", [DeviceBuffer, PinnedBuffer])
@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=12))
def test_a_buffer_grows_to_the_largest_and_is_reused(
    kind: type[DeviceBuffer], sizes: list[int]
) -> None:
    api = FakeCuda()
    buffer = kind(Cuda(api, 0))
    records = 0
    largest = 0
    for size in sizes:
        address = buffer.fit(size)
        records += size > largest
        largest = max(largest, size)
        ((held, (_, capacity, _)),) = api.memory.items()
        assert (held, capacity) == (address, largest)
    taken = [name for name in api.calls if name in ("cudaMalloc", "cudaMallocHost")]
    assert len(taken) == records
    buffer.free()
    buffer.free()
    assert api.leaks() == []
    assert buffer.fit(1) != 0
    buffer.free()


def test_a_buffer_without_memory_is_empty_and_can_be_asked_again(api: FakeCuda, cuda: Cuda) -> None:
    buffer = DeviceBuffer(cuda)
    buffer.fit(10)
    api.fails["cudaMalloc"] = cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(CudaMemoryError, match=r"out of memory on cuda:0 .*2,000 bytes.*smaller"):
        buffer.fit(2000)
    assert (buffer.address, buffer.capacity) == (0, 0)
    assert api.leaks() == []
    assert buffer.fit(20) in api.memory
    buffer.free()


def test_pinned_memory_is_an_array(api: FakeCuda, cuda: Cuda) -> None:
    buffer = PinnedBuffer(cuda)
    array = buffer.array((2, 3), np.float32)
    array[:] = [[1, 2, 3], [4, 5, 6]]
    assert (api.read(buffer.address, (6,), np.float32) == [1, 2, 3, 4, 5, 6]).all()
    again = buffer.array((5,), np.uint8)
    assert again.ctypes.data == array.ctypes.data
    buffer.free()


def test_order_makes_one_stream_wait_for_the_other(api: FakeCuda, cuda: Cuda) -> None:
    first, then = cuda.new_stream(), cuda.new_stream()
    address = cuda.allocate(4)
    api.write(address, np.array([1], np.int32), first)
    seen: list[int] = []
    cuda.order(first, then)
    api.write(address, np.array([2], np.int32), first)  # later work is not waited for
    api.streams[then].add(lambda: seen.append(int(api.read(address, (1,), np.int32)[0])))
    cuda.synchronize(then)
    assert seen == [1]
    cuda.order(first, first)
    assert api.calls.count("cudaEventRecord") == 1
    cuda.free(address)
    cuda.free_stream(first)
    cuda.free_stream(then)


def test_no_event_stays_where_ordering_fails(api: FakeCuda, cuda: Cuda) -> None:
    api.fails["cudaEventRecord"] = cudaError_t.cudaErrorInvalidValue
    with pytest.raises(UserError, match="using the stream 0x1"):
        cuda.order(1, 2)
    api.fails["cudaEventRecord"] = cudaError_t.cudaErrorInvalidValue
    with pytest.raises(UserError, match="recording an event"):
        cuda.record(1)


def test_a_stream_leaves_its_capture_where_capturing_fails(api: FakeCuda, cuda: Cuda) -> None:
    stream = cuda.new_stream()

    def broken() -> None:
        raise UserError("refused")

    with pytest.raises(UserError, match="refused"):
        cuda.capture(stream, broken)
    assert api.streams[stream].captured is None
    api.fails["cudaGraphInstantiate"] = cudaError_t.cudaErrorInvalidValue
    with pytest.raises(UserError, match="capturing"):
        cuda.capture(stream, lambda: None)
    cuda.free_stream(stream)


def test_a_clock_adds_up_the_phases(api: FakeCuda, cuda: Cuda) -> None:
    stream = cuda.new_stream()
    with DeviceClock(cuda, stream) as clock:
        for milliseconds in (1.0, 2.0):
            clock.mark("a")
            api.streams[stream].add(lambda time=milliseconds: api.tick(time))  # type: ignore[misc]
            clock.mark(None)
            api.streams[stream].add(lambda: api.tick(50.0))
        clock.mark("b")
        clock.mark(None)
        cuda.synchronize(stream)
        assert clock.read(["a", "b", "c"]) == {"a": 3.0, "b": 0.0, "c": 0.0}
    cuda.free_stream(stream)
