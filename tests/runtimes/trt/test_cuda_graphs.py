"""CUDA graphs: captured once for a shape, and never launched where something moved."""

import numpy as np
import pytest

from srdeploy.errors import UserError
from srdeploy.runtimes.trt.session import CAPTURED
from tests.runtimes.trt.fake_cuda import cudaError_t
from tests.runtimes.trt.fake_machine import Bench, MakeEngine, by_onnxruntime, launches, photos
from tests.runtimes.trt.fake_tensorrt import CudaGraphStrategy


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
