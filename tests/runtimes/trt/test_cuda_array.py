"""__cuda_array_interface__: what others say of their arrays, and what ours say."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srdeploy.errors import UserError
from srdeploy.runtimes.trt.arrays import DeviceArray, Stream, read_interface, stream_handle
from srdeploy.runtimes.trt.cuda_api import Cuda
from tests.runtimes.trt.fake_cuda import FREED, GARBAGE, FakeCuda


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
