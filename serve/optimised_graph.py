"""Which types onnxruntime's own version of a graph computes in."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_NAMES = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "DOUBLE": "float64"}
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BY_INTEGERS = ("QLinear", "ConvInteger", "MatMulInteger", "DynamicQuantize", "QGemm")


def layer_types(path: Path) -> set[str]:
    """Types that the convolutions and matrix products of an optimised graph compute in.

    path: what onnxruntime wrote as optimized_model_filepath. Its fused layers keep the name of what
    they were made of (FusedConv, NhwcConv, QLinearConv).
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
    found = set()
    for node in graph.node:  # topologically sorted
        types |= dict.fromkeys(node.output, _type_of_output(node, types))
        if node.op_type.startswith(_BY_INTEGERS):
            # QLinearAdd and the like are no layers with weights.
            if any(kind in node.op_type for kind in _WEIGHTED):
                found.add("int8")
        elif node.op_type.endswith(_WEIGHTED):
            found.add(_NAMES[onnx.TensorProto.DataType.Name(types[node.input[1]])])
    return found


def _type_of_output(node: "onnx.NodeProto", types: dict[str, int]) -> int:
    """onnxruntime writes no types of inner tensors. Right for whatever can lead to the second
    operand of a matrix product; other tensors do not matter."""
    if node.op_type == "Cast":
        return int(next(attribute.i for attribute in node.attribute if attribute.name == "to"))
    if node.op_type in ("DequantizeLinear", "Where"):
        return types[node.input[1]]  # the scale's; the chosen values'
    return types.get(node.input[0], 0) if node.input else 0
