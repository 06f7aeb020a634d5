"""A converted graph without its types: what is left must be the certified float32 graph.

The conversions to 16 bits and to int8 only ever add casts and pairs of QuantizeLinear and
DequantizeLinear, and store weights in fewer bits. This module undoes both on onnx-ir, by rules of
its own, so that the certificate can compare the result with the graph that was certified.
"""

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import ModelProto

_FLOAT = ir.DataType.FLOAT
_FLOATS = (_FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def strip_precision(model: ModelProto, opset: int) -> ModelProto:
    """A copy of `model` in float32: without casts between floats, without quantisation, with
    float32 weights (dequantised where they were quantised), under operator set `opset`.

    Bodies of If and Loop are left as they are.
    """
    types = _element_types(model)
    plain = ir.from_proto(model)
    graph = plain.graph
    bypassed: dict[ir.Value, ir.Node] = {}
    """Values that are what the first operand of a node is, and that node."""
    dropped: dict[ir.Node, None] = {}
    for node in list(graph):
        operand = node.inputs[0] if node.inputs else None
        if operand is None:
            continue
        producer = operand.producer()
        if node.op_type == "DequantizeLinear" and operand.is_initializer():
            _store_dequantised(graph, node)
            dropped[node] = None
        elif node.op_type == "DequantizeLinear" and _is(producer, "QuantizeLinear"):
            # A node that only asks for the shape may read the quantised value as it is.
            assert producer is not None
            bypassed |= {operand: producer, node.outputs[0]: producer}
            dropped |= {producer: None, node: None}
        elif node.op_type == "Cast" and node.attributes["to"].as_int() in _FLOATS:
            if types.get(operand.name) in _FLOATS:
                bypassed[node.outputs[0]] = node
                dropped[node] = None
            else:
                node.attributes["to"] = ir.AttrInt64("to", _FLOAT)
    for value, node in bypassed.items():  # in topological order, so the operand is final
        _bypass(value, node.inputs[0])
    graph.remove(dropped, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]  # scales, zero points and quantised weights
        elif value.const_value is not None and value.const_value.dtype in _FLOATS:
            _store(value, value.const_value.numpy().astype(np.float32))
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None
    for domain in plain.opset_imports.keys() & {"", "ai.onnx"}:
        plain.opset_imports[domain] = opset
    stripped = ir.to_proto(plain)
    stripped.graph.sparse_initializer.extend(model.graph.sparse_initializer)  # not in onnx-ir
    return stripped


def _element_types(model: ModelProto) -> dict[str | None, int]:
    """Element types by name, as far as they can be inferred."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return {**types, **{tensor.name: tensor.data_type for tensor in graph.initializer}}


def _is(node: ir.Node | None, operator: str) -> bool:
    return node is not None and node.op_type == operator


def _bypass(value: ir.Value, source: ir.Value | None) -> None:
    """Lets `source` take the place of `value`; an output of the graph keeps its name and type."""
    assert source is not None
    output = value.is_graph_output()
    value.replace_all_uses_with(source, replace_graph_outputs=True)
    if output and source.producer() is not None:
        name, value.name = value.name, None
        source.name, source.type, source.shape = name, value.type, value.shape


def _store_dequantised(graph: ir.Graph, node: ir.Node) -> None:
    """Stores (values - zero point) * scale, along the node's axis where each slice has its scale,
    in the place of what the node gives."""
    values, scale, *rest = [
        value.const_value.numpy().astype(np.float32)
        for value in node.inputs
        if value is not None and value.const_value is not None
    ]
    zero = rest[0] if rest else np.zeros_like(scale)
    if scale.ndim == 1 and scale.size > 1:
        shape = [1] * values.ndim
        shape[node.attributes.get_int("axis", 1)] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    result = node.outputs[0]
    stored = ir.Value(name=result.name)
    _store(stored, ((values - zero) * scale).astype(np.float32))
    result.replace_all_uses_with(stored)
    graph.register_initializer(stored)


def _store(value: ir.Value, values: npt.NDArray[np.float32]) -> None:
    value.const_value = ir.tensor(values, name=value.name)
    value.type, value.shape = ir.TensorType(_FLOAT), ir.Shape(values.shape)
