"""Engines behind the runtime contract, with images of the host. What is right is what onnxruntime
says of the same graph."""

from threading import Thread

import pytest

from srdeploy.artifacts.artifact import Profile
from srdeploy.errors import UserError
from srdeploy.precision import Precision
from srdeploy.runtimes.base import ImageShapeError
from tests.runtimes.trt.fake_machine import Bench, MakeEngine, by_onnxruntime, photos
from tests.runtimes.trt.fake_tensorrt import write_plan

FORMS = [(i, o) for i in ("uint8", "float32") for o in ("labels", "logits", "both")]


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
                with pytest.raises(UserError, match="gives only labels"):
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
