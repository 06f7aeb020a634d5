"""CUDA from Python: codes become lines, memory is reused and freed, arrays keep the order of
streams."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srdeploy.errors import UserError
from srdeploy.serve.cuda_array import DeviceArray, Stream, read_interface, stream_handle
from srdeploy.serve.cuda_clock import DeviceClock
from srdeploy.serve.cuda_memory import DeviceBuffer, PinnedBuffer
from srdeploy.serve.cuda_runtime import Cuda, CudaMemoryError, import_cuda_runtime
from tests.serve.fake_cuda import FREED, GARBAGE, FakeCuda, cudaError_t

SOURCES = sorted(Path(__file__).parents[2].glob("serve/cuda_*.py"))


@pytest.fixture
def api() -> Iterator[FakeCuda]:
    """CUDA with one GPU; everything must have been given back in the end."""
    fake = FakeCuda()
    yield fake
    assert fake.leaks() == []


@pytest.fixture
def cuda(api: FakeCuda) -> Cuda:
    return Cuda(api, 0)


def bindings() -> Any:
    return pytest.importorskip(
        "cuda.bindings.runtime", reason="no cuda-python here: its names were NOT compared"
    )


# The names


def used_names() -> set[tuple[str, int | None]]:
    """Everything that is asked of the bindings: dotted name, and the number of arguments where it
    is called."""
    found: set[tuple[str, int | None]] = set()
    for source in SOURCES:
        tree = ast.parse(source.read_text())
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                dotted = ast.unparse(node)
                name = re.fullmatch(r"(?:self\._?)?(?:api|kinds)\.(cuda[\w.]+)", dotted)
                if name is None:
                    continue
                call = calls.get(id(node))
                assert call is None or not call.keywords
                if dotted.startswith("kinds."):
                    found.add((f"cudaMemoryType.{name[1]}", None))
                else:
                    found.add((name[1], len(call.args) if call else None))
    return found


def test_every_name_and_number_of_arguments_is_that_of_the_real_bindings() -> None:
    real: Any = bindings()
    fake: Any = FakeCuda()
    used = used_names()
    assert len(used) > 30
    for dotted, arguments in used:
        there, imitated = real, fake
        for name in dotted.split("."):
            there, imitated = getattr(there, name), getattr(imitated, name)
        if arguments is None:
            if not callable(there):
                assert int(there) == int(imitated), dotted
            continue
        signature = str(there.__doc__).splitlines()[0]
        parameters = re.fullmatch(rf"{dotted}\((.*)\)", signature)
        assert parameters is not None, signature
        assert len([one for one in parameters[1].split(",") if one]) == arguments, signature


def test_the_codes_of_the_fake_are_those_of_the_real_bindings() -> None:
    real = bindings()
    for code in cudaError_t:
        assert getattr(real.cudaError_t, code.name).value == code.value


def test_the_real_bindings_take_what_they_are_given() -> None:
    """Every call reaches the driver, which is absent, and no complaint about its arguments."""
    real = bindings()
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU: arguments are checked by the real test instead")

    class Counting:
        """The real bindings, but for the first question."""

        def cudaGetDeviceCount(self) -> tuple[Any, ...]:
            return (real.cudaError_t.cudaSuccess, 1)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    cuda = Cuda(Counting(), 0)
    event, graph = real.cudaEvent_t(0), real.cudaGraphExec_t(0)
    refused: list[Any] = [
        lambda: cuda.allocate(64),
        lambda: cuda.allocate_pinned(64),
        lambda: cuda.memory_device(4096),
        lambda: cuda.copy_to_device(4096, 8192, 64, 16),
        lambda: cuda.copy_to_host(4096, 8192, 64, 16),
        lambda: cuda.fetch(4096, 8192, 64),
        lambda: cuda.new_stream(),
        lambda: cuda.synchronize(16),
        lambda: cuda.order(1, 16),
        lambda: cuda.record(16),
        lambda: cuda.milliseconds(event, event),
        lambda: cuda.capture(16, lambda: None),
        lambda: cuda.launch(graph, 16),
        lambda: cuda.on_device().__enter__(),
        lambda: cuda._checked(real.cudaSetDevice(0), "choosing"),
        lambda: cuda._checked(real.cudaEventRecord(event, 16), "recording"),
        lambda: cuda._checked(real.cudaStreamWaitEvent(16, event, 0), "waiting"),
        lambda: cuda._checked(real.cudaStreamEndCapture(16), "capturing"),
        lambda: cuda._checked(real.cudaGraphInstantiate(real.cudaGraph_t(0), 0), "capturing"),
    ]
    for call in refused:
        with pytest.raises(UserError, match="NVIDIA driver is absent or too old"):
            call()
    cuda.free(4096)
    cuda.free_pinned(4096)
    cuda.free_stream(16)
    cuda.free_event(event)
    cuda.free_graph(graph)
    cuda.drain(16)
    real.cudaGraphDestroy(real.cudaGraph_t(0))


def test_the_real_bindings_without_a_driver_give_one_line() -> None:
    real = bindings()
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a driver: its absence was NOT tested")
    with pytest.raises(UserError, match=r"^device cuda:0 .*driver is absent or too old.*update it"):
        Cuda(import_cuda_runtime("tensorrt"), 0)


# The codes


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("cudaErrorInsufficientDriver", "cuda:1 .*absent or too old.*: install or update it"),
        ("cudaErrorNoDevice", "cuda:1 .*CUDA sees no GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ("cudaErrorInvalidValue", r"asking for the GPUs \(cudaErrorInvalidValue: the text of 1\)"),
        ("cudaErrorIllegalAddress", "the text of 700.*: start the process again"),
    ],
)
def test_codes_become_one_line_that_says_what_to_do(code: str, message: str) -> None:
    api = FakeCuda(count=2)
    api.fails["cudaGetDeviceCount"] = cudaError_t[code]
    with pytest.raises(UserError, match=message) as caught:
        Cuda(api, 1)
    assert "\n" not in str(caught.value)
    assert api.cleared == 1


def test_a_gpu_that_is_not_there_and_a_driver_library_that_is_not_there_are_told() -> None:
    with pytest.raises(UserError, match="cuda:2 was asked for, but CUDA sees 2 GPUs"):
        Cuda(FakeCuda(count=2), 2)

    def absent() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(UserError, match="there is no NVIDIA driver on this machine: install it"):
        Cuda(SimpleNamespace(cudaGetDeviceCount=absent), 0)


def test_the_callers_own_gpu_is_his_again_afterwards() -> None:
    api = FakeCuda(count=2)
    cuda = Cuda(api, 1)
    seen = []

    def fail() -> None:
        seen.append(api.current)
        raise KeyError

    with pytest.raises(KeyError), cuda.on_device():
        fail()
    assert seen == [1]
    assert api.current == 0
    api.current = 1
    api.calls.clear()
    with cuda.on_device():
        pass
    assert "cudaSetDevice" not in api.calls  # another library's context may be current


# Memory


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


# Streams and events


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


# __cuda_array_interface__


class Foreign:
    """An array of another library."""

    def __init__(self, **interface: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": (2, 4, 4, 3),
            "typestr": "|u1",
            "data": (4096, False),
            "version": 3,
        } | interface


@given(data=st.data())
def test_contiguity_is_what_numpy_says(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)))
    dtype = np.dtype(data.draw(st.sampled_from(["u1", "<f2", "<f4", "<i8"])))
    array = np.empty(shape, dtype).transpose(data.draw(st.permutations(range(len(shape)))))
    cuts = [data.draw(st.sampled_from([slice(None), slice(None, None, 2), slice(0, 1)]))]
    array = array[tuple(cuts * array.ndim)] if data.draw(st.booleans()) else array
    described = array.__array_interface__
    foreign = Foreign(
        shape=array.shape,
        typestr=described["typestr"],
        data=(array.ctypes.data, False),
        strides=data.draw(st.sampled_from([array.strides, list(array.strides)])),
        version=data.draw(st.sampled_from([2, 3])),
    )
    if array.flags.c_contiguous:
        view = read_interface(foreign)
        assert (view.address, view.shape) == (array.ctypes.data, array.shape)
        assert view.dtype == array.dtype
    else:
        with pytest.raises(UserError, match=r"not contiguous \(strides .*C-contiguous copy"):
            read_interface(foreign)


@pytest.mark.parametrize(
    ("interface", "ready_on"),
    [
        ({"version": 3}, None),
        ({"version": 3, "stream": None}, None),
        ({"version": 3, "stream": 1}, 1),
        ({"version": 3, "stream": 2}, 2),
        ({"version": 3, "stream": 0x55AA0}, 0x55AA0),
        ({"version": 2}, 1),
        ({"version": 2, "stream": 0x55AA0}, 1),  # version 2 has no such entry
    ],
)
def test_the_stream_is_what_the_protocol_says(
    interface: dict[str, Any], ready_on: int | None
) -> None:
    assert read_interface(Foreign(**interface)).ready_on == ready_on


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        ({"stream": 0}, "name the stream 0: .*0 is ambiguous"),
        ({"stream": -1}, "name the stream -1"),
        ({"stream": True}, "name the stream True"),
        ({"stream": "1"}, "name the stream '1'"),
        ({"version": 1}, "version 1: 2 or 3 is needed"),
        ({"mask": object()}, "masked"),
        ({"data": (0, False)}, r"\[2, 4, 4, 3\] have no memory"),
        ({"strides": (1, 1)}, "not contiguous"),
        ({"typestr": "what"}, "can't be read"),
        ({"shape": None}, "can't be read"),
        ({"data": ()}, "can't be read"),
    ],
)
def test_what_is_no_usable_array_is_refused(interface: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_interface(Foreign(**interface))


def test_an_array_of_the_host_is_sent_to_run() -> None:
    with pytest.raises(UserError, match=r"images \(ndarray\) are no array on a GPU.*use run"):
        read_interface(np.zeros(3))
    interface = Foreign().__cuda_array_interface__
    del interface["version"]
    with pytest.raises(UserError, match="KeyError: 'version'"):
        read_interface(SimpleNamespace(__cuda_array_interface__=interface))


def test_a_tensor_of_torch_on_the_cpu_is_refused() -> None:
    import torch

    with pytest.raises(UserError, match=r"\(Tensor\) are no array on a GPU"):
        read_interface(torch.zeros(3))


def test_a_tensor_that_requires_grad_says_so_itself() -> None:
    class Tensor:
        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            raise RuntimeError("requires grad: use var.detach()\nmore")

    with pytest.raises(UserError, match=r"don't give their memory away \(.*detach\(\)\)"):
        read_interface(Tensor())


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (7, 7),
        (0, 1),
        (SimpleNamespace(cuda_stream=5), 5),  # torch
        (SimpleNamespace(ptr=6), 6),  # CuPy
        (SimpleNamespace(handle=8), 8),  # pycuda
        (SimpleNamespace(__cuda_stream__=lambda: (0, 9), handle=object()), 9),  # cuda.core
        (SimpleNamespace(__cuda_stream__=(0, 9)), 9),
    ],
)
def test_streams_of_many_libraries_are_taken(stream: object, handle: int) -> None:
    assert stream_handle(stream) == handle


@pytest.mark.parametrize("stream", ["default", -1, True, 1.5, SimpleNamespace(ptr=None)])
def test_what_is_no_stream_is_refused(stream: object) -> None:
    with pytest.raises(UserError, match=r"a handle \(int\) or a stream of torch, CuPy"):
        stream_handle(stream)


# Arrays of our own


def test_an_array_is_there_when_numpy_asks(api: FakeCuda, cuda: Cuda) -> None:
    stream = Stream(cuda.new_stream())
    array = DeviceArray(cuda, stream, (2, 3), np.float32, source="images")
    content = np.arange(6, dtype=np.float32).reshape(2, 3)
    api.write(array.address, content, stream.handle)
    assert (api.read(array.address, (24,), np.uint8) == GARBAGE).all()
    assert (array.numpy() == content).all()
    array.free()
    cuda.free_stream(stream.handle)


def test_an_array_describes_itself_as_the_protocol_asks(api: FakeCuda, cuda: Cuda) -> None:
    stream = Stream(cuda.new_stream())
    array = DeviceArray(cuda, stream, (2, 3), np.float16, source=None)
    view = read_interface(array)
    assert (view.address, view.shape) == (array.address, (2, 3))
    assert view.dtype == np.float16
    assert view.ready_on == stream.handle
    cuda.free_stream(stream.handle)
    stream.is_open = False
    assert read_interface(array).ready_on is None
    array.free()


def test_an_array_frees_its_memory_once_and_says_so(api: FakeCuda, cuda: Cuda) -> None:
    stream = Stream(1)
    array = DeviceArray(cuda, stream, (4,), np.uint8, source=None)
    address = array.address
    array.free()
    array.free()
    assert (api.read(address, (4,), np.uint8) == FREED).all()
    for use in (lambda: array.numpy(), lambda: array.address):
        with pytest.raises(UserError, match=r"the array \[4\] was freed"):
            use()
    forgotten = DeviceArray(cuda, stream, (4,), np.uint8, source=None)
    assert len(api.memory) == 1
    del forgotten
    assert api.memory == {}
