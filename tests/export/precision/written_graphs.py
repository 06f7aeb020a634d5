"""Graphs written as text for tests of precision, and what is read from them."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto
from onnx.numpy_helper import from_array

from srdeploy.export.precision.tensor_types import element_types

TYPES: dict[str, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}

SEGMENTER = """
<ir_version: 10, opset_import: ["" : 20], metadata_props: ["about": "a test"]>
segmenter (uint8[N, H, W, 3] images) => (uint8[N, H, W] labels)
<float[3] scale, float[3] offset, float[4, 3, 3, 3] stem, float[4] bias, float[5, 4, 1, 1] head>
{
    [numbers] pixels = Cast <to: int = 1> (images)
    [scaling] scaled = Mul (pixels, scale)
    [shifting] shifted = Add (scaled, offset)
    [turn] turned = Transpose <perm: ints = [0, 3, 1, 2]> (shifted)
    [stem] features = Conv <strides: ints = [2, 2], pads: ints = [1, 1, 1, 1]> (turned, stem, bias)
    [relu] active = Relu (features)
    [head] low = Conv (active, head)
    [measure] whole = Shape (turned)
    [start] first = Constant <value_ints: ints = [2]> ()
    [end] last = Constant <value_ints: ints = [4]> ()
    [cut] size = Slice (whole, first, last)
    [front] kept = Shape <start: int = 0, end: int = 2> (low)
    [sizes] all = Concat <axis: int = 0> (kept, size)
    [resize] logits = Resize <mode: string = "linear"> (low, , , all)
    [argmax] best = ArgMax <axis: int = 1, keepdims: int = 0> (logits)
    [bytes] labels = Cast <to: int = 2> (best)
}
"""


def built(text: str, seed: int = 0, **values: Any) -> ModelProto:
    """The graph as written; the tensors that it declares hold `values`, or drawn ones."""
    model = onnx.parser.parse_model(text)
    generator = np.random.default_rng(seed)
    for declared in model.graph.value_info:
        tensor = declared.type.tensor_type
        shape = tuple(dim.dim_value for dim in tensor.shape.dim)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        content = values.get(declared.name, generator.normal(size=shape))
        model.graph.initializer.append(from_array(np.asarray(content, dtype), declared.name))
    model.graph.ClearField("value_info")
    onnx.checker.check_model(model, full_check=True)
    return model


def surrounded(nodes: str, tensors: str = "", opset: int = 20) -> str:
    """Nodes that make `y` of `x`, with a convolution before and one after."""
    return f"""
        <ir_version: 10, opset_import: ["" : {opset}]>
        net (float[1, 3, 8, 8] image) => (float[A, B, C, D] result)
        <float[4, 3, 1, 1] before, float[4, 4, 1, 1] after{tensors}>
        {{
            [before] x = Conv (image, before)
            {nodes}
            [after] z = Conv (y, after)
            [end] result = Relu (z)
        }}
        """


def run(model: ModelProto, *inputs: Any, optimised: bool = True) -> list[Any]:
    """The outputs in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimised:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feed = {value.name: x for value, x in zip(session.get_inputs(), inputs, strict=True)}
    return list(session.run(None, feed))


def types_of_results(model: ModelProto) -> dict[str, str]:
    """By node: the type of its first result."""
    types = element_types(model)
    return {n.name: TensorProto.DataType.Name(types[n.output[0]]) for n in model.graph.node}


def stored_types(model: ModelProto) -> dict[str, str]:
    return {t.name: TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}
