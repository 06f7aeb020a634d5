"""Images on the GPU: no copies, no waiting, and the order that streams ask for."""

from types import SimpleNamespace

import numpy as np
import pytest

from srdeploy.errors import UserError
from srdeploy.runtimes.base import ImageShapeError
from srdeploy.runtimes.trt.arrays import read_interface
from srdeploy.runtimes.trt.cuda_api import Cuda
from tests.runtimes.trt.fake_cuda import ALIGNMENT
from tests.runtimes.trt.fake_machine import Bench, MakeEngine, by_onnxruntime, photos


@pytest.mark.parametrize(("input", "output"), [("uint8", "labels"), ("float32", "both")])
def test_device_images_are_the_engines_input_itself(
    bench: Bench, make_engine: MakeEngine, input: str, output: str
) -> None:
    engine = make_engine(input, output)
    images = photos(3)
    labels, logits = by_onnxruntime(engine, images)
    producer = bench.stream()
    with bench.runtime(engine) as runtime:
        given = bench.give(runtime._feed(images), producer)
        bench.api.calls.clear()
        result = runtime.run_device(given)
        waits = {"cudaStreamSynchronize", "cudaMemcpyAsync", "cudaMemcpy", "cudaMallocHost"}
        assert not waits & set(bench.api.calls)
        (context,) = bench.trt.contexts
        pointer = given.__cuda_array_interface__["data"][0]
        assert context.addresses[runtime.signature.input_name] == pointer
        assert context.runs == 0  # the device has all the work still before it
        assert (result.numpy() == labels).all()
        assert result.dtype == np.uint8
        if logits is not None:
            scores = runtime.run_device(given, output="logits")
            assert (scores.numpy() == logits).all()
            scores.free()
        result.free()
        bench.take_back(given)
    bench.api.cudaStreamDestroy(producer)


def test_the_order_is_that_of_the_stream_that_the_images_name(
    bench: Bench, make_engine: MakeEngine
) -> None:
    """Both ways: with the stream the labels are right, and images that claim to be ready but are
    not give other labels, so that the first half could fail."""
    engine = make_engine()
    images = photos(1)
    labels = by_onnxruntime(engine, images)[0]
    producer = bench.stream()
    with bench.runtime(engine) as runtime:
        for claimed, right in ((producer, True), (None, False)):
            given = bench.give(images, producer, stream=claimed)
            result = runtime.run_device(given)
            assert (result.numpy() == labels).all() == right
            bench.api.cudaStreamSynchronize(producer)
            result.free()
            bench.take_back(given)
    bench.api.cudaStreamDestroy(producer)


def test_version_2_waits_for_the_legacy_default_stream(
    bench: Bench, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    images = photos(1)
    with bench.runtime(engine) as runtime:
        given = bench.give(images, 1, version=2)
        result = runtime.run_device(given)
        assert (result.numpy() == by_onnxruntime(engine, images)[0]).all()
        result.free()
        bench.take_back(given)


def test_a_stream_that_is_given_comes_before_and_after(
    bench: Bench, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    images = photos(2)
    labels = by_onnxruntime(engine, images)[0]
    caller = bench.stream()
    seen: list[np.ndarray] = []
    with bench.runtime(engine) as runtime:
        given = bench.give(images, caller, stream=None, version=2)
        result = runtime.run_device(given, stream=SimpleNamespace(cuda_stream=caller))
        bench.api.streams[caller].add(
            lambda: seen.append(bench.api.read(result.address, result.shape, np.uint8).copy())
        )
        bench.api.cudaStreamSynchronize(caller)
        assert (seen[0] == labels).all()
        bench.api.write(given.__cuda_array_interface__["data"][0], 255 - images, caller)
        again = runtime.run_device(given, stream=caller)
        assert (again.numpy() == by_onnxruntime(engine, 255 - images)[0]).all()
        again.free()
        result.free()
        bench.take_back(given)
    bench.api.cudaStreamDestroy(caller)


def test_a_consumer_that_follows_the_protocol_finds_the_labels(
    bench: Bench, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    images = photos(2)
    labels = by_onnxruntime(engine, images)[0]
    consumer = bench.stream()
    seen: list[np.ndarray] = []
    with bench.runtime(engine) as runtime:
        given = bench.give(images, 2)
        view = read_interface(result := runtime.run_device(given))
        assert view.ready_on is not None
        Cuda(bench.api, 0).order(view.ready_on, consumer)
        bench.api.streams[consumer].add(
            lambda: seen.append(bench.api.read(view.address, view.shape, view.dtype).copy())
        )
        bench.api.cudaStreamSynchronize(consumer)
        assert (seen[0] == labels).all()
        result.free()
        bench.take_back(given)
    bench.api.cudaStreamDestroy(consumer)


def test_results_outlive_the_runtime_and_the_images(bench: Bench, make_engine: MakeEngine) -> None:
    engine = make_engine()
    images = photos(1)
    with bench.runtime(engine) as runtime:
        given = bench.give(images, 2)
        result = runtime.run_device(given)
        assert result._source is given  # whoever owns the images must not free them meanwhile
    assert read_interface(result).ready_on is None
    assert (result.numpy() == by_onnxruntime(engine, images)[0]).all()
    assert result._source is None
    bench.take_back(given)
    del result


def test_results_feed_another_engine(bench: Bench, make_engine: MakeEngine) -> None:
    """Logits float32 [N, 3, H, W] are what the planes engine takes: no wait lies between."""
    engine = make_engine("float32", "both")
    with bench.runtime(engine) as runtime:
        planes = runtime._feed(photos(2))
        given = bench.give(planes, 2)
        bench.api.calls.clear()
        first = runtime.run_device(given, output="logits")
        second = runtime.run_device(first, output="logits")
        assert "cudaStreamSynchronize" not in bench.api.calls
        assert (second.numpy() == planes).all()  # green and red were swapped twice
        first.free()
        second.free()
        bench.take_back(given)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (photos(1).astype(np.float32), r"float32 \[1, 40, 48, 3\]: uint8 \[N, H, W, 3\] is needed"),
        (photos(1)[0], r"uint8 \[40, 48, 3\]"),
        (photos(1, 31, 48), r"\[1, 31, 48, 3\].*at least 32 x 32"),
        (photos(5), r"\[5, 40, 48, 3\].*N 1 to 4"),
        (photos(1, 40, 65), r"W 32 to 64"),
    ],
)
def test_device_images_of_another_form_are_refused(
    bench: Bench, make_engine: MakeEngine, images: np.ndarray, message: str
) -> None:
    with bench.runtime(make_engine()) as runtime:
        given = bench.give(images, 2)
        with pytest.raises(ImageShapeError, match=message):
            runtime.run_device(given)
        bench.take_back(given)


def test_device_images_elsewhere_are_refused(bench: Bench, make_engine: MakeEngine) -> None:
    bench.api.count = 2
    with bench.runtime(make_engine()) as runtime:
        images = photos(1)
        given = bench.give(images, 2, data=(images.ctypes.data, False))
        with pytest.raises(UserError, match="in the host's memory and the engine on cuda: copy"):
            runtime.run_device(given)
        with pytest.raises(UserError, match="no array on a GPU"):
            runtime.run_device(images)
        with pytest.raises(UserError, match="gives no logits"):
            runtime.run_device(bench.give(images, 2), output="logits")
        bench.api.current = 1
        other = bench.give(images, 2)
        bench.api.current = 0
        with pytest.raises(UserError, match="in cuda:1 and the engine on cuda"):
            runtime.run_device(other)
        for address in list(bench.api.memory):
            bench.api.cudaFree(address)


def test_an_address_that_tensorrt_does_not_take_is_told_in_its_words(
    bench: Bench, make_engine: MakeEngine
) -> None:
    with bench.runtime(make_engine()) as runtime:
        given = bench.give(photos(2), 2)
        address = given.__cuda_array_interface__["data"][0]
        part = SimpleNamespace(
            __cuda_array_interface__=given.__cuda_array_interface__
            | {"shape": (1, 40, 48, 3), "data": (address + 3, False)}
        )
        message = rf"the address of images, {address + 3:#x}.*aligned on {ALIGNMENT} bytes"
        held = set(bench.api.memory)
        with pytest.raises(UserError, match=message) as caught:
            runtime.run_device(part)
        assert set(bench.api.memory) == held, caught
        assert runtime.run(photos(1)).shape == (1, 40, 48)
        bench.take_back(given)
