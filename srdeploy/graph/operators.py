"""ONNX operators by what they do: the one table for whoever converts, runs or measures a graph.

Some sets overlap without being equal, on purpose; each says what it is for. The two identity
oracles judge what converters make, so they keep tables of their own.
"""

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Convolutions and matrix products. Their second operand can be a stored kernel or matrix, which
int8 quantises; a runtime must place them on the device that was asked for."""

MODULE_LAYERS = ("Conv", "ConvTranspose", "Gemm")
"""Layers that torch exports one to one: the module that owns the weight gives the node its name.
The weight of a MatMul may be transposed or shared on the way."""

MULTIPLYING = ("Conv", "MatMul", "Gemm", "Einsum", "Attention", "LSTM", "GRU", "RNN")
"""Parts of the names of everything that multiplies matrices, also where a tool has fused it
(FusedConv, QLinearConv)."""

WEIGHTED = frozenset(
    ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv")
    + ("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul", "PRelu", "GRU", "LSTM", "RNN")
    + ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization")
    + ("QuantizeLinear", "DequantizeLinear")
)
"""Operators whose operands after the first are learnt or calibrated."""

NETWORK = WEIGHTED | {"Attention", "Einsum"}
"""Operators that the network consists of: what comes before the first and after the last of them
is pre- and post-processing."""

MEASURING = ("Shape", "Size")
"""Operators that only read a value's shape."""

RESIZING = ("Resize", "Upsample")
"""Operators whose operands after the first say where they sample, in floats."""

COMPARING = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "TopK")
"""Operators whose result hangs on which value is the larger."""

QUANTISING = ("QuantizeLinear", "DequantizeLinear")

MOVING = ("MaxPool", "Resize", "Slice", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
"""Operators whose results hold values of their first operand, or lie between them."""

PASSING = (*MOVING, "Pad", "Expand", "Where", "DepthToSpace", "SpaceToDepth")
"""Operators through which a value arrives unchanged."""

SELECTING = frozenset(
    ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Concat", "Split")
    + ("Slice", "Gather", "GatherElements", "GatherND", "Expand", "Tile", "Pad", "Where")
    + ("Relu", "Clip", "Min", "Max", "MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin")
    + ("DepthToSpace", "SpaceToDepth", "TopK", "Dropout", "Neg", "Abs")
)
"""Operators whose results are among their operands' values, but for the sign, so that results of
rounded operands are rounded already."""


def is_constant(op_type: str, domain: str) -> bool:
    """Whether a node is ONNX's own Constant, which stands for an initialiser."""
    return op_type == "Constant" and domain in ("", "ai.onnx")
