"""A float32 graph as a strongly typed fp16 or bf16 one, and what that one computes, emulated in
float32.
"""

from collections.abc import Collection

import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from srdeploy.errors import UserError
from srdeploy.export.precision.conversion import Conversion
from srdeploy.export.precision.tensor_types import (
    FLOAT,
    HALF_TYPES,
    element_types,
    in_32_bits,
)
from srdeploy.export.precision.zones import holds_network, is_named, nodes_in_16_bits
from srdeploy.graph.index import Names, bodies_of, captured_by, label_of, names_in
from srdeploy.graph.operators import NETWORK, SELECTING, is_constant
from srdeploy.graph.signature import opset_of
from srdeploy.graph.subgraph import real_inputs
from srdeploy.precision import PRECISION_KEY, HalfPrecision

BFLOAT16_OPSET = 22
"""The first operator set in which convolutions and pools take bfloat16."""


def to_half(model: ModelProto, precision: HalfPrecision, keep: Collection[str] = ()) -> ModelProto:
    """A copy of `model` that computes in `precision`; inputs and outputs keep names and types.

    model: float32, with its tensors loaded. keep: names of nodes, or shell patterns of names, that
    stay in float32. Nodes keep their names, and values too, but for a 16-bit one that is an output
    (`logits/fp16` is then what `logits` is cast from). bf16 graphs are brought to operator set 22.
    Raises UserError where a pattern matches nothing, a weight is out of the type's range, nothing
    is left to convert, or the body of an If, Loop or Scan holds weighted operators.
    """
    half = HALF_TYPES[precision]
    converted = _prepared(model, precision)
    graph = converted.graph
    opset = opset_of(converted)
    types = element_types(converted)
    chosen = nodes_in_16_bits(graph, types, opset, half, keep)
    if not any(graph.node[index].op_type in NETWORK for index in chosen):
        raise UserError(
            f"no weighted operator of the graph can be converted to {precision}: it holds none in "
            "float32, or --keep names them all"
        )
    _refuse_weights_in_bodies(graph, precision, keep)
    Conversion(graph, precision, chosen, types, opset).run()
    metadata = {entry.key: entry.value for entry in converted.metadata_props}
    onnx.helper.set_model_props(
        converted, dict(sorted({**metadata, PRECISION_KEY: precision}.items()))
    )
    _check(converted, model)
    return converted


def _check(converted: ModelProto, model: ModelProto) -> None:
    """Raises UserError where ONNX's checker refuses the result because of what it was made from."""
    faults = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
    try:
        onnx.checker.check_model(converted, full_check=True)
    except faults:
        try:
            onnx.checker.check_model(model, full_check=True)
        except faults as error:
            reason = next(iter(str(error).strip().splitlines()), "invalid")
            raise UserError(
                f"the graph contradicts itself, so its types can't be changed ({reason}): "
                "export it again"
            ) from error
        raise


def _prepared(model: ModelProto, precision: HalfPrecision) -> ModelProto:
    """A copy in an operator set that fits, with functions inlined and constants stored."""
    described = {value.name for value in model.graph.value_info}
    converted = inlined(model)
    if precision == "bf16" and opset_of(converted) < BFLOAT16_OPSET:
        converted = _in_newer_opset(converted)
    inputs = real_inputs(converted)
    del converted.graph.input[:]
    converted.graph.input.extend(inputs)  # files before IR 4 list weights as inputs
    least = onnx.helper.find_min_ir_version_for(converted.opset_import, ignore_unknown=True)
    converted.ir_version = max(converted.ir_version, least, 4)
    _store_constants(converted.graph)
    values = [value for value in converted.graph.value_info if value.name in described]
    del converted.graph.value_info[:]
    converted.graph.value_info.extend(values)
    return converted


def _in_newer_opset(model: ModelProto) -> ModelProto:
    try:
        return onnx.version_converter.convert_version(model, BFLOAT16_OPSET)
    except (
        RuntimeError,
        onnx.version_converter.ConvertError,
        onnx.shape_inference.InferenceError,
    ) as error:
        reason = str(error).strip().rpartition("failed: ")[2] or type(error).__name__
        raise UserError(
            f"bf16 needs operator set {BFLOAT16_OPSET}, and the graph's {opset_of(model)} can't be "
            f"converted to it ({reason}): use --precision fp16, or export with a newer operator set"
        ) from error


def _store_constants(graph: GraphProto) -> None:
    """Constant nodes of floats as initialisers, so that there is one way to convert a weight."""
    nodes = []
    for node in graph.node:
        tensor = _constant_of(node)
        if tensor is None:
            nodes.append(node)
        else:
            graph.initializer.append(tensor)
    del graph.node[:]
    graph.node.extend(nodes)


def _constant_of(node: NodeProto) -> TensorProto | None:
    if not is_constant(node.op_type, node.domain):
        return None
    (attribute,) = node.attribute
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
        return tensor
    if attribute.name == "value_float":
        return onnx.helper.make_tensor(node.output[0], FLOAT, [], [value])
    if attribute.name == "value_floats":
        return onnx.helper.make_tensor(node.output[0], FLOAT, [len(value)], value)
    return None


def _refuse_weights_in_bodies(
    graph: GraphProto, precision: HalfPrecision, keep: Collection[str]
) -> None:
    for node in graph.node:
        if holds_network(node) and not any(is_named(node, pattern) for pattern in keep):
            raise UserError(
                f"node '{label_of(node)}' ({node.op_type}) holds weighted operators in its body, "
                f"which can't be converted to {precision}: name it with --keep to leave it in "
                "float32, or export the network without it"
            )


# What a 16-bit graph computes, in float32: every 16-bit tensor rounded, arithmetic as it is.

_HALVES = frozenset(HALF_TYPES.values())


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
    names = Names(names_in(graph))
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
    selects = node.op_type in SELECTING or is_constant(node.op_type, node.domain)
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


def inlined(model: ModelProto) -> ModelProto:
    """A copy of `model` without functions of its own: their nodes are inlined in the graph."""
    if model.functions:
        return onnx.inliner.inline_local_functions(model)
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy
