"""Graphs rounded to int8: what is rounded, what stays, and that they still compute the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto
from onnx.numpy_helper import from_array, to_array

from srdeploy.errors import UserError
from srdeploy.export.precision import int8
from srdeploy.export.precision.int8 import range_without_outliers, sampled, to_int8
from srdeploy.export.precision.qdq import quantise_kernel
from srdeploy.export.precision.stage import types_line
from srdeploy.graph.signature import signature_of
from srdeploy.imaging import Pixels
from srdeploy.precision import PRECISION_KEY, TARGET_KEY, Target
from srdeploy.spec import ONNX_KEY, Spec
from tests.export.precision.residual_graph import maker_of, node_of, residual, tensors

TARGETS: tuple[Target, ...] = ("tensorrt", "cpu")
QUANTISED = ("block/conv1", "block/conv2", "down", "wide/one", "wide/two")
"""Weighted nodes of `residual` that are neither first nor last."""


@pytest.fixture(scope="session")
def network(spec: Spec) -> ModelProto:
    return residual(spec)


@pytest.fixture(scope="session")
def pictures(photos: list[Pixels]) -> list[Pixels]:
    return [*photos, *(np.ascontiguousarray(photo[::-1, :, ::-1]) for photo in photos)]


@pytest.fixture(scope="session")
def typed(network: ModelProto, pictures: list[Pixels]) -> dict[str, ModelProto]:
    return {target: to_int8(network, pictures, target) for target in TARGETS}


def run(model: ModelProto, picture: Pixels, *names: str) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    found: list[Any] = session.run(list(names), {"images": picture[None]})
    return found


def weighted_in_int8(model: ModelProto) -> set[str]:
    kernels = {node.name: node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    return {name for name, read in kernels.items() if maker_of(model, read) == "DequantizeLinear"}


@pytest.mark.parametrize("target", TARGETS)
def test_nodes_values_ends_and_metadata_keep_their_names_and_the_argument_is_left_alone(
    spec: Spec, network: ModelProto, pictures: list[Pixels], target: Target
) -> None:
    before = network.SerializeToString(deterministic=True)
    made = to_int8(network, pictures, target)
    assert network.SerializeToString(deterministic=True) == before
    names = [node.name for node in network.graph.node]
    assert [node.name for node in made.graph.node if node.name in names] == names
    for node in network.graph.node:
        assert node_of(made, node.name).output == node.output
    assert made.graph.input == network.graph.input
    assert made.graph.output == network.graph.output
    metadata = {entry.key: entry.value for entry in made.metadata_props}
    assert metadata == {
        ONNX_KEY: spec.to_json(),
        "note": "mine",
        PRECISION_KEY: "int8",
        TARGET_KEY: target,
    }
    assert made.opset_import == network.opset_import
    assert made.ir_version == network.ir_version


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_pictures_give_the_same_bytes(
    typed: dict[str, ModelProto], network: ModelProto, pictures: list[Pixels], target: Target
) -> None:
    again = to_int8(network, pictures, target).SerializeToString(deterministic=True)
    assert again == typed[target].SerializeToString(deterministic=True)


@pytest.mark.parametrize("target", TARGETS)
def test_logits_stay_close_and_labels_agree(
    typed: dict[str, ModelProto], network: ModelProto, photos: list[Pixels], target: Target
) -> None:
    for photo in photos:
        labels, logits = run(network, photo, "labels", "logits")
        found, values = run(typed[target], photo, "labels", "logits")
        assert found.dtype == np.uint8
        error = np.sqrt(((values - logits) ** 2).mean() / logits.var())
        assert 0 < error < 0.05
        assert (found == labels).mean() > 0.97


@pytest.mark.parametrize("target", TARGETS)
def test_without_its_types_it_is_the_graph_that_was_given(
    typed: dict[str, ModelProto], network: ModelProto, target: Target
) -> None:
    line = types_line(network, typed[target])
    assert line.passed, line.detail


@pytest.mark.parametrize("target", TARGETS)
def test_first_and_last_layers_are_rounded_only_on_request(
    typed: dict[str, ModelProto], network: ModelProto, pictures: list[Pixels], target: Target
) -> None:
    assert weighted_in_int8(typed[target]) == set(QUANTISED)
    with_ends = to_int8(network, pictures, target, ends=True)
    assert weighted_in_int8(with_ends) == {"stem", *QUANTISED, "head"}
    for model in (typed[target], with_ends):
        for name in ("cast", "scaled", "normalised", "turned", "best", "labels"):
            assert "linear" not in maker_of(model, node_of(model, name).input[0]).lower()
        if model is typed[target]:
            assert node_of(model, "logits").input[0] == "head_out"
    assert signature_of(typed[target], Path("graph.onnx")).precision == "float32+int8"
    assert signature_of(with_ends, Path("graph.onnx")).precision == "int8"


@pytest.mark.parametrize("target", TARGETS)
def test_a_rounded_graph_has_as_many_weights_as_before(
    typed: dict[str, ModelProto], network: ModelProto, target: Target
) -> None:
    counts = [signature_of(one, Path("graph.onnx")).weights for one in (network, typed[target])]
    assert counts[0] == counts[1] > 0


def test_for_tensorrt_everything_is_symmetric_int8_and_biases_stay_float(
    typed: dict[str, ModelProto],
) -> None:
    model = typed["tensorrt"]
    stored = tensors(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = stored[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()
    for name in QUANTISED:
        conv = node_of(model, name)
        assert maker_of(model, conv.input[0]) == "DequantizeLinear"
        assert stored[conv.input[2]].dtype == np.float32


def test_for_tensorrt_a_residual_sum_reads_the_skipping_operand_rounded_and_the_other_not(
    typed: dict[str, ModelProto],
) -> None:
    model = typed["tensorrt"]
    conv, skip = node_of(model, "block/sum").input
    assert conv == "block/conv2_out"
    assert skip == node_of(model, "block/conv1").input[0]  # one pair for all who read the value
    assert maker_of(model, skip) == "DequantizeLinear"
    assert maker_of(model, node_of(model, "body").input[0]) == "Conv"  # no weights behind it: raw


def test_tensorrt_for_rtx_reads_int8_where_it_was_written(typed: dict[str, ModelProto]) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, builder.logger)
    parsed = parser.parse(typed["tensorrt"].SerializeToString())
    assert parsed, [str(parser.get_error(index)) for index in range(parser.num_errors)]
    layers = [definition.get_layer(index) for index in range(definition.num_layers)]
    rounding = [layer for layer in layers if layer.type == trt.LayerType.QUANTIZE]
    assert {layer.get_output(0).dtype for layer in rounding} == {trt.DataType.INT8}
    assert len(rounding) == 4  # stem/act, block/act1, pool, six/act


def test_for_cpus_onnxruntime_computes_every_rounded_layer_in_int8(
    typed: dict[str, ModelProto], tmp_path: Path
) -> None:
    stored = tensors(typed["cpu"])
    for name in QUANTISED:
        assert stored[f"{name}/w/int8"].dtype == np.int8
        assert stored[f"{name}/bias/int32"].dtype == np.int32
    assert stored["stem/act/zero_point"].dtype == np.uint8
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(typed["cpu"].SerializeToString(), options)
    nodes = onnx.load(str(tmp_path / "optimised.onnx")).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("QLinearConv") == len(QUANTISED)
    assert kinds.count("QLinearAdd") == 1
    assert kinds.count("QLinearConcat") == 1
    assert "Relu" not in kinds[kinds.index("QuantizeLinear") :]  # absorbed by the rounding
    assert "Clip" not in kinds


def test_for_cpus_openvino_agrees(typed: dict[str, ModelProto], photos: list[Pixels]) -> None:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(typed["cpu"].SerializeToString()), "CPU")
    (expected,) = run(typed["cpu"], photos[0], "labels")
    found = compiled({"images": photos[0][None]})["labels"]
    assert (found == expected).mean() > 0.97


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_have_one_scale_per_output_channel(
    typed: dict[str, ModelProto], network: ModelProto, target: Target
) -> None:
    stored, plain = tensors(typed[target]), tensors(network)
    for name in QUANTISED:
        kernel, scale = plain[f"{name}/w"], stored[f"{name}/w/scale"]
        assert scale.shape == (kernel.shape[0],)
        rounded = stored[f"{name}/w/int8"] * scale[:, None, None, None]
        assert (np.abs(rounded - kernel) <= scale[:, None, None, None] * 0.5001).all()
        assert f"{name}/w" not in stored


@pytest.mark.parametrize("target", TARGETS)
def test_nodes_that_are_named_stay_float(
    network: ModelProto, pictures: list[Pixels], target: Target
) -> None:
    made = to_int8(network, pictures, target, keep=["block/*", "down"])
    assert weighted_in_int8(made) == {"wide/one", "wide/two"}
    with pytest.raises(UserError, match="block/convX: no node has this name.*'block/conv[12]'"):
        to_int8(network, pictures, target, keep=["block/convX"])
    with pytest.raises(UserError, match="would quantise nothing"):
        to_int8(network, pictures, target, keep=["*"])


def test_a_bias_far_larger_than_its_kernel_still_fits_int32(
    spec: Spec, pictures: list[Pixels]
) -> None:
    model = residual(spec)
    for tensor in model.graph.initializer:
        if tensor.name == "block/conv1/w":
            kernel = to_array(tensor).copy()
            kernel[0] = 0
            kernel[1] *= 1e-12
            tensor.CopyFrom(from_array(kernel, tensor.name))
        if tensor.name == "block/conv1/b":
            bias = to_array(tensor).copy()
            bias[:2] = 1.5
            tensor.CopyFrom(from_array(bias, tensor.name))
    made = to_int8(model, pictures, "cpu")
    stored = tensors(made)
    back = stored["block/conv1/bias/int32"] * stored["block/conv1/bias/scale"]
    np.testing.assert_allclose(back, tensors(model)["block/conv1/b"], atol=0.01)


def test_a_kernel_read_twice_is_stored_once(spec: Spec, pictures: list[Pixels]) -> None:
    shared = """
        one_out = Conv (stem/act_out, one/w, one/b)
        one/act_out = Relu (one_out)
        two_out = Conv (one/act_out, one/w, two/b)
        body_out = Relu (two_out)
    """
    model = residual(spec, shared, {"one": (8, 8, 1, 1), "two": (8, 8, 1, 1)})
    for target in TARGETS:
        made = to_int8(model, pictures, target)
        assert node_of(made, "one").input[1] == node_of(made, "two").input[1]
        assert types_line(model, made).passed
        with pytest.raises(UserError, match="would quantise nothing"):
            to_int8(model, pictures, target, keep=["two"])  # a kernel has one type


def test_values_that_are_compared_are_not_rounded_on_the_way(
    spec: Spec, pictures: list[Pixels]
) -> None:
    body = """
        one_out = Conv (stem/act_out, one/w, one/b)
        one/act_out = Relu (one_out)
        left_out = Pad (one/act_out, zeros)
        greater_out = Greater (left_out, one/act_out)
        where_out = Where (greater_out, left_out, one/act_out)
        two_out = Conv (where_out, two/w, two/b)
        three_out = Conv (one/act_out, three/w, three/b)
        sum_out = Add (two_out, three_out)
        body_out = Conv (sum_out, body/w, body/b)
    """
    kernels = {name: (8, 8, 1, 1) for name in ("one", "two", "three", "body")}
    model = residual(spec, body, kernels)
    for target in TARGETS:
        made = to_int8(model, pictures, target)
        # For CPUs, "one" in int8 would give rounded values.
        assert weighted_in_int8(made) == {*kernels} - ({"one"} if target == "cpu" else set())
        for name in ("left", "greater", "where"):
            assert node_of(made, name).input == node_of(model, name).input
        assert types_line(model, made).passed


def test_a_shape_is_asked_of_the_int8_value(spec: Spec, pictures: list[Pixels]) -> None:
    """Asked of the float value, it would keep onnxruntime from computing the layer in int8."""
    body = """
        one_out = Conv <strides = [2, 2]> (stem/act_out, one/w, one/b)
        two_out = Conv (one_out, two/w, two/b)
        size_of_one_out = Shape (one_out)
        body_out = Resize <mode = "nearest"> (two_out, , , size_of_one_out)
    """
    model = residual(spec, body, {name: (8, 8, 1, 1) for name in ("one", "two")})
    made = to_int8(model, pictures, "cpu")
    assert maker_of(made, node_of(made, "size_of_one").input[0]) == "QuantizeLinear"
    stored = tensors(made)
    assert stored["body/scale"] == stored["two/scale"]  # it holds the same values
    assert types_line(model, made).passed
    assert run(made, pictures[0], "labels")[0].shape == (1, *pictures[0].shape[:2])


def test_graphs_that_can_not_be_quantised_say_why(
    spec: Spec, typed: dict[str, ModelProto], network: ModelProto, pictures: list[Pixels]
) -> None:
    with pytest.raises(UserError, match="quantised already"):
        to_int8(typed["cpu"], pictures, "cpu")
    bare = onnx.helper.make_model(
        onnx.parser.parse_graph(
            "g (uint8[N, H, W, 3] images) => (uint8[N, H, W] labels)"
            "{ best = ArgMax <axis = 3, keepdims = 0> (images) labels = Cast <to = 2> (best) }"
        ),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
    )
    with pytest.raises(UserError, match="no Conv, ConvTranspose, Gemm or MatMul.*nothing"):
        to_int8(bare, pictures, "cpu")
    half = ModelProto()
    half.CopyFrom(network)
    for tensor in half.graph.initializer:
        if tensor.name == "stem/w":
            tensor.CopyFrom(from_array(to_array(tensor).astype(np.float16), tensor.name))
    with pytest.raises(UserError, match="'stem' are float16: int8 starts from the fp32 export"):
        to_int8(half, pictures, "cpu")
    old = ModelProto()
    old.CopyFrom(network)
    old.opset_import[0].version = 12
    with pytest.raises(UserError, match="operator set 12.*needs 13"):
        to_int8(old, pictures, "cpu")
    broken = ModelProto()
    broken.CopyFrom(network)
    for tensor in broken.graph.initializer:
        if tensor.name == "stem/b":
            tensor.CopyFrom(from_array(np.full(8, np.inf, np.float32), tensor.name))
    with pytest.raises(UserError, match="'.*_out' is NaN or infinite on the calibration pictures"):
        to_int8(broken, pictures, "cpu")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "none were given"),
        ([np.zeros((8, 8, 3), np.float32)], r"picture 0 is float32 \[8, 8, 3\]: uint8 \[H, W, 3\]"),
        ([np.zeros((8, 8), np.uint8)], r"picture 0 is uint8 \[8, 8\]"),
    ],
)
def test_pictures_of_a_wrong_kind_are_refused(
    network: ModelProto, bad: Sequence[Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        to_int8(network, bad, "cpu")


def test_pictures_of_different_sizes_and_a_small_budget_of_memory_change_nothing_but_the_way(
    network: ModelProto, pictures: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [picture[: 48 - 8 * index, : 40 + 8 * index] for index, picture in enumerate(pictures)]
    names = ["stem/act_out", "block/act2_out", "pool_out", "six/act_out"]
    at_once = int8.measure_ranges(network, names, sizes[:2])
    monkeypatch.setattr(int8, "_GROUP_BYTES", 1)
    one_by_one = int8.measure_ranges(network, names, sizes[:2])
    assert at_once == one_by_one
    assert all(lowest <= 0 < highest for lowest, highest in at_once.values())
    assert at_once["six/act_out"][1] <= 6


def test_a_range_gives_up_one_in_ten_thousand_and_no_more() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, 1_000_000).astype(np.float32)
    values[:20] = 80
    values[20:40] = -120
    lowest, highest = range_without_outliers(values)
    assert ((values < lowest) | (values > highest)).mean() == pytest.approx(1e-4, rel=0.02)
    assert (values < lowest).sum() == pytest.approx(50, abs=1)
    positive = np.abs(values)
    lowest, highest = range_without_outliers(positive)
    assert lowest == 0
    assert (positive > highest).sum() == pytest.approx(100, abs=1)
    assert range_without_outliers(-positive) == pytest.approx((-highest, 0))


def test_a_range_holds_0() -> None:
    assert range_without_outliers(np.full(9, 3, np.float32)) == (0, 3)
    assert range_without_outliers(np.full(9, -3, np.float32)) == (-3, 0)
    assert range_without_outliers(np.zeros(9, np.float32)) == (0, 0)


def test_samples_are_drawn_alike_each_time_from_all_over_the_value() -> None:
    values = np.arange(100_000, dtype=np.float32).reshape(10, 100, 100)
    sample = sampled(values, 1000, seed=3)
    assert sample.shape == (1000,)
    assert sample.tolist() == sampled(values, 1000, seed=3).tolist()
    assert sample.tolist() != sampled(values, 1000, seed=4).tolist()
    np.testing.assert_allclose(np.quantile(sample, (0.1, 0.5, 0.9)), (1e4, 5e4, 9e4), atol=5e3)
    assert sampled(values, 100_000, seed=0).tolist() == values.ravel().tolist()


def test_a_channel_of_zeros_stays_zero() -> None:
    kernel = np.stack([np.zeros((2, 1, 1)), np.full((2, 1, 1), 0.254)]).astype(np.float32)
    values, scale = quantise_kernel(kernel, 0, None)
    assert values.tolist() == [[[[0]], [[0]]], [[[127]], [[127]]]]
    np.testing.assert_allclose(scale, [1, 0.002], rtol=1e-6)
    assert values.dtype == np.int8


def test_for_cpus_a_residual_sum_that_the_head_reads_stays_float(
    spec: Spec, pictures: list[Pixels]
) -> None:
    body = """
        one_out = Conv (stem/act_out, one/w, one/b)
        one/act_out = Relu (one_out)
        two_out = Conv (one/act_out, two/w, two/b)
        sum_out = Add (two_out, stem/act_out)
        body_out = Relu (sum_out)
    """
    model = residual(spec, body, {name: (8, 8, 1, 1) for name in ("one", "two")})
    made = to_int8(model, pictures, "cpu")
    assert weighted_in_int8(made) == {"one"}
    assert node_of(made, "head").input[0] == "body_out"
    assert node_of(made, "sum").input[0] == "two_out"
    assert weighted_in_int8(to_int8(model, pictures, "cpu", ends=True)) == {
        "stem",
        "one",
        "two",
        "head",
    }
    assert weighted_in_int8(to_int8(model, pictures, "tensorrt")) == {"one", "two"}
