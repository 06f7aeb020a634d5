"""Element types of a graph's tensors, which of them ONNX allows where, and 16-bit weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto
from onnx.defs import OpSchema
from onnx.numpy_helper import to_array

from srdeploy.errors import UserError
from srdeploy.graph.index import label_of
from srdeploy.graph.signature import opset_of
from srdeploy.precision import HalfPrecision

FLOAT = int(TensorProto.FLOAT)
HALF_TYPES: dict[HalfPrecision, int] = {
    "fp16": int(TensorProto.FLOAT16),
    "bf16": int(TensorProto.BFLOAT16),
}
LARGEST: dict[HalfPrecision, float] = {"fp16": 65504.0, "bf16": (2 - 2**-7) * 2.0**127}
"""The largest finite value of each type."""

_TYPE_TEXT = {
    FLOAT: "tensor(float)",
    int(TensorProto.FLOAT16): "tensor(float16)",
    int(TensorProto.BFLOAT16): "tensor(bfloat16)",
}
_NO_TENSOR = int(TensorProto.UNDEFINED)


def element_types(model: ModelProto) -> dict[str, int]:
    """The element type of every value of the main graph, by name; UNDEFINED for what is no tensor.

    Raises UserError where a node's result has a type that can't be told.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {tensor.name: int(tensor.data_type) for tensor in inferred.initializer}
    for sparse in inferred.sparse_initializer:
        types[sparse.values.name] = int(sparse.values.data_type)
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        if value.type.HasField("tensor_type"):
            types.setdefault(value.name, int(value.type.tensor_type.elem_type))
        elif value.type.WhichOneof("value"):
            types.setdefault(value.name, _NO_TENSOR)
    opset = opset_of(model)
    for node in model.graph.node:
        formals = formals_of(node, opset)
        for position, name in enumerate(node.output):
            if not name or name in types:
                continue
            same = [
                types[read]
                for read, formal in zip(node.input, formals[0] if formals else [], strict=False)
                if read and formals and formal.text == formals[1][position].text
            ]
            if same:  # inference knows no shape for it, but its definition says the type
                types[name] = same[0]
            else:
                raise UserError(
                    f"node '{label_of(node)}' ({node.domain}.{node.op_type}): the type of its "
                    f"result '{name}' is unknown, so no precision can be chosen after it: state it "
                    "in the graph's value_info, or deploy the graph in fp32"
                )
    return types


@dataclass(frozen=True)
class Formal:
    """What an operator's definition says about one operand or result."""

    text: str
    """The type as the definition writes it: T, T1, tensor(float)."""
    variable: bool
    """Whether the type may vary (T) or is fixed, such as the scales of a Resize."""
    allowed: frozenset[str]

    def allows(self, element_type: int) -> bool:
        return _TYPE_TEXT[element_type] in self.allowed


def formals_of(node: NodeProto, opset: int) -> tuple[list[Formal], list[Formal]] | None:
    """For each operand and each result of the node, in order; None for operators that ONNX itself
    does not define."""
    if node.domain not in ("", "ai.onnx"):
        return None
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}
    sides = ((schema.inputs, len(node.input)), (schema.outputs, len(node.output)))
    inputs, outputs = ([_formal(formals, i, allowed) for i in range(n)] for formals, n in sides)
    return inputs, outputs


def _formal(
    formals: "Sequence[OpSchema.FormalParameter]",
    index: int,
    allowed: dict[str, frozenset[str]],
) -> Formal:
    text = formals[min(index, len(formals) - 1)].type_str  # the last one may be variadic
    return Formal(text, text in allowed, allowed.get(text, frozenset((text,))))


def in_16_bits(tensor: TensorProto, precision: HalfPrecision) -> TensorProto:
    """The float32 tensor rounded to nearest, ties to even; same name and dims.

    The extremes of float32 are how code writes 'without bound': they become the type's own
    extremes. Raises ValueError with the value where another finite one is out of range.
    """
    values = to_array(tensor).astype(np.float32)
    largest, bound = np.float32(LARGEST[precision]), np.finfo(np.float32).max
    values = np.where(np.abs(values) == bound, np.copysign(largest, values), values)
    finite = np.isfinite(values)
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    bits = half.view("<u2") if precision == "fp16" else _bfloat16_bits(values)
    rounded = half.astype(np.float32) if precision == "fp16" else _from_bfloat16_bits(bits)
    lost = finite & ~np.isfinite(rounded)
    if lost.any():
        raise ValueError(f"{float(values[lost].flat[0]):.6g}")
    result = TensorProto(name=tensor.name, dims=tensor.dims, data_type=HALF_TYPES[precision])
    result.raw_data = bits.tobytes()
    return result


def in_32_bits(tensor: TensorProto) -> TensorProto:
    """A 16-bit tensor as float32, value for value; same name and dims."""
    result = TensorProto(name=tensor.name, dims=tensor.dims, data_type=FLOAT)
    result.raw_data = to_array(tensor).astype("<f4").tobytes()
    return result


def _bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper half of the bits, after adding what rounds them to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4").reshape(values.shape)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)  # adding could carry a NaN into another value
    return np.where(np.isnan(values), quiet, rounded).astype("<u2")


def _from_bfloat16_bits(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype("<u4") << np.uint32(16)).view("<f4")
