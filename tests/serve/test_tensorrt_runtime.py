"""Engines behind the runtime contract: on a CUDA and a TensorRT made of numpy, and on a real GPU
where there is one. What is right is what onnxruntime says of the same graph."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srdeploy.errors import MissingPackageError, UserError
from srdeploy.files import sha256_of
from srdeploy.imaging import Pixels
from srdeploy.precision import Precision
from srdeploy.serve.artifact import open_artifact
from srdeploy.serve.cuda_array import DeviceArray, Stream, read_interface
from srdeploy.serve.cuda_runtime import Cuda, import_cuda_runtime
from srdeploy.serve.engine_file import Builder, EngineSidecar, Profile, write_sidecar
from srdeploy.serve.runtime import ImageShapeError, open_runtime
from srdeploy.serve.signature import read_signature
from srdeploy.serve.tensorrt_engine import choose_profile, plan_chunks
from srdeploy.serve.tensorrt_execution import CAPTURED
from srdeploy.serve.tensorrt_runtime import Libraries, TensorRTRuntime
from tests.serve.fake_cuda import ALIGNMENT, FakeCuda, cudaError_t
from tests.serve.fake_tensorrt import CudaGraphStrategy, FakeTensorRT, write_plan

COMMAND = "srdeploy export runs/night --trt"
PROFILE = Profile(smallest=(1, 32, 32), usual=(1, 40, 48), largest=(4, 64, 64))
FORMS = [(i, o) for i in ("uint8", "float32") for o in ("labels", "logits", "both")]
SOURCES = sorted(Path(__file__).parents[2].glob("serve/tensorrt_*.py"))

MakeEngine = Callable[..., Path]


def input_shapes(profile: Profile, planes: bool) -> list[list[int]]:
    """As an engine tells them."""
    shapes = (profile.smallest, profile.usual, profile.largest)
    return [[n, 3, h, w] if planes else [n, h, w, 3] for n, h, w in shapes]


@pytest.fixture
def make_engine(make_graph: Callable[..., Path]) -> MakeEngine:
    """Writes the colour graph, and beside it an engine of it with a sidecar."""

    def make(
        input: str = "uint8",
        output: str = "labels",
        profiles: tuple[Profile, ...] = (PROFILE,),
        builder: Builder = "tensorrt",
        precision: Precision = "fp32",
        layer_types: dict[str, int] | None = None,
        plan: bytes | None = None,
    ) -> Path:
        onnx = make_graph(f"{input}-{output}.onnx", input=input, output=output)
        signature = read_signature(onnx)
        assert signature.spec is not None
        if plan is None:
            kinds = {"labels": "UINT8", "logits": "FLOAT"}
            names = kinds if output == "both" else {output: kinds[output]}
            kind = "UINT8" if input == "uint8" else "FLOAT"
            ranges = [input_shapes(one, input == "float32") for one in profiles]
            plan = write_plan(ranges, (signature.input_name, kind), names)
        path = onnx.with_suffix(".engine")
        path.write_bytes(plan)
        sidecar = EngineSidecar(
            builder=builder,
            builder_version="11.4.0.106",
            compute_capabilities=("8.9",),
            gpu="NVIDIA L4",
            cuda_driver="13.0",
            precision=precision,
            layer_types=layer_types or {"float32": 1},
            read_from="engine",
            profiles=profiles,
            engine_sha256=sha256_of(path),
            engine_bytes=len(plan),
            onnx=onnx.name,
            onnx_sha256=sha256_of(onnx),
            command=COMMAND,
            spec=signature.spec,
            signature=signature,
        )
        write_sidecar(path, sidecar)
        return path

    return make


class Bench:
    """A machine: CUDA, TensorRT, and runtimes on them."""

    def __init__(self) -> None:
        self.api = FakeCuda()
        self.trt = FakeTensorRT(self.api)

    def runtime(self, path: Path, cuda_graph: bool = False, device: str = "cuda") -> Any:
        artifact = open_artifact(path)
        assert artifact.spec is not None
        libraries = Libraries(lambda _: self.trt, lambda _: self.api, lambda _, __: None)
        return TensorRTRuntime(
            artifact, artifact.spec, device, cuda_graph=cuda_graph, libraries=libraries
        )

    def give(self, images: np.ndarray, producer: int, **interface: Any) -> Any:
        """An array of another library, that the stream `producer` is still making."""
        address = self.api.cudaMalloc(images.nbytes)[1]
        self.api.write(address, images, producer)
        described = {
            "shape": images.shape,
            "typestr": images.dtype.str,
            "data": (address, False),
            "version": 3,
            "stream": producer,
        }
        return SimpleNamespace(__cuda_array_interface__=described | interface)

    def take_back(self, array: Any) -> None:
        self.api.cudaFree(array.__cuda_array_interface__["data"][0])

    def stream(self) -> int:
        return int(self.api.cudaStreamCreateWithFlags(1)[1])


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A machine; everything must have been given back in the end."""
    made = Bench()
    yield made
    assert made.api.leaks() == []
    assert made.api.current == 0


def photos(count: int, height: int = 40, width: int = 48) -> Pixels:
    rng = np.random.default_rng([count, height, width])
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def by_onnxruntime(engine: Path, images: Pixels) -> tuple[Pixels, np.ndarray | None]:
    """Labels, and logits where there are any, of the graph beside the engine."""
    with open_runtime(engine.with_suffix(".onnx"), threads=1) as reference:
        logits = None if engine.stem.endswith("labels") else reference.logits(images)
        return reference.run(images), logits


# Images of the host


@pytest.mark.parametrize(("input", "output"), FORMS)
def test_labels_and_logits_are_those_of_onnxruntime(
    bench: Bench, make_engine: MakeEngine, input: str, output: str
) -> None:
    engine = make_engine(input, output)
    with bench.runtime(engine) as runtime:
        for images in (photos(1), photos(4, 64, 64), photos(2, 33, 47)):
            labels, logits = by_onnxruntime(engine, images)
            assert (runtime.run(images) == labels).all()
            if logits is None:
                with pytest.raises(UserError, match="labels alone"):
                    runtime.logits(images)
            else:
                assert (runtime.logits(images) == logits).all()


def test_a_large_batch_runs_in_parts_of_nearly_equal_size(
    bench: Bench, make_engine: MakeEngine
) -> None:
    engine = make_engine(output="both")
    images = photos(9)
    with bench.runtime(engine) as runtime:
        assert (runtime.run(images) == by_onnxruntime(engine, images)[0]).all()
        (context,) = bench.trt.contexts
        assert context.runs == 3
        assert context.shape == (3, 40, 48, 3)


def test_the_profile_tuned_for_the_nearest_shape_is_used(
    bench: Bench, make_engine: MakeEngine
) -> None:
    small = Profile(smallest=(1, 32, 32), usual=(1, 32, 32), largest=(4, 64, 64))
    large = Profile(smallest=(1, 32, 32), usual=(4, 64, 64), largest=(4, 64, 64))
    engine = make_engine(profiles=(small, large))
    with bench.runtime(engine) as runtime:
        (context,) = bench.trt.contexts
        for images, profile in ((photos(4, 60, 60), 1), (photos(1, 36, 36), 0)):
            assert (runtime.run(images) == by_onnxruntime(engine, images)[0]).all()
            assert context.active_optimization_profile == profile


def test_an_engine_of_one_shape_has_that_as_its_range(
    bench: Bench, make_engine: MakeEngine
) -> None:
    engine = make_engine(plan=write_plan([], fixed=[2, 40, 48, 3]))
    images = photos(4)
    with bench.runtime(engine) as runtime:
        assert (runtime.run(images) == by_onnxruntime(engine, images)[0]).all()
        message = r"images are \[3, 40, 48, 3\].*built for N 2, H 40, W 48: resize"
        with pytest.raises(ImageShapeError, match=message):
            runtime.run(photos(3))


@pytest.mark.parametrize("shape", [(1, 65, 40), (1, 40, 65), (9, 65, 40)])
def test_a_shape_without_a_profile_is_refused_with_the_ranges(
    bench: Bench, make_engine: MakeEngine, shape: tuple[int, int, int]
) -> None:
    tall = Profile(smallest=(2, 80, 32), usual=(2, 80, 32), largest=(2, 80, 64))
    with bench.runtime(make_engine(profiles=(PROFILE, tall))) as runtime:
        with pytest.raises(
            ImageShapeError,
            match=r"N 1 to 4, H 32 to 64, W 32 to 64; N 2, H 80, W 32 to 64.*--profile that covers",
        ) as caught:
            runtime.run(photos(*shape))
        assert str([*shape, 3]) in str(caught.value)
        assert runtime.run(photos(1)).shape == (1, 40, 48)


sizes = st.integers(1, 6)
ranges = st.tuples(sizes, sizes, sizes).map(sorted)
profile_lists = st.lists(
    st.tuples(ranges, ranges, ranges).map(
        lambda axes: Profile(
            smallest=(axes[0][0], axes[1][0], axes[2][0]),
            usual=(axes[0][1], axes[1][1], axes[2][1]),
            largest=(axes[0][2], axes[1][2], axes[2][2]),
        )
    ),
    min_size=1,
    max_size=3,
)


@given(profiles=profile_lists, shape=st.tuples(st.integers(1, 14), sizes, sizes))
def test_chunks_cover_the_batch_in_as_few_parts_as_can_be(
    profiles: list[Profile], shape: tuple[int, int, int]
) -> None:
    n, height, width = shape

    def taken(count: int) -> bool:
        return any(
            one.smallest[0] <= count <= one.largest[0]
            and one.smallest[1] <= height <= one.largest[1]
            and one.smallest[2] <= width <= one.largest[2]
            for one in profiles
        )

    splits = ([len(part) for part in np.array_split(range(n), k)] for k in range(1, n + 1))
    expected = next((split for split in splits if all(map(taken, split))), None)
    if expected is None:
        with pytest.raises(ImageShapeError):
            plan_chunks(profiles, shape)
        return
    chunks = plan_chunks(profiles, shape)
    assert [chunk.count for chunk in chunks] == expected
    assert [chunk.start for chunk in chunks] == list(np.cumsum([0, *expected[:-1]]))
    for chunk in chunks:
        assert chunk.profile == choose_profile(profiles, (chunk.count, height, width))


def test_memory_is_reused_and_grows(bench: Bench, make_engine: MakeEngine) -> None:
    engine = make_engine(output="both")
    with bench.runtime(engine) as runtime:
        runtime.run(photos(2))
        runtime.logits(photos(2))
        bench.api.calls.clear()
        for images in (photos(2), photos(1), photos(2, 32, 32)):
            assert (runtime.run(images) == by_onnxruntime(engine, images)[0]).all()
            runtime.logits(images)
        assert not {"cudaMalloc", "cudaMallocHost"} & set(bench.api.calls)
        runtime.run(photos(3))
        assert "cudaMalloc" in bench.api.calls


def test_the_results_are_the_callers_own(bench: Bench, make_engine: MakeEngine) -> None:
    engine = make_engine()
    with bench.runtime(engine) as runtime:
        first = runtime.run(photos(1))
        before = first.copy()
        runtime.run(255 - photos(1))
        assert (first == before).all()
    assert (first == before).all()


def test_threads_queue(bench: Bench, make_engine: MakeEngine) -> None:
    engine = make_engine()
    wrong: list[int] = []
    with bench.runtime(engine) as runtime:

        def work(count: int) -> None:
            images = photos(count)
            expected = by_onnxruntime(engine, images)[0]
            wrong.extend(count for _ in range(20) if (runtime.run(images) != expected).any())

        threads = [Thread(target=work, args=(count,)) for count in (1, 2, 3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_another_gpu_than_the_callers_is_used_and_his_stays_current(
    bench: Bench, make_engine: MakeEngine
) -> None:
    bench.api.count = 2
    with bench.runtime(make_engine(), device="cuda:1") as runtime:
        runtime.run(photos(1))
        assert {device for _, _, device in bench.api.memory.values()} == {1, None}
        assert bench.api.current == 0


def test_times_are_those_of_the_device(bench: Bench, make_engine: MakeEngine) -> None:
    engine = make_engine()
    images = photos(9)
    with bench.runtime(engine) as runtime:
        labels, times = runtime.timed_run(images)
        assert (labels == by_onnxruntime(engine, images)[0]).all()
        assert times == {"h2d_ms": 3.0, "compute_ms": 6.0, "d2h_ms": 12.0}
        with pytest.raises(ImageShapeError):
            runtime.timed_run(photos(1, 65, 65))
        assert bench.api.events == set()
        runtime.run(images)
        assert bench.api.events == set()


# Images on the GPU


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
        with pytest.raises(UserError, match=message):
            runtime.run_device(part)
        assert runtime.run(photos(1)).shape == (1, 40, 48)
        bench.take_back(given)


# CUDA graphs


def launches(bench: Bench) -> int:
    return bench.api.calls.count("cudaGraphLaunch")


def test_a_shape_is_captured_once_and_launched_then(bench: Bench, make_engine: MakeEngine) -> None:
    engine = make_engine(output="both")
    with bench.runtime(engine, cuda_graph=True) as runtime:
        for turn in range(3):
            images = photos(2) + np.uint8(turn)
            labels, logits = by_onnxruntime(engine, images)
            assert (runtime.run(images) == labels).all()
            assert (runtime.logits(images) == logits).all()
        assert bench.api.calls.count("cudaStreamBeginCapture") == 1
        assert launches(bench) == 5


def test_graphs_stay_right_when_shapes_take_turns_and_memory_moves(
    bench: Bench, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    order = [(1, 32, 32), (1, 40, 40), (1, 32, 32), (4, 64, 64), (1, 32, 32), (1, 32, 32)]
    counted = []
    with bench.runtime(engine, cuda_graph=True) as runtime:
        for shape in order:
            images = photos(*shape)
            assert (runtime.run(images) == by_onnxruntime(engine, images)[0]).all()
            counted.append(launches(bench))
    # Memory moved with each larger shape: the third and the fifth run captured anew.
    assert counted == [0, 0, 0, 0, 0, 1]


def test_few_graphs_are_kept(bench: Bench, make_engine: MakeEngine) -> None:
    engine = make_engine()
    widths = [64, *range(32, 32 + CAPTURED + 1)]
    with bench.runtime(engine, cuda_graph=True) as runtime:
        for width in [*widths, widths[-1], widths[0]]:
            images = photos(4, 64, width)
            assert (runtime.run(images) == by_onnxruntime(engine, images)[0]).all()
            assert len(bench.api.launchable) <= CAPTURED
        assert launches(bench) == 1  # the last width again; the first had been dropped


def test_what_can_not_be_captured_says_so_and_the_stream_goes_on(
    bench: Bench, make_engine: MakeEngine
) -> None:
    with bench.runtime(make_engine(), cuda_graph=True) as runtime:
        bench.api.fails["cudaGraphInstantiate"] = cudaError_t.cudaErrorInvalidValue
        with pytest.raises(UserError, match="can't be captured as a CUDA graph.*leave cuda_graph"):
            runtime.run(photos(1))
        runtime.run(photos(1))
        runtime.run(photos(1))
        assert launches(bench) == 1


def test_tensorrt_for_rtx_captures_by_itself(bench: Bench, make_engine: MakeEngine) -> None:
    engine = make_engine(builder="rtx")
    images = photos(1)
    for cuda_graph in (False, True):
        with bench.runtime(engine, cuda_graph=cuda_graph) as runtime:
            runtime.run(images)
            assert (runtime.run(images) == by_onnxruntime(engine, images)[0]).all()
    plain, graphed = bench.trt.contexts
    assert plain.config is None
    assert graphed.config is not None
    assert graphed.config.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert "cudaStreamBeginCapture" not in bench.api.calls


# Opening and closing


def test_it_must_be_open_and_can_be_opened_again(bench: Bench, make_engine: MakeEngine) -> None:
    engine = make_engine()
    runtime = bench.runtime(engine)
    for use in (runtime.run, runtime.timed_run, runtime.run_device):
        with pytest.raises(UserError, match="not open"):
            use(photos(1))
    for _ in range(2):
        with runtime:
            assert (runtime.run(photos(1)) == by_onnxruntime(engine, photos(1))[0]).all()
        assert bench.api.leaks() == []


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_whichever_call_fails_everything_is_freed(
    make_engine: MakeEngine, cuda_graph: bool
) -> None:
    """Every call to CUDA fails once, one after the other, over a whole session."""
    engine = make_engine(output="both")

    def session(bench: Bench) -> None:
        with bench.runtime(engine, cuda_graph=cuda_graph) as runtime:
            for images in (photos(1), photos(1), photos(2)):
                runtime.run(images)
            given = DeviceArray(Cuda(bench.api, 0), Stream(1), (1, 40, 48, 3), np.uint8, None)
            try:
                runtime.run_device(given, stream=2).numpy()
                runtime.timed_run(photos(1))
            finally:
                given.free()

    healthy = Bench()
    session(healthy)
    assert healthy.api.leaks() == []
    assert len(healthy.api.calls) > 50
    refused = 0
    for number in range(len(healthy.api.calls)):
        bench = Bench()
        bench.api.fail_at = number
        try:
            session(bench)
        except UserError:
            refused += 1
        assert bench.api.leaks() == [], healthy.api.calls[number]
        assert bench.api.current == 0
    assert refused > 30


def test_too_little_memory_is_a_matter_of_the_images_shape(
    bench: Bench, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    with bench.runtime(engine) as runtime:
        for name in ("cudaMalloc", "cudaMallocHost"):
            bench.api.fails[name] = cudaError_t.cudaErrorMemoryAllocation
            message = r"\[2, 40, 48, 3\]: out of memory on cuda:0 .*smaller images or a smaller"
            with pytest.raises(ImageShapeError, match=message):
                runtime.run(photos(2))
        given = bench.give(photos(2), 2)
        bench.api.fails["cudaMalloc"] = cudaError_t.cudaErrorMemoryAllocation
        with pytest.raises(ImageShapeError, match=r"\[2, 40, 48, 3\]: out of memory"):
            runtime.run_device(given)
        bench.take_back(given)
        assert (runtime.run(photos(2)) == by_onnxruntime(engine, photos(2))[0]).all()


def test_what_tensorrt_refuses_is_told_in_its_words(bench: Bench, make_engine: MakeEngine) -> None:
    engine = make_engine()
    bench.trt.without_memory = True
    with pytest.raises(UserError, match=r"execution context.*OutOfMemory \(requested 7 bytes\)"):
        bench.runtime(engine).__enter__()
    bench.trt.without_memory = False
    with bench.runtime(engine) as runtime:
        runtime.run(photos(1))
        bench.trt.contexts[-1].refuses_to_run = True
        with pytest.raises(UserError, match=r"could not run it \(.*Error Code 3\)"):
            runtime.run(photos(1))


def test_an_engine_that_tensorrt_does_not_load_says_why_and_how_to_rebuild(
    bench: Bench, make_engine: MakeEngine
) -> None:
    engine = make_engine(plan=b"not a plan")
    message = rf"{engine}: TensorRT 11.4.0.106 can't load it \(magicTag failed, another version\)"
    with pytest.raises(UserError, match=f"{message}. Build it again: {COMMAND}"):
        bench.runtime(engine).__enter__()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            write_plan([], ("photos", "UINT8"), fixed=[1, 40, 48, 3]),
            "its inputs are photos and not",
        ),
        (write_plan([], ("images", "FLOAT"), fixed=[1, 40, 48, 3]), "images is FLOAT, not UINT8"),
        (write_plan([], outputs={"masks": "UINT8"}, fixed=[1, 40, 48, 3]), "no output labels but"),
        (write_plan([], outputs={"labels": "FLOAT"}, fixed=[1, 40, 48, 3]), "labels is FLOAT"),
        (
            write_plan([], outputs={"labels": "UINT8", "x": "BF16"}, fixed=[1, 40, 48, 3]),
            "x is BF16, which is not understood",
        ),
        (write_plan([], fixed=[1, 40, 48, 3], location="HOST"), "images lies in the host's memory"),
    ],
)
def test_another_engine_than_the_sidecar_describes_is_refused(
    bench: Bench, make_engine: MakeEngine, plan: bytes, message: str
) -> None:
    engine = make_engine(plan=plan)
    with pytest.raises(UserError, match=f"not the engine.*{message}.*again: {COMMAND}"):
        bench.runtime(engine).__enter__()


def test_outputs_whose_shape_depends_on_the_content_are_refused(
    bench: Bench, make_engine: MakeEngine
) -> None:
    outputs = {"labels": "UINT8", "nowhere": "INT32"}
    engine = make_engine(plan=write_plan([], outputs=outputs, fixed=[1, 40, 48, 3]))
    with (
        bench.runtime(engine) as runtime,
        pytest.raises(UserError, match="shape of nowhere depends on what is in the images"),
    ):
        runtime.run(photos(1))


def test_the_guard_speaks_before_tensorrt(bench: Bench, make_engine: MakeEngine) -> None:
    engine = make_engine(plan=b"not a plan")
    artifact = open_artifact(engine)
    assert artifact.spec is not None
    asked: list[tuple[str, int]] = []

    def guard(sidecar: EngineSidecar, index: int) -> None:
        asked.append((sidecar.command, index))
        raise UserError("built for another GPU")

    libraries = Libraries(lambda _: bench.trt, lambda _: bench.api, guard)
    bench.api.count = 2
    with pytest.raises(UserError, match="another GPU"):
        TensorRTRuntime(artifact, artifact.spec, "cuda:1", libraries=libraries).__enter__()
    assert asked == [(COMMAND, 1)]


def test_a_file_that_is_not_the_sidecars_is_refused(bench: Bench, make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.write_bytes(engine.read_bytes()[:-1] + b"]")
    with pytest.raises(UserError, match=f"another SHA-256.*{COMMAND}"):
        bench.runtime(engine).__enter__()


@pytest.mark.parametrize(
    ("precision", "layer_types", "text"),
    [
        ("fp32", {"float32": 5}, "float32"),
        ("tf32", {"float32": 5}, "float32 (TF32 allowed)"),
        ("tf32", {"float32": 1, "tf32": 4}, "float32+tf32 (stored as float32)"),
        ("fp16", {"float16": 4, "float32": 1}, "float16+float32 (stored as float32)"),
    ],
)
def test_the_precision_is_what_was_read_back_from_the_layers(
    bench: Bench,
    make_engine: MakeEngine,
    precision: Precision,
    layer_types: dict[str, int],
    text: str,
) -> None:
    engine = make_engine(precision=precision, layer_types=layer_types)
    runtime = bench.runtime(engine)
    assert runtime.precision == text
    assert (runtime.backend, runtime.device) == ("tensorrt", "cuda")
    assert runtime.input_shape == (None, None, None, 3)


# The real libraries


def used_attributes() -> set[tuple[str, str]]:
    """(class of TensorRT, attribute) of everything that serve uses of it."""
    owners = {
        "trt": "",
        "self.trt": "",
        "plan": "ICudaEngine",
        "self.plan": "ICudaEngine",
        "context": "IExecutionContext",
        "self._context": "IExecutionContext",
        "config": "IRuntimeConfig",
        "trt.Runtime(log)": "Runtime",
        "trt.ILogger": "ILogger",
        "trt.TensorIOMode": "TensorIOMode",
        "trt.TensorLocation": "TensorLocation",
        "self.trt.CudaGraphStrategy": "CudaGraphStrategy",
    }
    return {
        (owners[ast.unparse(node.value)], node.attr)
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners
    }


def test_every_attribute_exists_in_the_real_package() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="no TensorRT here: names were NOT compared")
    used = used_attributes()
    assert len(used) > 25
    for owner, name in used:
        assert hasattr(getattr(trt, owner) if owner else trt, name), f"{owner}.{name}"
    for name in ("UINT8", "INT8", "INT32", "INT64", "HALF", "FLOAT"):
        assert getattr(trt.DataType, name).name == name


def test_a_file_that_the_real_package_does_not_load(bench: Bench, make_engine: MakeEngine) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="no TensorRT here: its loading was NOT tested")
    bench.trt = trt
    engine = make_engine(builder="rtx", plan=b"not a plan" * 100)
    message = (
        rf"TensorRT {re.escape(trt.__version__)} can't load it \(.*erializ.*\). Build it again"
    )
    with pytest.raises(UserError, match=message) as caught:
        bench.runtime(engine).__enter__()
    assert "\n" not in str(caught.value)


def test_this_machine_without_a_gpu_is_told_in_one_line(make_engine: MakeEngine) -> None:
    pytest.importorskip("tensorrt_rtx", reason="no TensorRT here: NOT tested")
    real = pytest.importorskip("cuda.bindings.runtime", reason="no cuda-python: NOT tested")
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU: its absence was NOT tested")
    with pytest.raises(UserError, match="^device cuda:0 .*driver is absent or too old.*install"):
        open_runtime(make_engine(builder="rtx"), "cuda").__enter__()


def test_an_absent_package_is_named_with_its_pip_line(make_engine: MakeEngine) -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(MissingPackageError, match=r"pip install 'srdeploy\[tensorrt\]'"):
            open_runtime(make_engine(), "cuda").__enter__()
    else:
        pytest.skip("TensorRT is installed here: its absence was NOT tested")


@pytest.mark.tensorrt
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("builder", ["tensorrt", "rtx"])
def test_a_real_engine_on_a_real_gpu(
    make_graph: Callable[..., Path], builder: Builder, cuda_graph: bool
) -> None:
    """Built here, run from the host and on the device, timed, and compared with onnxruntime."""
    package = "tensorrt_rtx" if builder == "rtx" else "tensorrt"
    pytest.importorskip(package, reason=f"no {package} here: no real engine was run")
    real = pytest.importorskip("cuda.bindings.runtime", reason="no real engine was run")
    if real.cudaGetDeviceCount()[0] != real.cudaError_t.cudaSuccess:
        pytest.skip("no NVIDIA GPU here: no real engine was run")
    from srdeploy.export.engines.build import BuildOptions, build_engine

    onnx = make_graph(output="both", work=2)
    engine = onnx.with_suffix(".engine")
    build_engine(onnx, engine, BuildOptions(builder=builder, profiles=(PROFILE,), command=COMMAND))
    artifact = open_artifact(engine)
    assert artifact.spec is not None
    shapes = [(1, 32, 32), (9, 64, 64), (2, 33, 47), (1, 32, 32), (1, 32, 32)]
    with (
        TensorRTRuntime(artifact, artifact.spec, "cuda", cuda_graph=cuda_graph) as runtime,
        open_runtime(onnx, threads=1) as reference,
    ):
        for shape in shapes:
            images = photos(*shape)
            assert (runtime.run(images) == reference.run(images)).all()
            assert np.allclose(runtime.logits(images), reference.logits(images), atol=1e-2)
        images = photos(2)
        labels, times = runtime.timed_run(images)
        assert (labels == reference.run(images)).all()
        assert min(times.values()) > 0
        cuda = Cuda(import_cuda_runtime(builder), 0)
        given = DeviceArray(cuda, Stream(1), images.shape, np.uint8, None)
        kind = real.cudaMemcpyKind.cudaMemcpyHostToDevice
        assert real.cudaMemcpy(given.address, images.ctypes.data, images.nbytes, kind)[0] == 0
        for stream in (None, 1, 2):
            result = runtime.run_device(given, stream=stream)
            assert (result.numpy() == reference.run(images)).all()
    assert result.shape == images.shape[:3]
    assert (result.numpy() == labels).all()
