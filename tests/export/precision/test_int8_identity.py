"""Identity of quantised graphs: calibrated values are weights, how a graph is rounded is not.

Both oracles are asked each time; they share no code.
"""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto
from onnx.numpy_helper import from_array, to_array

from srdeploy.export.digest import graph_digest
from srdeploy.export.isomorphism import compare_graphs
from srdeploy.export.precision.int8 import to_int8
from srdeploy.imaging import Pixels
from srdeploy.precision import Target
from srdeploy.spec import Spec
from tests.export.precision.residual_graph import node_of, residual

TARGETS: tuple[Target, ...] = ("tensorrt", "cpu")

Change = Callable[[ModelProto], None]


@pytest.fixture(scope="module")
def trained(spec: Spec, photos: list[Pixels]) -> dict[str, tuple[ModelProto, ModelProto]]:
    """Two trainings of one network, quantised on pictures of their own."""
    pairs: dict[str, tuple[ModelProto, ModelProto]] = {}
    for target in TARGETS:
        first = to_int8(residual(spec, seed=0), photos[:1], target)
        second = to_int8(residual(spec, seed=1), photos[1:], target)
        pairs[target] = first, second
    return pairs


def changed(model: ModelProto, change: Change) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    change(copy)
    onnx.checker.check_model(copy, full_check=True)
    return copy


def assert_different(a: ModelProto, b: ModelProto) -> None:
    assert graph_digest(a) != graph_digest(b)
    assert not compare_graphs(a, b)


def replace(model: ModelProto, name: str, values: np.ndarray) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(from_array(values, name))


def stored(model: ModelProto, name: str) -> np.ndarray:
    (found,) = [t for t in model.graph.initializer if t.name == name]
    return to_array(found)


@pytest.mark.parametrize("target", TARGETS)
def test_scales_zero_points_kernels_and_biases_are_weights(
    trained: dict[str, tuple[ModelProto, ModelProto]], target: Target
) -> None:
    first, second = trained[target]
    assert stored(first, "stem/act/scale") != stored(second, "stem/act/scale")
    assert (stored(first, "down/w/int8") != stored(second, "down/w/int8")).any()
    assert graph_digest(first) == graph_digest(second)
    walk = compare_graphs(first, second)
    assert walk, walk.first_difference


def test_the_two_forms_and_float32_are_three_graphs(
    trained: dict[str, tuple[ModelProto, ModelProto]], spec: Spec
) -> None:
    graphs = [trained["tensorrt"][0], trained["cpu"][0], residual(spec)]
    assert_different(graphs[0], graphs[1])
    assert_different(graphs[0], graphs[2])
    assert_different(graphs[1], graphs[2])


def unrounded(model: ModelProto) -> None:
    """One operand read as it is, where it was read rounded."""
    node_of(model, "block/conv2").input[0] = "block/act1_out"
    drop(model, "block/act1/")


def rounded_elsewhere(model: ModelProto) -> None:
    """Rounded before the activation and not after it."""
    node_of(model, "block/act1/QuantizeLinear").input[0] = "block/conv1_out"
    node_of(model, "block/act1").input[0] = "block/act1/DequantizeLinear_out"
    node_of(model, "block/conv2").input[0] = "block/act1_out"
    nodes = {node.name: node for node in model.graph.node}
    order = [name for name in nodes if name != "block/act1"]
    order.insert(order.index("block/act1/DequantizeLinear") + 1, "block/act1")
    copies = [NodeProto.FromString(nodes[name].SerializeToString()) for name in order]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def one_scale_per_kernel(model: ModelProto) -> None:
    replace(model, "down/w/scale", np.array(0.01, np.float32))
    replace(model, "down/w/zero_point", np.array(0, np.int8))


def another_axis(model: ModelProto) -> None:
    (axis,) = node_of(model, "block/conv1/weight/DequantizeLinear").attribute
    axis.i = 1


def another_zero_point_type(model: ModelProto) -> None:
    zero = stored(model, "block/act1/zero_point")
    replace(
        model, "block/act1/zero_point", zero.astype({"u": np.int8, "i": np.uint8}[zero.dtype.kind])
    )


def no_zero_point(model: ModelProto) -> None:
    del node_of(model, "down/weight/DequantizeLinear").input[2]


def drop(model: ModelProto, stem: str) -> None:
    left = [node for node in model.graph.node if not node.name.startswith(stem)]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in left]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    tensors = [t for t in model.graph.initializer if not t.name.startswith(stem)]
    kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "change",
    [
        unrounded,
        rounded_elsewhere,
        one_scale_per_kernel,
        another_axis,
        another_zero_point_type,
        no_zero_point,
    ],
)
def test_where_and_how_a_graph_is_rounded_counts(
    trained: dict[str, tuple[ModelProto, ModelProto]], target: Target, change: Change
) -> None:
    first, second = trained[target]
    assert_different(first, changed(second, change))
