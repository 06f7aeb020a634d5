"""A run's own time, apart from copies: the labels stay the same, and a CPU has none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from srdeploy.runtimes.onnx_runtime import run_apart
from srdeploy.runtimes.registry import open_runtime

MakeGraph = Callable[..., Path]


def test_a_bound_run_gives_the_plain_runs_outputs_and_a_time(make_graph: MakeGraph) -> None:
    path = make_graph(output="both")
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = ["labels", "logits"]
    found, took = run_apart(onnxruntime, session, ("images", images), names, ("cpu", 0))
    plain = session.run(names, {"images": images})
    assert took > 0
    for ours, theirs in zip(found, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_on_a_cpu_there_is_no_time_of_a_device(make_graph: MakeGraph, run_folder: Path) -> None:
    images = np.zeros((1, 40, 48, 3), np.uint8)
    for path in (make_graph(), run_folder):
        with open_runtime(path) as runtime:
            labels, phases = runtime.timed_run(images)
            assert phases is None
            np.testing.assert_array_equal(labels, runtime.run(images))
