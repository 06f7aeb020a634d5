"""A typed graph with its types taken out again: what must be left is the certified float32 graph.

The conversions to 16 bits and to int8 only ever add casts and pairs of QuantizeLinear and
DequantizeLinear, and store weights in fewer bits. This module undoes both by rules of its own, so
that the certificate can hold the result against the graph that was certified.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

FLOATS = frozenset(
    (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
)


def untyped(model: ModelProto, opset: int) -> ModelProto:
    """A copy of `model` in float32: without casts between floats, without quantisation, with
    float32 weights (dequantised where they were quantised), under operator set `opset`.

    Bodies of If and Loop are left as they are.
    """
    plain = ModelProto()
    plain.CopyFrom(model)
    kinds = _kinds(plain)
    graph = plain.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    passed: dict[str, str] = {}
    dropped: list[NodeProto] = []
    floats: dict[str, npt.NDArray[np.float32]] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            floats[node.output[0]] = _dequantised(node, stored)
            dropped.append(node)
        elif node.op_type == "DequantizeLinear" and _is_quantised(node, makers):
            # A node that asks for the shape alone may read what is quantised as it is.
            passed[node.output[0]] = passed[node.input[0]] = makers[node.input[0]].input[0]
            dropped += [node, makers[node.input[0]]]
        elif node.op_type == "Cast" and kinds.get(node.input[0]) in FLOATS:
            if node.attribute[0].i in FLOATS:
                passed[node.output[0]] = node.input[0]
                dropped.append(node)
        elif node.op_type == "Cast" and node.attribute[0].i in FLOATS:
            node.attribute[0].i = TensorProto.FLOAT
    _remove(graph, dropped)
    _bypass(graph, passed)
    _store(graph, floats)
    _drop_idle(graph)
    for imported in plain.opset_import:
        if imported.domain in ("", "ai.onnx"):
            imported.version = opset
    graph.ClearField("value_info")
    return plain


def _kinds(model: ModelProto) -> dict[str, int]:
    """Tensor name -> element type, as far as it can be inferred."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    return kinds | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _is_quantised(node: NodeProto, makers: dict[str, NodeProto]) -> bool:
    maker = makers.get(node.input[0])
    return maker is not None and maker.op_type == "QuantizeLinear"


def _dequantised(node: NodeProto, stored: dict[str, TensorProto]) -> npt.NDArray[np.float32]:
    """(values - zero point) * scale, along the node's axis where each slice has its scale."""
    arrays = [onnx.numpy_helper.to_array(stored[name]).astype(np.float32) for name in node.input]
    values, scale = arrays[:2]
    zero = arrays[2] if len(arrays) > 2 else np.zeros_like(scale)
    if scale.ndim == 1 and scale.size > 1:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        shape = [1] * values.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    result: npt.NDArray[np.float32] = ((values - zero) * scale).astype(np.float32)
    return result


def _remove(graph: GraphProto, dropped: list[NodeProto]) -> None:
    gone = {id(node) for node in dropped}
    kept = [node for node in graph.node if id(node) not in gone]
    copies = [_copy(node) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)


def _copy(node: NodeProto) -> NodeProto:
    copied = NodeProto()
    copied.CopyFrom(node)
    return copied


def _bypass(graph: GraphProto, passed: dict[str, str]) -> None:
    """Reads past what was removed; an output of the graph keeps its name."""

    def source(name: str) -> str:
        while name in passed:
            name = passed[name]
        return name

    renamed = {source(value.name): value.name for value in graph.output if value.name in passed}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(source(name), source(name))
        for index, name in enumerate(node.output):
            node.output[index] = renamed.get(name, name)


def _store(graph: GraphProto, floats: dict[str, npt.NDArray[np.float32]]) -> None:
    for tensor in graph.initializer:
        if tensor.data_type in FLOATS and tensor.data_type != TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for name, array in floats.items():
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))


def _drop_idle(graph: GraphProto) -> None:
    """Scales, zero points and quantised weights that nothing reads any more."""
    read = {name for node in graph.node for name in (*node.input, *_in_bodies(node))}
    read |= {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    copies = []
    for tensor in kept:
        copied = TensorProto()
        copied.CopyFrom(tensor)
        copies.append(copied)
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _in_bodies(node: NodeProto) -> Iterator[str]:
    for attribute in node.attribute:
        bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        for body in bodies:
            for inner in body.node:
                yield from inner.input
                yield from _in_bodies(inner)
