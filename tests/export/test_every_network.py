"""The whole way of every built-in network: regulated, trained, stripped, exported, certified, run.

Exporting is what takes the time: each network is exported twice, once before it was ever wrapped
and once after it was trained and stripped, and everything here looks at those two files.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn

from srdeploy.deployable import Deployable
from srdeploy.export.certificate import identity_lines, read_model
from srdeploy.export.precision.half import emulate, to_half
from srdeploy.export.precision.int8 import to_int8
from srdeploy.export.precision.stage import types_line
from srdeploy.export.to_onnx import export_onnx
from srdeploy.models import NETWORKS, make_network
from srdeploy.models.resnet import RESNETS
from srdeploy.precision import HalfPrecision, Target
from srdeploy.spec import InputPolicy, Spec
from srdeploy.train.losses import pixel_cross_entropy
from srdeploy.train.regulation import ExitOutputs, Losses, SelfRegulation

SAME_WHEN_SMALL = {
    "deeplabv2-resnet101": "deeplabv2-resnet50",
    "hrnet-w32": "hrnet-w18",
    "hrnet-w48": "hrnet-w18",
    "ocrnet-hrnet-w48": "ocrnet-hrnet-w18",
}
"""Networks that only differ in width or depth: at one width and depth they are one network, which
goes once."""
NAMES = tuple(name for name in NETWORKS if name not in SAME_WHEN_SMALL)
"""As built in: conftest adds one for other tests."""
SMALL: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "small_networks.json").read_text()
)
SHALLOW = {"resnet50": (2, 2, 2, 2), "resnet101": (2, 2, 2, 2)}
"""Blocks per layer: the first of a layer is unlike the others, and tracing takes time for each."""
CLASSES = 4
SIZES = ((32, 32), (64, 96), (128, 160))
"""(H, W): smallest, usual and largest."""
WITHOUT_TENSORRT = {"MaxUnpool", "ScatterND", "ScatterElements", "GatherND", "Loop", "If"}
HALVES = ("fp16", "bf16")
LEAST_AGREEMENT = {"fp16": 0.99, "bf16": 0.96}
LARGEST_MEAN_ERROR = {"fp16": 0.002, "bf16": 0.012}
"""Of the logits, against the largest of them. Drawn weights leave small margins between classes."""
INT8_TARGETS: tuple[Target, ...] = ("tensorrt", "cpu")
INT8_LIMITS = {"hourglass": (0.7, 0.6)}
"""By network: least agreement of labels, and most standard deviation of the logits' error over that
of the logits, with drawn weights. The hourglass's drawn logits hardly vary, and each of its many
sums is rounded; a trained one agrees like the others."""
USUAL_INT8_LIMITS = (0.85, 0.2)
FEEDBACK_TERMS = {"main", "seg", "cls", "srf", "srl"}


@dataclass(frozen=True)
class Journey:
    """One network's way."""

    network: nn.Module
    """What was deployed: taken from its regulation after one step."""
    regulated: SelfRegulation
    wrapped: nn.Module
    """What had been given to the regulation."""
    before: dict[str, Tensor]
    """State before it was wrapped."""
    after_wrapping: dict[str, Tensor]
    outputs: ExitOutputs
    losses: Losses
    labels: Tensor
    plain: Path
    """Exported before it was wrapped."""
    deployed: Path
    """Exported at the end."""


@pytest.fixture(scope="module")
def policy() -> Spec:
    return Spec(
        classes=tuple(f"class {i}" for i in range(CLASSES)),
        palette=tuple((i, i, i) for i in range(CLASSES)),
        input=InputPolicy(smallest=SIZES[0], usual=SIZES[1], largest=SIZES[2]),
    )


@pytest.fixture(scope="module", autouse=True)
def shallow() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, depths in SHALLOW.items():
            patch.setitem(RESNETS, name, (RESNETS[name][0], depths))
        yield


@pytest.fixture(scope="module", params=NAMES)
def journey(
    request: pytest.FixtureRequest,
    shallow: None,
    policy: Spec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Journey:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    network = make_network(request.param, CLASSES, **SMALL[request.param])
    move_statistics(network)
    export(network, policy, folder / "plain.onnx")
    before = copied(network)
    regulated = SelfRegulation(network, CLASSES).train()
    after_wrapping = copied(network)
    images = torch.randn(2, 3, 64, 96)
    labels = torch.randint(0, CLASSES, (2, 64, 96))
    labels[:, :8] = 255
    optimizer = torch.optim.SGD(regulated.parameters(), lr=0.01)
    outputs = regulated(images)
    losses = regulated.losses_of(outputs, labels, progress=1.0)
    losses.total.backward()
    optimizer.step()
    export(regulated.network, policy, folder / "deployed.onnx")
    return Journey(
        network=regulated.network.eval(),
        regulated=regulated,
        wrapped=network,
        before=before,
        after_wrapping=after_wrapping,
        outputs=outputs,
        losses=losses,
        labels=labels,
        plain=folder / "plain.onnx",
        deployed=folder / "deployed.onnx",
    )


@pytest.mark.parametrize("name", SAME_WHEN_SMALL)
def test_networks_of_one_code_and_width_are_one_network(name: str) -> None:
    twin = SAME_WHEN_SMALL[name]
    assert SMALL[name] == SMALL[twin]
    states = []
    for one in (name, twin):
        torch.manual_seed(0)
        made = make_network(one, CLASSES, **SMALL[one])
        states.append((str(made), copied(made)))
    assert states[0][0] == states[1][0]
    assert states[0][1].keys() == states[1][1].keys()
    assert all(torch.equal(value, states[1][1][key]) for key, value in states[0][1].items())


def move_statistics(network: nn.Module) -> None:
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)


def export(network: nn.Module, spec: Spec, path: Path) -> None:
    export_onnx(Deployable(network, spec, output="both"), spec, path, output="both")


def copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_every_exit_and_every_term_of_the_loss_is_finite(journey: Journey) -> None:
    stages, own = journey.network.stages, journey.network.auxiliary_heads
    assert isinstance(stages, tuple)
    assert isinstance(own, dict)
    assert len(journey.outputs.logits) == len(stages) + 1
    assert set(journey.outputs.own) == set(own)
    for logits in (*journey.outputs.logits, *journey.outputs.own.values()):
        full = nn.functional.interpolate(logits, size=journey.labels.shape[1:], mode="bilinear")
        assert pixel_cross_entropy(full, journey.labels, 255).isfinite()
    assert set(journey.losses.terms) == FEEDBACK_TERMS | ({"own"} if own else set())
    assert all(term.isfinite() for term in journey.losses.terms.values())
    assert journey.losses.total.isfinite()


def test_gradients_reach_every_parameter_of_network_and_exits(journey: Journey) -> None:
    assert journey.regulated.exits is not None
    for part in (journey.network, journey.regulated.exits):
        gradients = {name: parameter.grad for name, parameter in part.named_parameters()}
        assert gradients
        assert [name for name, gradient in gradients.items() if gradient is None] == []
        assert all(g.isfinite().all() for g in gradients.values() if g is not None)
        assert any(g.abs().max() > 0 for g in gradients.values() if g is not None)


def test_wrapping_changes_nothing_of_the_network_and_training_nothing_but_values(
    journey: Journey,
) -> None:
    assert journey.network is journey.wrapped
    assert journey.after_wrapping.keys() == journey.before.keys()
    for name, value in journey.before.items():
        assert torch.equal(value, journey.after_wrapping[name])
    after = journey.network.state_dict()
    assert [(n, v.shape, v.dtype) for n, v in after.items()] == [
        (n, v.shape, v.dtype) for n, v in journey.before.items()
    ]
    trained = [name for name, _ in journey.network.named_parameters()]
    assert any(not torch.equal(after[name], journey.before[name]) for name in trained)


def test_no_hook_stays_on_the_network(journey: Journey) -> None:
    for part in journey.network.modules():
        kinds = [kind for kind in vars(part) if kind.endswith("_hooks")]
        assert "_forward_hooks" in kinds
        assert [kind for kind in kinds if getattr(part, kind)] == []


def test_the_stripped_networks_graph_is_certified_as_the_plain_ones(journey: Journey) -> None:
    lines = identity_lines(read_model(journey.plain), read_model(journey.deployed))
    assert [line.name for line in lines] == ["identity", "oracles", "survivors"]
    assert [line.passed for line in lines] == [True] * 3, [line.detail for line in lines]


def test_but_for_trained_values_the_file_has_the_bytes_of_the_one_before_wrapping(
    journey: Journey,
) -> None:
    plain, deployed = journey.plain.read_bytes(), journey.deployed.read_bytes()
    assert plain != deployed  # it was trained
    model = read_model(journey.deployed)
    for mine, other in zip(
        model.graph.initializer, read_model(journey.plain).graph.initializer, strict=True
    ):
        assert mine.name == other.name
        mine.raw_data = other.raw_data
    assert model.SerializeToString(deterministic=True) == plain


@pytest.mark.parametrize("shape", [(1, 97, 131), (3, 97, 131), (1, 32, 33), (2, 64, 64)])
def test_onnxruntime_gives_torchs_logits_and_labels_at_sizes_and_batches_not_traced(
    journey: Journey, policy: Spec, shape: tuple[int, int, int]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    with torch.inference_mode():
        module = Deployable(journey.network, policy, output="both").eval()
        labels, logits = module(torch.from_numpy(images))
    session = onnxruntime.InferenceSession(journey.deployed, providers=["CPUExecutionProvider"])
    found_labels, found = session.run(["labels", "logits"], {"images": images})
    scale = float(logits.abs().max())
    np.testing.assert_allclose(found, logits.numpy(), rtol=1e-4, atol=1e-4 * scale)
    np.testing.assert_array_equal(found_labels, found.argmax(1))
    best = logits.topk(2, 1).values
    sure = ((best[:, 0] - best[:, 1]) > 1e-3 * scale).numpy()
    np.testing.assert_array_equal(found_labels[sure], labels.numpy()[sure])
    assert sure.mean() > 0.9


def test_no_operator_is_used_that_tensorrt_lacks(journey: Journey) -> None:
    nodes = read_model(journey.deployed).graph.node
    assert {node.op_type for node in nodes} & WITHOUT_TENSORRT == set()
    assert all(len(node.output) == 1 for node in nodes if node.op_type == "MaxPool")


@pytest.mark.parametrize("precision", HALVES)
def test_in_16_bits_the_network_gives_nearly_the_same_labels(
    journey: Journey, precision: HalfPrecision
) -> None:
    model = tempered(read_model(journey.plain))
    typed = to_half(model, precision)
    images = np.random.default_rng(0).integers(0, 256, (2, 65, 99, 3), dtype=np.uint8)
    runs = [model, emulate(typed), *([typed] if precision == "fp16" else [])]
    expected, *found = (labels_and_logits(one, images) for one in runs)
    scale = float(np.abs(expected[1]).max())
    for labels, logits in found:
        assert np.isfinite(logits).all()
        assert (labels == expected[0]).mean() > LEAST_AGREEMENT[precision]
        assert np.abs(logits - expected[1]).mean() < LARGEST_MEAN_ERROR[precision] * scale


@pytest.mark.parametrize("precision", HALVES)
def test_plain_and_trained_network_are_one_graph_in_16_bits_too(
    journey: Journey, precision: HalfPrecision
) -> None:
    plain, deployed = (
        to_half(read_model(path), precision) for path in (journey.plain, journey.deployed)
    )
    assert [line.passed for line in identity_lines(plain, deployed)] == [True] * 3


@pytest.mark.parametrize("precision", HALVES)
def test_tensorrt_for_rtx_builds_the_typed_graph_with_the_types_that_it_states(
    journey: Journey, precision: HalfPrecision
) -> None:
    trt = tensorrt_rtx()
    half = {"fp16": trt.DataType.HALF, "bf16": trt.DataType.BF16}[precision]
    typed = to_half(read_model(journey.deployed), precision)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, builder.logger)
    parsed = parser.parse(typed.SerializeToString())
    assert parsed, [str(parser.get_error(index)) for index in range(parser.num_errors)]
    layers = [definition.get_layer(index) for index in range(definition.num_layers)]
    found = {(one.type, one.get_output(0).dtype) for one in layers}
    kinds = trt.LayerType
    assert {dtype for kind, dtype in found if kind == kinds.CONVOLUTION} == {half}
    assert {dtype for kind, dtype in found if kind == kinds.TOPK} == {trt.DataType.FLOAT}
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *[(1, *size, 3) for size in SIZES])
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(definition, config) is not None


@pytest.mark.parametrize("target", INT8_TARGETS)
def test_in_int8_the_network_gives_mostly_the_same_labels(
    journey: Journey, request: pytest.FixtureRequest, target: Target
) -> None:
    name = request.node.callspec.params["journey"]
    agreement, most = INT8_LIMITS.get(name, USUAL_INT8_LIMITS)
    model = tempered(read_model(journey.deployed))
    images = np.random.default_rng(0).integers(0, 256, (4, 65, 99, 3), dtype=np.uint8)
    typed = to_int8(model, list(images), target)
    line = types_line(model, typed)
    assert line.passed, line.detail
    expected, found = (labels_and_logits(one, images[:2]) for one in (model, typed))
    error = found[1] - expected[1]
    assert 0 < error.std() < most * expected[1].std()
    assert (found[0] == expected[0]).mean() > agreement


def test_tensorrt_for_rtx_builds_the_int8_graph_and_reads_int8_where_it_was_written(
    journey: Journey,
) -> None:
    trt = tensorrt_rtx()
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    typed = to_int8(read_model(journey.deployed), list(images), "tensorrt")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, builder.logger)
    parsed = parser.parse(typed.SerializeToString())
    assert parsed, [str(parser.get_error(index)) for index in range(parser.num_errors)]
    layers = [definition.get_layer(index) for index in range(definition.num_layers)]
    kinds = trt.LayerType
    rounding = [one for one in layers if one.type == kinds.QUANTIZE]
    restoring = [one for one in layers if one.type == kinds.DEQUANTIZE]
    assert {one.get_output(0).dtype for one in rounding} == {trt.DataType.INT8}
    assert {one.get_input(0).dtype for one in restoring} == {trt.DataType.INT8}
    written = [node.op_type for node in typed.graph.node]
    assert len(rounding) == written.count("QuantizeLinear") > 0
    assert len(restoring) == written.count("DequantizeLinear")
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *[(1, *size, 3) for size in SIZES])
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(definition, config) is not None


def tempered(model: ModelProto) -> ModelProto:
    """The network with smaller kernels: drawn ones let activations grow over a hundred layers, out
    of the range of fp16."""
    for tensor in model.graph.initializer:
        if len(tensor.dims) >= 4:
            smaller = onnx.numpy_helper.to_array(tensor) * np.float32(0.8)
            tensor.CopyFrom(onnx.numpy_helper.from_array(smaller, tensor.name))
    return model


def labels_and_logits(model: ModelProto, images: Any) -> tuple[Any, Any]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    labels, logits = session.run(["labels", "logits"], {"images": images})
    return labels, logits


def tensorrt_rtx() -> Any:
    """The package, or a skip that says what was not tested."""
    with suppress(ImportError):
        import tensorrt_rtx

        return tensorrt_rtx
    return pytest.skip("no tensorrt_rtx here: graphs were NOT parsed and built (pip: tensorrt-rtx)")


def test_tensorrt_for_rtx_parses_the_graph_and_builds_it_for_a_range_of_sizes(
    journey: Journey,
) -> None:
    trt = tensorrt_rtx()
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, builder.logger)
    parsed = parser.parse(journey.deployed.read_bytes())
    assert parsed, [str(parser.get_error(index)) for index in range(parser.num_errors)]
    outputs = [definition.get_output(index) for index in range(definition.num_outputs)]
    assert [(o.name, o.dtype) for o in outputs] == [
        ("labels", trt.DataType.UINT8),
        ("logits", trt.DataType.FLOAT),
    ]
    profile = builder.create_optimization_profile()
    batches = (1, 1, 3)
    shapes = [(batch, *size, 3) for batch, size in zip(batches, SIZES, strict=True)]
    profile.set_shape("images", *shapes)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    engine = builder.build_serialized_network(definition, config)
    assert engine is not None
    assert engine.nbytes > weight_bytes(onnx.load(journey.deployed))


def weight_bytes(model: ModelProto) -> int:
    return sum(
        len(tensor.raw_data)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    )
