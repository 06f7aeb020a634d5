"""A float32 graph as a strongly typed fp16 or bf16 one.

Types are in the graph itself, where every runtime reads the same: weights are stored in 16 bits,
casts stand where a node of one precision reads the other, and no flag of a builder decides
anything. Which nodes compute in 16 bits is told in `zones`.
"""

from collections.abc import Collection

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from srdeploy.errors import UserError
from srdeploy.export.certificate import opset_of
from srdeploy.export.precision.conversion import Conversion
from srdeploy.export.precision.inlining import inlined
from srdeploy.export.precision.tensor_types import (
    FLOAT,
    HALF_TYPES,
    element_types,
    label_of,
)
from srdeploy.export.precision.zones import LEARNT, holds_learnt, is_named, nodes_in_16_bits
from srdeploy.export.subgraph import real_inputs
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
    typed = _prepared(model, precision)
    graph = typed.graph
    opset = opset_of(typed)
    types = element_types(typed)
    chosen = nodes_in_16_bits(graph, types, opset, half, keep)
    if not any(graph.node[index].op_type in LEARNT for index in chosen):
        raise UserError(
            f"no weighted operator of the graph can be converted to {precision}: it holds none in "
            "float32, or --keep names them all"
        )
    _refuse_weights_in_bodies(graph, precision, keep)
    Conversion(graph, precision, chosen, types, opset).run()
    metadata = {entry.key: entry.value for entry in typed.metadata_props}
    onnx.helper.set_model_props(typed, dict(sorted({**metadata, PRECISION_KEY: precision}.items())))
    _check(typed, model)
    return typed


def _check(typed: ModelProto, model: ModelProto) -> None:
    """Raises UserError where ONNX's checker refuses the result because of what it was made from."""
    faults = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
    try:
        onnx.checker.check_model(typed, full_check=True)
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
    typed = inlined(model)
    if precision == "bf16" and opset_of(typed) < BFLOAT16_OPSET:
        typed = _in_newer_opset(typed)
    inputs = real_inputs(typed)
    del typed.graph.input[:]
    typed.graph.input.extend(inputs)  # files before IR 4 list weights as inputs
    least = onnx.helper.find_min_ir_version_for(typed.opset_import, ignore_unknown=True)
    typed.ir_version = max(typed.ir_version, least, 4)
    _store_constants(typed.graph)
    values = [value for value in typed.graph.value_info if value.name in described]
    del typed.graph.value_info[:]
    typed.graph.value_info.extend(values)
    return typed


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
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
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
        if holds_learnt(node) and not any(is_named(node, pattern) for pattern in keep):
            raise UserError(
                f"node '{label_of(node)}' ({node.op_type}) holds weighted operators in its body, "
                f"which can't be converted to {precision}: name it with --keep to leave it in "
                "float32, or export the network without it"
            )
