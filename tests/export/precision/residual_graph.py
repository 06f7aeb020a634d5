"""A small deployed graph with what quantisation meets: a residual sum, a pool, a join, a head."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto
from onnx.numpy_helper import from_array, to_array

from srdeploy.spec import ONNX_KEY, Spec


def residual(
    spec: Spec, body: str = "", kernels: Mapping[str, tuple[int, ...]] | None = None, seed: int = 0
) -> ModelProto:
    """A small deployed graph: normalisation, a residual block, a pool, two branches joined, a head.

    body: nodes instead of those between stem and head, from `stem/act_out` to `body_out` (8
    channels); kernels: the shapes of their kernels, by the nodes' names.
    """
    body = (
        body
        or """
        block/conv1_out = Conv <pads = [1, 1, 1, 1]> (stem/act_out, block/conv1/w, block/conv1/b)
        block/act1_out = Relu (block/conv1_out)
        block/conv2_out = Conv <pads = [1, 1, 1, 1]> (block/act1_out, block/conv2/w, block/conv2/b)
        block/sum_out = Add (block/conv2_out, stem/act_out)
        block/act2_out = Relu (block/sum_out)
        pool_out = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (block/act2_out)
        down_out = Conv <group = 8, pads = [1, 1, 1, 1]> (pool_out, down/w, down/b)
        six/act_out = Clip (down_out, zero, six)
        wide/one_out = Conv (six/act_out, wide/one/w, wide/one/b)
        wide/two_out = Conv (six/act_out, wide/two/w, wide/two/b)
        body_out = Concat <axis = 1> (wide/one_out, wide/two_out)
    """
    )
    kernels = kernels or {
        "block/conv1": (8, 8, 3, 3),
        "block/conv2": (8, 8, 3, 3),
        "down": (8, 1, 3, 3),
        "wide/one": (4, 8, 1, 1),
        "wide/two": (4, 8, 1, 1),
    }
    lines = f"""
        size_out = Shape <start = 1, end = 3> (images)
        cast_out = Cast <to = 1> (images)
        scaled_out = Mul (cast_out, scale)
        normalised_out = Add (scaled_out, offset)
        turned_out = Transpose <perm = [0, 3, 1, 2]> (normalised_out)
        stem_out = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (turned_out, stem/w, stem/b)
        stem/act_out = Relu (stem_out)
        {body}
        head_out = Conv (body_out, head/w, head/b)
        first_out = Shape <end = 2> (head_out)
        sizes_out = Concat <axis = 0> (first_out, size_out)
        logits = Resize <mode = "linear"> (head_out, , , sizes_out)
        best_out = ArgMax <axis = 1, keepdims = 0> (logits)
        labels = Cast <to = 2> (best_out)
    """
    without = lines.replace("/", "__")  # the parser takes no slash in a name
    graph = onnx.parser.parse_graph(
        "g (uint8[N, H, W, 3] images) => (uint8[N, H, W] labels, float[N, 3, H, W] logits) {"
        + without
        + "}"
    )
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = name.replace("__", "/")
        node.name = node.output[0].removesuffix("_out")
    generator = np.random.default_rng(seed)
    for name, shape in {"stem": (8, 3, 3, 3), **kernels, "head": (3, 8, 1, 1)}.items():
        fan = np.prod(shape[1:])
        values = generator.normal(0, (2 / fan) ** 0.5, shape).astype(np.float32)
        graph.initializer.append(from_array(values, f"{name}/w"))
        bias = generator.normal(0, 0.2, shape[0]).astype(np.float32)
        graph.initializer.append(from_array(bias, f"{name}/b"))
    constants: dict[str, Any] = {
        "scale": np.full(3, 1 / 64, np.float32),
        "offset": np.full(3, -2, np.float32),
    }
    constants |= {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    constants["zeros"] = np.zeros(8, np.int64)
    graph.initializer.extend(from_array(value, name) for name, value in constants.items())
    used = {name for node in graph.node for name in node.input}
    left = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.helper.set_model_props(model, {ONNX_KEY: spec.to_json(), "note": "mine"})
    onnx.checker.check_model(model, full_check=True)
    return model


def node_of(model: ModelProto, name: str) -> NodeProto:
    (found,) = [node for node in model.graph.node if node.name == name]
    assert isinstance(found, NodeProto)
    return found


def maker_of(model: ModelProto, name: str) -> str:
    """The operator that makes the value; "" for none."""
    makers = [node.op_type for node in model.graph.node if name in node.output]
    return makers[0] if makers else ""


def tensors(model: ModelProto) -> dict[str, Any]:
    return {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
