"""16-bit graphs computed in float32 with every 16-bit tensor rounded."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from srdeploy.errors import UserError
from srdeploy.export.precision.half import emulate, to_half
from srdeploy.export.precision.tensor_types import element_types
from srdeploy.precision import HalfPrecision
from tests.export.precision.written_graphs import built, run

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BOTH = pytest.mark.parametrize("precision", ["fp16", "bf16"])
HALVES = {TensorProto.FLOAT16, TensorProto.BFLOAT16}

STEPS = """
<ir_version: 10, opset_import: ["" : 22]>
steps (float[1, 1, 40, 50] image) => (float[1, 1, 40, 50] result)
<float[1, 1, 1, 1] one, float[1, 50] factor, float[1, 50] shift>
{
    [first] a = Conv (image, one)
    [scale] b = Mul (a, factor)
    [shift] c = Add (b, shift)
    [turn] d = Transpose <perm: ints = [0, 1, 3, 2]> (c)
    [square] e = Mul (d, d)
    [back] f = Transpose <perm: ints = [0, 1, 3, 2]> (e)
    [join] g = Add (f, a)
    [last] h = Conv (g, one)
    [end] result = Mul (h, factor)
}
"""
"""No step sums more than two values: any order of adding gives the same bits."""


def drawn(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@BOTH
@pytest.mark.parametrize("optimised", [True, False])
def test_each_16_bit_tensor_is_rounded_as_torch_rounds_it(
    precision: HalfPrecision, optimised: bool
) -> None:
    factor, shift = drawn(1, 50, seed=1), drawn(1, 50, seed=2)
    model = built(STEPS, one=[[[[1]]]], factor=factor, shift=shift)
    image = drawn(1, 1, 40, 50)
    (found,) = run(emulate(to_half(model, precision)), image, optimised=optimised)
    (unrounded,) = run(model, image)

    def rounded(x: Tensor) -> Tensor:
        return x.to(DTYPES[precision]).to(torch.float32)

    scale = rounded(torch.from_numpy(factor))
    a = rounded(torch.from_numpy(image))
    c = rounded(rounded(a * scale) + rounded(torch.from_numpy(shift)))
    expected = rounded(rounded(c * c) + a) * torch.from_numpy(factor)  # the end is float32
    np.testing.assert_array_equal(found, expected.numpy())
    assert (found != unrounded).mean() > 0.9


@BOTH
def test_convolutions_sum_in_float32_and_round_once_as_torch_does(
    precision: HalfPrecision,
) -> None:
    model = built(
        """
        <ir_version: 10, opset_import: ["" : 22]>
        net (float[1, 16, 20, 20] image) => (float[1, 8, 20, 20] result)
        <float[24, 16, 3, 3] first, float[8, 24, 1, 1] second>
        {
            a = Conv <pads: ints = [1, 1, 1, 1]> (image, first)
            b = Relu (a)
            c = Conv (b, second)
            result = Abs (c)
        }
        """,
        first=drawn(24, 16, 3, 3, seed=1),
        second=drawn(8, 24, 1, 1, seed=2),
    )
    image = drawn(1, 16, 20, 20)
    (found,) = run(emulate(to_half(model, precision)), image)
    dtype = DTYPES[precision]
    first, second = (
        torch.from_numpy(drawn(*shape, seed=seed)).to(dtype)
        for shape, seed in (((24, 16, 3, 3), 1), ((8, 24, 1, 1), 2))
    )
    hidden = functional.conv2d(torch.from_numpy(image).to(dtype), first, padding=1).relu()
    expected = functional.conv2d(hidden, second).abs().to(torch.float32).numpy()
    # Another order of adding moves a sum across a rounding boundary now and then.
    assert (found == expected).mean() > 0.9
    step = 2.0 ** (-9 if precision == "fp16" else -6)
    np.testing.assert_allclose(found, expected, rtol=step, atol=step * expected.max())


@BOTH
def test_names_interface_and_metadata_stay_and_nothing_else_is_in_16_bits(
    precision: HalfPrecision,
) -> None:
    typed = to_half(built(STEPS, one=[[[[1]]]], factor=drawn(1, 50), shift=drawn(1, 50)), precision)
    before = typed.SerializeToString()
    model = emulate(typed)
    assert typed.SerializeToString() == before
    assert (model.graph.input, model.graph.output) == (typed.graph.input, typed.graph.output)
    assert model.metadata_props == typed.metadata_props
    names = {node.name for node in typed.graph.node}
    assert names < {node.name for node in model.graph.node}
    made = {name for node in typed.graph.node for name in node.output}
    types = element_types(model)
    assert {types[name] for name in made} == {TensorProto.FLOAT}
    for node in model.graph.node:
        if types[node.output[0]] in HALVES:  # stands between the two casts of a pair
            (reader,) = [n for n in model.graph.node if node.output[0] in n.input]
            assert (node.op_type, reader.op_type) == ("Cast", "Cast")


def test_float32_tensors_of_a_mixed_graph_are_not_rounded() -> None:
    model = built(STEPS, one=[[[[1]]]], factor=np.ones((1, 50)), shift=np.zeros((1, 50)))
    typed = to_half(model, "bf16", keep=["first", "scale", "shift", "turn", "square", "back"])
    image = drawn(1, 1, 40, 50)
    (found,) = run(emulate(typed), image)
    bfloat = torch.bfloat16
    squares = torch.from_numpy(image * image).to(bfloat).to(torch.float32)
    plain = torch.from_numpy(image).to(bfloat).to(torch.float32)
    np.testing.assert_array_equal(found, (squares + plain).to(bfloat).to(torch.float32).numpy())


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_inputs_and_outputs_in_16_bits_keep_their_type(kind: str) -> None:
    model = built(
        f"""
        <ir_version: 10, opset_import: ["" : 22]>
        net ({kind}[2, 3] x) => ({kind}[2, 3] y, {kind}[2, 3] z)
        {{ y = Add (x, x) z = Mul (y, x) }}
        """
    )
    emulated = emulate(model)
    assert (emulated.graph.input, emulated.graph.output) == (model.graph.input, model.graph.output)
    nodes = [node for node in emulated.graph.node if node.op_type != "Cast"]
    types = element_types(emulated)
    assert {types[name] for node in nodes for name in (*node.input, *node.output)} == {
        TensorProto.FLOAT
    }
    if kind == "float16":
        x = drawn(2, 3).astype(np.float16)
        y, z = run(emulated, x)
        np.testing.assert_array_equal(y, x + x)
        np.testing.assert_array_equal(z, (x + x) * x)


def test_a_body_that_computes_in_16_bits_is_refused() -> None:
    model = built(
        """
        <ir_version: 10, opset_import: ["" : 22]>
        net (bool flag, float16[2] x) => (float16[2] y)
        {
            [branch] y = If (flag) <
                then_branch = one () => (float16[2] a) { a = Relu (x) },
                else_branch = two () => (float16[2] b) { b = Abs (x) }
            >
        }
        """
    )
    with pytest.raises(UserError, match=r"node 'branch' \(If\) computes in 16 bits in its body"):
        emulate(model)
