"""Taking the types out of a converted graph gives the certified graph, and nothing else does."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from srdeploy.export.certificate import identity_lines
from srdeploy.export.precision.half import to_half
from srdeploy.export.precision.stage import types_line
from srdeploy.export.precision.strip_precision import strip_precision
from srdeploy.graph.signature import opset_of
from srdeploy.precision import HalfPrecision


@pytest.fixture(scope="module")
def certified(tiny_file: Path) -> ModelProto:
    return onnx.load(str(tiny_file))


def same(a: ModelProto, b: ModelProto) -> bool:
    return all(line.passed for line in identity_lines(a, b))


def node_of(model: ModelProto, kind: str) -> onnx.NodeProto:
    (first, *_) = [node for node in model.graph.node if node.op_type == kind]
    assert isinstance(first, onnx.NodeProto)
    return first


def quantised_by_hand() -> tuple[ModelProto, ModelProto]:
    """A convolution whose logits are an output, in float32 and with quantised input and weights."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2, 8, 8])
    values = np.arange(6, dtype=np.int8).reshape(2, 3, 1, 1)
    scale = np.array([0.5, 0.25], np.float32)
    weight = values.astype(np.float32) * scale.reshape(2, 1, 1, 1)
    plain = helper.make_graph(
        [helper.make_node("Conv", ["images", "weight"], ["logits"], name="head")],
        "plain",
        [images],
        [logits],
        [numpy_helper.from_array(weight, "weight")],
    )
    typed = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["weight"], axis=0),
            helper.make_node("Conv", ["d", "weight"], ["logits"], name="head"),
        ],
        "typed",
        [images],
        [logits],
        [
            numpy_helper.from_array(np.array(0.1, np.float32), "s"),
            numpy_helper.from_array(np.array(128, np.uint8), "z"),
            numpy_helper.from_array(values, "w"),
            numpy_helper.from_array(scale, "ws"),
            numpy_helper.from_array(np.zeros(2, np.int8), "wz"),
        ],
    )
    opsets = [helper.make_opsetid("", 20)]
    a, b = (helper.make_model(g, opset_imports=opsets, ir_version=9) for g in (plain, typed))
    return a, b


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_graph_of_16_bits_is_the_certified_one_without_its_casts(
    certified: ModelProto, precision: HalfPrecision
) -> None:
    typed = to_half(certified, precision)
    assert not same(certified, typed)
    assert same(certified, strip_precision(typed, opset_of(certified)))
    line = types_line(certified, typed)
    assert line.passed, line.detail


def test_an_output_keeps_its_name_and_weights_their_values(certified: ModelProto) -> None:
    plain = strip_precision(to_half(certified, "fp16", ["network/head/*"]), opset_of(certified))
    onnx.checker.check_model(plain, full_check=True)
    assert [v.name for v in plain.graph.output] == [v.name for v in certified.graph.output]
    before = {t.name: numpy_helper.to_array(t) for t in certified.graph.initializer}
    for tensor in plain.graph.initializer:
        if tensor.name in before and before[tensor.name].dtype == np.float32:
            found = numpy_helper.to_array(tensor)
            np.testing.assert_allclose(found, before[tensor.name], rtol=2**-10, atol=1e-6)


def test_a_quantised_graph_is_the_certified_one_with_dequantised_weights() -> None:
    plain, typed = quantised_by_hand()
    found = strip_precision(typed, 20)
    onnx.checker.check_model(found, full_check=True)
    assert same(plain, found)
    (weight,) = found.graph.initializer
    np.testing.assert_array_equal(
        numpy_helper.to_array(weight), numpy_helper.to_array(plain.graph.initializer[0])
    )


def test_an_operator_that_the_conversion_left_out_fails_the_line(certified: ModelProto) -> None:
    typed = to_half(certified, "fp16")
    relu = node_of(typed, "Relu")
    for node in typed.graph.node:
        for index, name in enumerate(node.input):
            if name == relu.output[0]:
                node.input[index] = relu.input[0]
    typed.graph.node.remove(relu)
    line = types_line(certified, typed)
    assert line.passed is False
    assert "Relu" in line.detail


def test_a_changed_attribute_fails_the_line(certified: ModelProto) -> None:
    typed = to_half(certified, "bf16")
    strides = next(a for a in node_of(typed, "Conv").attribute if a.name == "strides")
    strides.ints[0] += 1
    assert types_line(certified, typed).passed is False
