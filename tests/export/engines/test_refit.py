"""The refit proof where there is no GPU: plans compared byte by byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from srdeploy.errors import UserError
from srdeploy.export.certificate import read_model
from srdeploy.export.engines.build import BuildOptions
from srdeploy.export.engines.refit import compare_plans, refit_line, weights_found

MakeTyped = Callable[..., Path]
AHEAD = BuildOptions(builder="rtx", sm=("8.9",))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_networks_that_differ_in_weights_alone_have_one_plan(
    rtx: Any, typed_graph: MakeTyped, precision: str
) -> None:
    baseline = typed_graph(precision, precision, "baseline.onnx", seed=1)
    regulated = typed_graph(precision, precision, "regulated.onnx", seed=2)
    options = AHEAD.model_copy(update={"precision": precision})
    line = refit_line(baseline, regulated, options)
    assert line.name == "refit"
    assert line.passed, line.detail
    assert "no refit was run, which needs a GPU" in line.detail
    assert line.figures["method"] == "compared plans"
    assert 0 < line.figures["bytes_that_differ"] <= line.figures["span"]


def test_the_regulated_weights_are_in_the_plan(rtx: Any, typed_graph: MakeTyped) -> None:
    files = [typed_graph(name=f"{seed}.onnx", seed=seed, channels=32) for seed in (1, 2)]
    assert refit_line(files[0], files[1], AHEAD).figures["weights_found"] == 1.0


def test_another_network_has_another_plan(rtx: Any, typed_graph: MakeTyped) -> None:
    baseline = typed_graph(name="baseline.onnx")
    for other in (typed_graph(name="odd.onnx", odd="Relu"), typed_graph(name="b", channels=9)):
        line = refit_line(baseline, other, AHEAD)
        assert line.passed is False
        assert "differs from the baseline's beyond its weights" in line.detail


def test_one_file_twice_shows_nothing(typed_graph: MakeTyped) -> None:
    with pytest.raises(UserError, match="a refit would show nothing"):
        refit_line(typed_graph(), typed_graph(), AHEAD)


def test_a_change_outside_of_the_weights_is_seen() -> None:
    plan = bytes(5000)
    one = plan[:4000] + b"\1" * 400 + plan[4400:]
    assert compare_plans(plan, one, weights=400, tensors=1) == {
        "plan_bytes": 5000,
        "weight_bytes": 400,
        "bytes_that_differ": 400,
        "span": 400,
        "from": 4000,
        "same_plan": True,
    }
    two = one[:100] + b"\1" + one[101:]
    assert "spread over 4,300 bytes" in compare_plans(plan, two, 400, 1)["why"]
    assert compare_plans(plan, plan, 400, 1)["why"] == "no byte differs, not even of the weights"
    assert compare_plans(plan, one + b"\0", 400, 1)["why"] == "5,000 and 5,001 bytes long"


def test_weights_are_found_in_any_order_of_their_axes(typed_graph: MakeTyped) -> None:
    from onnx import numpy_helper

    model = read_model(typed_graph())
    kernels = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    turned = b"".join(kernel.transpose(0, 2, 3, 1).tobytes() for kernel in kernels)
    assert weights_found(model, b"head" + turned) == 1.0
    assert weights_found(model, turned[: kernels[0].nbytes]) == pytest.approx(
        kernels[0].nbytes / sum(kernel.nbytes for kernel in kernels)
    )
    assert weights_found(model, bytes(4000)) == 0.0
