"""The plain networks: sizes, shapes, stages, options, and the equivalences they rest on."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.errors import UserError
from srdeploy.models import NETWORKS, make_network
from srdeploy.models.cost import ShapesAlone, count_macs, count_parameters
from srdeploy.models.mobilenet import MobileNetV2
from srdeploy.models.resnet import ResNet
from srdeploy.models.segnet import pool_2x2, unpool_2x2

NAMES = tuple(NETWORKS)
"""As built in: tests of other folders add networks of their own."""
SMALL: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "small_networks.json").read_text()
)
"""The options that make each network small; a network without a row fails its tests."""
OWN_EXITS: dict[str, dict[str, float]] = {
    "ocrnet-hrnet-w18": {"coarse_head": 0.4},
    "ocrnet-hrnet-w48": {"coarse_head": 0.4},
    "ocrnet-resnet101": {"coarse_head": 0.4},
    "spgnet-resnet50": {"prediction": 0.4},
    "hourglass": {"scores.0": 1.0},
}
"""Expected heads of a network's own with their loss weights; networks not named here have none."""
HIGH_RESOLUTION = ("hrnet-w18", "hrnet-w32", "hrnet-w48", "ocrnet-hrnet-w18", "ocrnet-hrnet-w48")
STAGE_HEIGHTS: dict[str, list[int]] = {
    **dict.fromkeys(HIGH_RESOLUTION, [16] * 5),  # each stage ends in its highest branch
    "ocrnet-resnet101": [32, 17, 9, 9],  # layer3 is dilated
    "spgnet-resnet50": [17, 9, 5, 3] * 2,  # two encoders, one after the other
    "hourglass": [16] * 3,  # all stacks work at a quarter of the size
}
"""Of images of 64x64; those of networks not named here fall at least three times, never rising."""
GOLDEN = [
    line.split("\t")
    for line in Path(__file__).with_name("golden_sizes.tsv").read_text().splitlines()
    if not line.startswith("#")
]


def small_network(name: str, classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return make_network(name, classes, **SMALL[name]).eval()


def stages_of(network: nn.Module) -> tuple[str, ...]:
    stages = network.stages
    assert isinstance(stages, tuple)
    return stages


def own_exits_of(network: nn.Module) -> dict[str, float]:
    auxiliary_heads = network.auxiliary_heads
    assert isinstance(auxiliary_heads, dict)
    return auxiliary_heads


def randomise_statistics(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)


def test_every_network_has_a_small_form_for_these_tests() -> None:
    assert set(SMALL) == set(NAMES)


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: " ".join(row[:3]))
def test_parameters_and_work_equal_the_reference(row: list[str]) -> None:
    name, options, classes, height, width, parameters, gmacs = row
    with torch.device("meta"), ShapesAlone():  # type: ignore[no-untyped-call]
        network = make_network(name, int(classes), **json.loads(options))
    assert count_parameters(network) == int(parameters)
    if gmacs != "-":
        assert count_macs(network, (int(height), int(width))) / 1e9 == float(gmacs)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None)
@given(height=st.integers(32, 110), width=st.integers(32, 110), batch=st.integers(1, 2))
def test_logits_have_the_images_size(name: str, height: int, width: int, batch: int) -> None:
    network = small_network(name)
    with torch.inference_mode():
        logits = network(torch.randn(batch, 3, height, width))
    assert logits.shape == (batch, 5, height, width)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_emits_one_tensor_per_forward_pass_that_nothing_changes_later(
    name: str,
) -> None:
    network = small_network(name).train()
    seen: list[tuple[str, Tensor, Tensor]] = []
    for stage in stages_of(network):
        network.get_submodule(stage).register_forward_hook(
            lambda _module, _inputs, output, name=stage: seen.append((name, output, output.clone()))
        )
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    assert tuple(stage for stage, _, _ in seen) == stages_of(network)
    for _, live, copy in seen:
        assert live.dim() == 4
        assert torch.equal(live, copy)
    heights = [live.shape[2] for _, live, _ in seen]
    if name in STAGE_HEIGHTS:
        assert heights == STAGE_HEIGHTS[name]
    else:
        assert heights == sorted(heights, reverse=True)
        assert len(set(heights)) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    network = small_network(name).train()
    own: list[Tensor] = []
    for head in own_exits_of(network):
        network.get_submodule(head).register_forward_hook(
            lambda _module, _inputs, output: own.append(output)
        )
    logits = network(torch.randn(2, 3, 64, 64))
    torch.stack([output.square().mean() for output in (logits, *own)]).sum().backward()
    assert len(own) == len(own_exits_of(network))
    without = [n for n, p in network.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("name", NAMES)
def test_the_exits_of_a_networks_own_are_the_expected_ones(name: str) -> None:
    assert small_network(name).auxiliary_heads == OWN_EXITS.get(name, {})


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_alone_decides_the_weights(name: str) -> None:
    first, second = small_network(name).state_dict(), small_network(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_initial_probabilities_are_nearly_uniform() -> None:
    network = small_network("unet")
    with torch.inference_mode():
        logits = network(torch.randn(1, 3, 64, 64))
    assert logits.softmax(1).max() < 0.3  # 1/5 where the classes are equally likely


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "mobilenet_v2"])
def test_dilated_features_on_the_strided_grid_are_the_strided_networks(
    architecture: str, output_stride: int
) -> None:
    torch.manual_seed(0)
    mobile = architecture == "mobilenet_v2"
    strided = MobileNetV2(32, 0.25) if mobile else ResNet(architecture, 32)
    dilated = MobileNetV2(output_stride, 0.25) if mobile else ResNet(architecture, output_stride)
    randomise_statistics(strided)
    dilated.load_state_dict(strided.state_dict())
    images = torch.randn(1, 3, 97, 131)
    step = 32 // output_stride
    with torch.inference_mode():
        coarse, fine = strided.eval()(images), dilated.eval()(images)
    torch.testing.assert_close(fine[..., ::step, ::step], coarse, rtol=1e-4, atol=1e-4)
    assert fine.shape[2] > coarse.shape[2]


def resnet_keys(blocks: tuple[int, ...], convolutions: int, first_projects: bool) -> set[str]:
    """torchvision's names, written down from its documented checkpoints."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = {"conv1.weight"} | {f"bn1.{n}" for n in norm}
    for layer, count in enumerate(blocks, 1):
        for block in range(count):
            at = f"layer{layer}.{block}"
            for i in range(1, convolutions + 1):
                keys |= {f"{at}.conv{i}.weight"} | {f"{at}.bn{i}.{n}" for n in norm}
            if block == 0 and (layer > 1 or first_projects):
                keys |= {f"{at}.downsample.0.weight"} | {f"{at}.downsample.1.{n}" for n in norm}
    return keys


@pytest.mark.parametrize(
    ("architecture", "keys", "parameters"),
    [
        # torchvision's parameters less those of fc: 2048 * 1000 + 1000, or 512 * 1000 + 1000.
        ("resnet18", resnet_keys((2, 2, 2, 2), 2, False), 11_689_512 - 513_000),
        ("resnet50", resnet_keys((3, 4, 6, 3), 3, True), 25_557_032 - 2_049_000),
        ("resnet101", resnet_keys((3, 4, 23, 3), 3, True), 44_549_160 - 2_049_000),
    ],
)
def test_resnets_have_torchvisions_names_and_parameters(
    architecture: str, keys: set[str], parameters: int
) -> None:
    with torch.device("meta"):
        backbone = ResNet(architecture)
    assert set(backbone.state_dict()) == keys
    assert sum(p.numel() for p in backbone.parameters()) == parameters


def test_mobilenetv2_has_torchvisions_parameters_up_to_its_last_block() -> None:
    with torch.device("meta"):
        backbone = MobileNetV2()
    classifier, last = 1280 * 1000 + 1000, 320 * 1280 + 2 * 1280
    assert sum(p.numel() for p in backbone.parameters()) == 3_504_872 - classifier - last


@pytest.mark.parametrize("output_stride", [8, 16])
def test_deeplab_features_have_the_output_stride(output_stride: int) -> None:
    network = make_network("deeplabv2-mobilenetv2", 3, output_stride=output_stride, width_mult=0.25)
    backbone = network.get_submodule("backbone")
    assert backbone(torch.randn(2, 3, 64, 96)).shape[2:] == (
        64 // output_stride,
        96 // output_stride,
    )


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    levels=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_segnet_pooling_equals_torchs_with_ties_and_odd_sizes(
    height: int, width: int, levels: int, seed: int
) -> None:
    """Values of few levels, many of them zero, so that most windows have ties."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, levels, (2, 3, height, width), generator=generator).float()
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    pooled, choice = pool_2x2(ours)
    expected, indices = functional.max_pool2d(theirs, 2, ceil_mode=True, return_indices=True)
    assert torch.equal(pooled, expected)
    back = unpool_2x2(pooled + 1, choice)
    expected_back = functional.max_unpool2d(
        expected + 1, indices, [2, 2], output_size=values.shape[2:]
    )
    assert torch.equal(back, expected_back)
    weights = torch.randn(values.shape, generator=generator)
    (back * weights).sum().backward()
    (expected_back * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deeplabv2-resnet5", {}, "did you mean 'deeplabv2-resnet50'"),
        ("transformer", {}, "known: deeplabv2-resnet18"),
        ("unet", {"widht": 4}, "no option 'widht': did you mean 'width'"),
        ("unet", {"width": 0}, "width is 0"),
        ("segnet", {"width": "wide"}, "width is 'wide'"),
        ("deeplabv2-resnet18", {"output_stride": 32}, "output_stride is 32: 8 and 16 are built"),
        ("deeplabv2-resnet18", {"output_stride": [8]}, r"output_stride is \[8\]"),
        ("deeplabv2-mobilenetv2", {"width_mult": -1}, "width_mult is -1"),
    ],
)
def test_a_wrong_name_or_option_is_refused_with_the_remedy(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_network(name, 5, **options)


@pytest.mark.parametrize("classes", [1, 0, True, 2.0])
def test_a_class_count_below_two_or_no_count_at_all_is_refused(classes: Any) -> None:
    with pytest.raises(UserError, match="classes is"):
        make_network("unet", classes)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_keywords_with_defaults(name: str) -> None:
    first, *options = inspect.signature(NETWORKS[name]).parameters.values()
    assert first.name == "classes"
    assert all(o.kind is o.KEYWORD_ONLY and o.default is not o.empty for o in options)
