"""float32 graphs typed as fp16 and bf16."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto
from onnx.numpy_helper import from_array, to_array

from srdeploy.errors import UserError
from srdeploy.export.certificate import identity_lines
from srdeploy.export.precision.half import emulate, to_half
from srdeploy.export.precision.tensor_types import in_16_bits, in_32_bits
from srdeploy.precision import PRECISION_KEY, HalfPrecision
from tests.export.precision.written_graphs import (
    SEGMENTER,
    TYPES,
    built,
    run,
    stored_types,
    surrounded,
    types_of_results,
)

BOTH = pytest.mark.parametrize("precision", ["fp16", "bf16"])


@BOTH
def test_the_network_computes_in_16_bits_and_what_is_around_it_in_float32(
    precision: HalfPrecision,
) -> None:
    model = built(SEGMENTER)
    typed = to_half(model, precision)
    half = TensorProto.DataType.Name(TYPES[precision])
    results = types_of_results(typed)
    assert {name for name, kind in results.items() if kind == half} == {
        "turn/Cast",
        "stem",
        "relu",
        "head",
    }
    assert results["turn"] == results["head/Cast"] == results["resize"] == "FLOAT"
    assert stored_types(typed) == {
        **dict.fromkeys(("stem", "bias", "head"), half),
        **dict.fromkeys(("scale", "offset"), "FLOAT"),
    }


@BOTH
def test_interface_names_and_metadata_stay_and_the_precision_is_noted(
    precision: HalfPrecision,
) -> None:
    model = built(SEGMENTER)
    before = model.SerializeToString()
    typed = to_half(model, precision)
    assert model.SerializeToString() == before
    assert (typed.graph.input, typed.graph.output) == (model.graph.input, model.graph.output)
    metadata = {entry.key: entry.value for entry in typed.metadata_props}
    assert metadata == {"about": "a test", PRECISION_KEY: precision}
    names = [node.name for node in typed.graph.node]
    assert [name for name in names if "/Cast" not in name] == [n.name for n in model.graph.node]
    made = {name for node in typed.graph.node for name in node.output}
    assert made >= {name for node in model.graph.node for name in node.output}


def test_bfloat16_needs_operator_set_22_and_fp16_leaves_it() -> None:
    model = built(SEGMENTER)
    assert to_half(model, "fp16").opset_import[0].version == 20
    assert to_half(model, "bf16").opset_import[0].version == 22


@BOTH
def test_labels_agree_with_float32(precision: HalfPrecision) -> None:
    model = built(SEGMENTER, scale=[0.01] * 3, offset=[-1.0] * 3)
    images = np.random.default_rng(1).integers(0, 256, (2, 24, 36, 3), dtype=np.uint8)
    (expected,) = run(model, images)
    typed = to_half(model, precision)
    (found,) = run(typed if precision == "fp16" else emulate(typed), images)
    assert found.dtype == np.uint8
    assert (found == expected).mean() > 0.98


@BOTH
def test_every_value_is_cast_at_most_once_and_no_cast_is_cast_again(
    precision: HalfPrecision,
) -> None:
    model = built(
        surrounded(
            """
        [norm] n = InstanceNormalization (x, one, one)
        [pool] p = GlobalAveragePool (x)
        [gate] g = Sigmoid (p)
        [mix] m = Mul (n, g)
        [more] y = Add (m, x)
        """,
            ", float[4] one",
        )
    )
    nodes = to_half(model, precision).graph.node
    casts = [node for node in nodes if node.op_type == "Cast"]
    results = {node.output[0] for node in casts}
    assert all(node.input[0] not in results for node in casts)
    assert max(Counter(node.input[0] for node in casts).values()) == 1
    assert {node.name: node.input[0] for node in casts} == {
        "before/Cast": "image",
        "before/Cast_1": "x",
        "norm/Cast": "n",
        "pool/Cast": "p",
        "after/Cast": "z",
    }


def test_an_output_that_a_convolution_makes_keeps_its_type_and_name() -> None:
    model = built(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[1, 3, 8, 8] image) => (float[1, 2, 8, 8] logits, float[1, 2, 8, 8] active)
        <float[2, 3, 1, 1] w>
        {
            [conv] logits = Conv (image, w)
            [relu] active = Relu (logits)
        }
        """
    )
    typed = to_half(model, "fp16")
    assert {n.name: (list(n.input), list(n.output)) for n in typed.graph.node} == {
        "conv/Cast": (["image"], ["image/fp16"]),
        "conv": (["image/fp16", "w"], ["logits/fp16"]),
        "conv/Cast_1": (["logits/fp16"], ["logits"]),
        "relu": (["logits"], ["active"]),
    }


def test_a_weight_that_is_read_in_both_types_is_stored_in_both() -> None:
    model = built(
        surrounded("[p] p = Pow (x, w) [y] y = Add (p, w)", ", float[4, 1, 1] w"),
        w=[[[1]], [[2]], [[1]], [[2]]],
    )
    typed = to_half(model, "fp16")
    assert stored_types(typed) == {
        "before": "FLOAT16",
        "after": "FLOAT16",
        "w": "FLOAT",
        "w/fp16": "FLOAT16",
    }


def test_weights_computed_from_weights_go_with_their_reader() -> None:
    model = built(
        surrounded("t = Transpose <perm: ints = [1, 0]> (w) y = MatMul (x, t)", ", float[8, 8] w")
    )
    typed = to_half(model, "fp16")
    assert stored_types(typed)["w"] == "FLOAT16"
    assert [node.op_type for node in typed.graph.node].count("Cast") == 2


def test_nodes_are_kept_in_float32_by_name_and_by_pattern() -> None:
    model = built(SEGMENTER)
    for keep in (["head"], ["he*"], ["hea?", "argmax"]):
        typed = to_half(model, "fp16", keep)
        assert stored_types(typed)["head"] == "FLOAT"
        assert stored_types(typed)["stem"] == "FLOAT16"
        assert types_of_results(typed)["head"] == "FLOAT"


def test_a_pattern_that_names_no_node_is_refused_with_the_closest() -> None:
    with pytest.raises(
        UserError, match=r"--keep haed: no node has this name; the closest is 'head'"
    ):
        to_half(built(SEGMENTER), "fp16", ["haed"])


@pytest.mark.parametrize("keep", [["*"], ["stem", "head"]])
def test_a_graph_of_which_nothing_can_be_converted_is_refused(keep: list[str]) -> None:
    with pytest.raises(
        UserError, match="no weighted operator of the graph can be converted to fp16"
    ):
        to_half(built(SEGMENTER), "fp16", keep)


def test_a_graph_that_is_typed_already_is_refused() -> None:
    with pytest.raises(UserError, match="it holds none in float32"):
        to_half(to_half(built(SEGMENTER), "fp16"), "fp16")


def test_a_weight_beyond_fp16_is_refused_with_the_nodes_that_would_keep_it() -> None:
    model = built(SEGMENTER, head=np.full((5, 4, 1, 1), -70000.0))
    with pytest.raises(
        UserError,
        match="initialiser 'head' of node 'head' holds -70000, beyond fp16's largest value 65504: "
        "keep the node in float32 with --keep 'head', or use --precision bf16",
    ):
        to_half(model, "fp16")
    assert stored_types(to_half(model, "fp16", ["head"]))["head"] == "FLOAT"
    assert stored_types(to_half(model, "bf16"))["head"] == "BFLOAT16"


@BOTH
def test_values_are_rounded_to_nearest_as_torch_does(precision: HalfPrecision) -> None:
    generator = np.random.default_rng(0)
    exponents = generator.uniform(-50, 15.9, 20000)
    values = (generator.choice([-1, 1], 20000) * 2.0**exponents).astype(np.float32)
    ties = np.array([1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-11, 1 + 3 * 2**-11, 0, -0.0], np.float32)
    special = np.array([np.inf, -np.inf, np.nan], np.float32)
    values = np.concatenate([values, ties, special])
    rounded = in_16_bits(from_array(values, "w"), precision)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    expected = torch.from_numpy(values).to(dtype).to(torch.float32).numpy()
    np.testing.assert_array_equal(to_array(in_32_bits(rounded)), expected)
    assert rounded.data_type == TYPES[precision]


@BOTH
def test_without_bound_in_float32_stays_finite_in_16_bits(precision: HalfPrecision) -> None:
    extremes = np.array([np.finfo(np.float32).max, np.finfo(np.float32).min], np.float32)
    rounded = to_array(in_32_bits(in_16_bits(from_array(extremes, "w"), precision)))
    assert np.isfinite(rounded).all()
    assert rounded[0] == -rounded[1] > 65000


CONDITIONAL = """
    [yes] b = Cast <to: int = 9> (flag)
    [if] y = If (b) <
        then_branch = kept () => (float[1, 4, 8, 8] same) { [inside] same = THEN },
        else_branch = doubled () => (float[1, 4, 8, 8] twice) { [add] twice = Add (x, x) }
    >
"""


def conditional(then: str) -> ModelProto:
    nodes = CONDITIONAL.replace("THEN", then)
    return built(surrounded(nodes, ", int64 flag, float[4, 4, 1, 1] w"), flag=0)


@BOTH
def test_bodies_stay_in_float32_and_read_what_is_around_them_so(precision: HalfPrecision) -> None:
    typed = to_half(conditional("Relu (x)"), precision)
    (node,) = [node for node in typed.graph.node if node.name == "if"]
    assert [list(a.g.node[0].input) for a in node.attribute] in (
        [["x/fp32"], ["x/fp32", "x/fp32"]],
        [["x/fp32", "x/fp32"], ["x/fp32"]],
    )
    if precision == "fp16":
        image = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
        (expected,), (found,) = run(conditional("Relu (x)"), image), run(typed, image)
        np.testing.assert_allclose(found, expected, atol=0.02)


def test_weighted_operators_in_a_body_are_refused_unless_kept() -> None:
    model = conditional("Conv (x, w)")
    with pytest.raises(UserError, match=r"node 'if' \(If\) holds weighted operators in its body"):
        to_half(model, "fp16")
    typed = to_half(model, "fp16", ["if"])
    assert stored_types(typed) == {
        "before": "FLOAT16",
        "after": "FLOAT16",
        "w": "FLOAT",
        "flag": "INT64",
    }


def test_constant_nodes_and_functions_of_the_model_are_weights_and_nodes_like_others() -> None:
    model = built(surrounded("[three] t = Constant <value_float: float = 3.0> () y = Mul (x, t)"))
    typed = to_half(model, "fp16")
    assert stored_types(typed)["t"] == "FLOAT16"
    called = built(
        """
        <ir_version: 10, opset_import: ["" : 20, "own" : 1]>
        net (float[1, 3, 8, 8] image) => (float[1, 4, 8, 8] result)
        <float[4, 3, 1, 1] w>
        { result = own.block (image, w) }
        <domain: "own", opset_import: ["" : 20]>
        block (a, b) => (c) { [conv] d = Conv (a, b) c = Relu (d) }
        """
    )
    assert stored_types(to_half(called, "fp16"))["w"] == "FLOAT16"


def test_a_result_of_unknown_type_is_refused() -> None:
    model = built(surrounded("[custom] y = Relu (x)"))
    model.graph.node[1].domain = "com.other"
    model.opset_import.append(onnx.helper.make_opsetid("com.other", 1))
    with pytest.raises(
        UserError, match=r"node 'custom' \(com.other.Relu\): the type of its result"
    ):
        to_half(model, "fp16")


@BOTH
def test_recorded_types_of_values_and_weights_follow(precision: HalfPrecision) -> None:
    model = built(SEGMENTER)
    stated = onnx.shape_inference.infer_shapes(model).graph.value_info
    model.graph.value_info.extend(stated)
    for tensor in model.graph.initializer:
        model.graph.value_info.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    typed = to_half(model, precision)
    recorded = {v.name: v.type.tensor_type.elem_type for v in typed.graph.value_info}
    values, weights = {"features", "active", "low"}, {"stem", "bias", "head"}
    in_half = {name for name, kind in recorded.items() if kind == TYPES[precision]}
    assert in_half == values | (weights & recorded.keys())
    assert precision == "bf16" or weights <= recorded.keys()


def test_a_graph_that_no_newer_operator_set_can_say_is_refused_for_bf16() -> None:
    text = surrounded(
        "y = BatchNormalization <spatial: int = 0> (x, w, w, w, w)", ", float[4] w", 7
    )
    model = built(text)
    assert stored_types(to_half(model, "fp16"))["w"] == "FLOAT16"
    with pytest.raises(
        UserError,
        match=r"the graph's 7 can't be converted to it \(Attribute spatial must have value 1\): "
        "use --precision fp16, or export with a newer operator set",
    ):
        to_half(model, "bf16")


@BOTH
def test_a_graph_that_contradicts_itself_is_refused(precision: HalfPrecision) -> None:
    model = built(SEGMENTER)
    model.graph.output[0].type.tensor_type.shape.dim.add()
    with pytest.raises(UserError, match="the graph contradicts itself"):
        to_half(model, precision)


@BOTH
def test_two_trainings_give_one_graph_and_each_precision_another(precision: HalfPrecision) -> None:
    normalisation = {"scale": [0.1, 0.2, 0.3], "offset": [1, 2, 3]}
    first, second = (built(SEGMENTER, seed, **normalisation) for seed in (0, 1))
    other: HalfPrecision = "bf16" if precision == "fp16" else "fp16"
    typed = to_half(first, precision)
    assert typed.graph.initializer != to_half(second, precision).graph.initializer
    for left, right, same in (
        (typed, to_half(second, precision), True),
        (typed, first, False),
        (typed, to_half(first, other), False),
        (typed, to_half(first, precision, ["head"]), False),
    ):
        identity, oracles, _ = identity_lines(left, right)
        assert (identity.passed, oracles.passed) == (same, True)


@BOTH
def test_the_type_of_a_weight_alone_tells_two_graphs_apart(precision: HalfPrecision) -> None:
    typed = to_half(built(surrounded("y = Relu (x)", opset=22)), precision)
    rounded = ModelProto()
    rounded.CopyFrom(typed)
    rounded.graph.initializer[0].CopyFrom(in_32_bits(typed.graph.initializer[0]))
    identity, oracles, _ = identity_lines(typed, rounded)
    assert (identity.passed, oracles.passed) == (False, True)
    assert "initialiser 'before'" in identity.detail
