"""What a 16-bit graph computes, in float32: every 16-bit tensor rounded, arithmetic as it is.

Tensor cores multiply 16-bit numbers and add in float32, and a result is rounded when it is stored.
Here each operator computes in float32, and a pair of casts, to the type and back, rounds what it
gives. The graph runs where the type has no kernels, such as bfloat16 in onnxruntime on CPUs.
"""

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from srdeploy.errors import UserError
from srdeploy.export.precision.conversion import Names
from srdeploy.export.precision.inlining import inlined
from srdeploy.export.precision.tensor_types import (
    FLOAT,
    HALF_TYPES,
    bodies_of,
    captured_by,
    element_types,
    in_32_bits,
    label_of,
)

_HALVES = frozenset(HALF_TYPES.values())

_SELECTING = frozenset(
    ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Concat", "Split")
    + ("Slice", "Gather", "GatherElements", "GatherND", "Expand", "Tile", "Pad", "Where")
    + ("Relu", "Clip", "Min", "Max", "MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin")
    + ("DepthToSpace", "SpaceToDepth", "TopK", "Dropout", "Neg", "Abs")
)
"""Operators whose results are among their operands' values, but for the sign, and therefore
rounded already."""


def emulate(model: ModelProto) -> ModelProto:
    """A copy of `model` in float32 in which every tensor that `model` stores in 16 bits is rounded.

    Inputs and outputs keep names and types, nodes and values keep their names. Tensors of other
    types, float32 among them, are untouched, so a graph of mixed precision works. Raises UserError
    where a body of If, Loop or Scan computes in 16 bits.
    """
    float_model = inlined(model)
    types = element_types(float_model)
    graph = float_model.graph
    for node in graph.node:
        _refuse_half_bodies(node, types)
    names = Names(graph)
    starts: list[NodeProto] = []
    ends: list[NodeProto] = []
    renamed: dict[str, str] = {}
    for value in (*graph.input, *graph.output):
        if types[value.name] in _HALVES and value.name not in renamed:
            renamed[value.name] = names.fresh(f"{value.name}/fp32")
    for value in graph.input:
        if value.name in renamed:
            label = names.fresh(f"{value.name}/Cast")
            starts.append(_cast(value.name, renamed[value.name], FLOAT, label))
    for value in graph.output:
        if value.name in renamed:
            label = names.fresh(f"{value.name}/Cast")
            ends.append(_cast(renamed[value.name], value.name, types[value.name], label))
    for tensor in graph.initializer:
        if int(tensor.data_type) in _HALVES:
            tensor.CopyFrom(in_32_bits(tensor))
            tensor.name = renamed.get(tensor.name, tensor.name)
    middle = [one for node in graph.node for one in _rounded(node, types, renamed, names)]
    del graph.node[:]
    graph.node.extend([*starts, *middle, *ends])
    for value in graph.value_info:
        if value.name not in renamed and types.get(value.name) in _HALVES:
            value.type.tensor_type.elem_type = FLOAT
    onnx.checker.check_model(float_model, full_check=True)
    return float_model


def _rounded(
    node: NodeProto, types: dict[str, int], renamed: dict[str, str], names: Names
) -> list[NodeProto]:
    """The node in float32, and after it the casts that round its 16-bit results."""
    selects = node.op_type in _SELECTING or (
        node.op_type == "Constant" and node.domain in ("", "ai.onnx")
    )
    _retype_attributes(node)
    label = label_of(node)
    casts: list[NodeProto] = []
    for position, name in enumerate(node.input):
        node.input[position] = renamed.get(name, name)
    for position, name in enumerate(node.output):
        result = renamed.get(name, name)
        node.output[position] = result
        if not name or types[name] not in _HALVES or selects:
            continue
        exact, rounded = (names.fresh(f"{name}/{suffix}") for suffix in ("exact", "rounded"))
        node.output[position] = exact
        casts.append(_cast(exact, rounded, types[name], names.fresh(f"{label}/Round")))
        casts.append(_cast(rounded, result, FLOAT, names.fresh(f"{label}/Cast")))
    return [node, *casts]


def _cast(source: str, result: str, element_type: int, name: str) -> NodeProto:
    return onnx.helper.make_node("Cast", [source], [result], name=name, to=element_type)


def _retype_attributes(node: NodeProto) -> None:
    """16-bit tensors in attributes, and attributes that name a 16-bit type, become float32."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR and int(attribute.t.data_type) in _HALVES:
            attribute.t.CopyFrom(in_32_bits(attribute.t))
        elif attribute.name in ("to", "dtype", "output_dtype") and attribute.i in _HALVES:
            attribute.i = FLOAT


def _refuse_half_bodies(node: NodeProto, types: dict[str, int]) -> None:
    read = any(types.get(name) in _HALVES for name in captured_by(node))
    if read or any(_computes_in_16_bits(body) for body in bodies_of(node)):
        raise UserError(
            f"node '{label_of(node)}' ({node.op_type}) computes in 16 bits in its body, which "
            "can't be emulated in float32: run the graph on a device that has the type"
        )


def _computes_in_16_bits(body: GraphProto) -> bool:
    tensors: list[TensorProto] = list(body.initializer)
    for node in body.node:
        tensors += [a.t for a in node.attribute if a.type == AttributeProto.TENSOR]
        if any(a.name in ("to", "dtype") and a.i in _HALVES for a in node.attribute):
            return True
        if any(_computes_in_16_bits(inner) for inner in bodies_of(node)):
            return True
    values = (*body.input, *body.output)
    kinds = [v.type.tensor_type.elem_type for v in values] + [t.data_type for t in tensors]
    return any(int(kind) in _HALVES for kind in kinds)
