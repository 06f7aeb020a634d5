"""Which operators compute in 16 bits."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from onnx.numpy_helper import to_array

from srdeploy.export.precision.half import to_half
from srdeploy.export.precision.tensor_types import element_types
from srdeploy.precision import HalfPrecision
from tests.export.precision.written_graphs import (
    TYPES,
    built,
    run,
    stored_types,
    surrounded,
    types_of_results,
)

BOTH = pytest.mark.parametrize("precision", ["fp16", "bf16"])

LEARNT = {
    "Conv": ("y = Conv (x, w)", ", float[4, 4, 1, 1] w"),
    "ConvTranspose": ("y = ConvTranspose (x, w)", ", float[4, 4, 1, 1] w"),
    "MatMul": ("y = MatMul (x, w)", ", float[8, 8] w"),
    "Einsum": ('y = Einsum <equation: string = "nchw,wv->nchv"> (x, w)', ", float[8, 8] w"),
}
OTHERS = {
    "Add": ("y = Add (x, w)", ", float[8] w"),
    "BatchNormalization": ("y = BatchNormalization (x, w, w, w, v)", ", float[4] w, float[4] v"),
    "Erf": ("y = Erf (x)", ""),
    "Gelu": ("y = Gelu (x)", ""),
    "HardSwish": ("y = HardSwish (x)", ""),
    "LayerNormalization": ("y = LayerNormalization (x, w)", ", float[8] w"),
    "MaxPool": ("y = MaxPool <kernel_shape: ints = [2, 2]> (x)", ""),
    "PRelu": ("y = PRelu (x, w)", ", float[4, 1, 1] w"),
    "Resize": ('y = Resize <mode: string = "linear"> (x, , w)', ", float[4] w"),
    "Softmax": ("y = Softmax (x)", ""),
    "GlobalAveragePool": ("y = GlobalAveragePool (x)", ""),
    "ReduceMean": ("y = ReduceMean (x)", ""),
    "InstanceNormalization": ("y = InstanceNormalization (x, w, w)", ", float[4] w"),
    "Pow": ("y = Pow (x, w)", ", float w"),
    "Exp": ("y = Exp (x)", ""),
    "a square": ("y = Mul (x, x)", ""),
    "Div by data": ("a = Abs (x) y = Div (x, a)", ""),
    "Div by a number": ("y = Div (x, w)", ", float w"),
    "GridSample": ("y = GridSample (x, w)", ", float[1, 8, 8, 2] w"),
    "Celu": ("y = Celu (x)", ""),
}
IN_FLOAT32 = {
    "fp16": {"GlobalAveragePool", "ReduceMean", "InstanceNormalization", "Pow", "Exp", "a square"}
    | {"Div by data", "GridSample", "Celu"},
}
IN_FLOAT32["bf16"] = IN_FLOAT32["fp16"] | {"ConvTranspose", "Einsum", "HardSwish"}


@BOTH
@pytest.mark.parametrize("operator", [*LEARNT, *OTHERS])
def test_what_loses_too_much_or_is_not_defined_in_16_bits_stays_in_float32(
    operator: str, precision: HalfPrecision
) -> None:
    nodes, tensors = (LEARNT | OTHERS)[operator]
    ones: dict[str, Any] = {name: [1, 1, 1, 1] for name in "wv" if f"float[4] {name}" in tensors}
    model = built(surrounded(nodes, tensors), **ones)
    typed = to_half(model, precision)
    expected = TensorProto.FLOAT if operator in IN_FLOAT32[precision] else TYPES[precision]
    made_in = element_types(typed)["y"]
    assert TensorProto.DataType.Name(made_in) == TensorProto.DataType.Name(expected)
    if operator == "Resize":
        assert stored_types(typed)["w"] == "FLOAT"


@BOTH
def test_size_arithmetic_in_floats_is_untouched(precision: HalfPrecision) -> None:
    model = built(
        surrounded(
            """
        [shape] s = Shape (x)
        [float] f = Cast <to: int = 1> (s)
        [half] h = Mul (f, by)
        [ratio] r = Div (h, f)
        [resize] y = Resize (x, , r)
        """,
            ", float[4] by",
        ),
        by=[1, 1, 2, 2],
    )
    typed = {node.name: node for node in to_half(model, precision).graph.node}
    for node in model.graph.node:
        if node.name in ("shape", "float", "half", "ratio", "resize"):
            assert typed[node.name] == node
    assert stored_types(to_half(model, precision))["by"] == "FLOAT"


def test_a_decomposed_layer_norm_does_not_overflow_in_fp16() -> None:
    model = built(
        surrounded(
            """
        [mean] m = ReduceMean <keepdims: int = 1> (x, axes)
        [centre] d = Sub (x, m)
        [square] q = Pow (d, two)
        [variance] v = ReduceMean <keepdims: int = 1> (q, axes)
        [small] e = Add (v, epsilon)
        [root] s = Sqrt (e)
        [scale] y = Div (d, s)
        """,
            ", int64[1] axes, float two, float epsilon",
        ),
        axes=[1],
        two=2,
        epsilon=1e-12,
        before=np.full((4, 3, 1, 1), [[[[1]]], [[[2]]], [[[3]]], [[[-3]]]]),
    )
    image = np.full((1, 3, 8, 8), 300, np.float32)
    (expected,), (found,) = run(model, image), run(to_half(model, "fp16"), image)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    typed = to_half(model, "fp16")
    assert types_of_results(typed)["small"] == "FLOAT"
    assert to_array(typed.graph.initializer[-1]).dtype == np.float32
