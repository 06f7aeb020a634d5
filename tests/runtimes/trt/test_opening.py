"""Opening engines and closing them, on whatever machine and whichever call fails."""

import re

import numpy as np
import pytest

from srdeploy.artifacts.artifact import EngineSidecar, open_artifact
from srdeploy.errors import MissingPackageError, UserError
from srdeploy.runtimes.base import ImageShapeError, RuntimeOptions
from srdeploy.runtimes.registry import open_runtime
from srdeploy.runtimes.trt.arrays import DeviceArray, Stream
from srdeploy.runtimes.trt.cuda_api import Cuda
from srdeploy.runtimes.trt.engine import _TYPES
from srdeploy.runtimes.trt.runtime import TensorRTLibraries, TensorRTRuntime
from tests.runtimes.trt.fake_cuda import cudaError_t
from tests.runtimes.trt.fake_machine import COMMAND, Bench, MakeEngine, by_onnxruntime, photos
from tests.runtimes.trt.fake_tensorrt import write_plan


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
        bench.trt.contexts[-1].engine.logger.log(bench.trt.ILogger.ERROR, "of no consequence")
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

    libraries = TensorRTLibraries(lambda _: bench.trt, lambda _: bench.api, guard)
    bench.api.count = 2
    with pytest.raises(UserError, match="another GPU"):
        TensorRTRuntime(
            artifact, artifact.spec, RuntimeOptions("cuda:1"), libraries=libraries
        ).__enter__()
    assert asked == [(COMMAND, 1)]


def test_a_file_that_is_not_the_sidecars_is_refused(bench: Bench, make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.write_bytes(engine.read_bytes()[:-1] + b"]")
    with pytest.raises(UserError, match=f"another SHA-256.*{COMMAND}"):
        bench.runtime(engine).__enter__()


def test_types_have_the_names_that_we_know_them_by() -> None:
    """Other names are compared by the tests of the bindings."""
    trt = pytest.importorskip("tensorrt_rtx", reason="no TensorRT here: types were NOT compared")
    for name in _TYPES:
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
        with pytest.raises(MissingPackageError, match=r"pip install tensorrt "):
            open_runtime(make_engine(), "cuda").__enter__()
    else:
        pytest.skip("TensorRT is installed here: its absence was NOT tested")
