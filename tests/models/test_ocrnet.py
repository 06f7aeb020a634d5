"""OCRNet: its attention against loops over pixels, its coarse head, and its backbones."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.models import make_network
from srdeploy.models.ocrnet import RegionAttention, gather_regions
from srdeploy.models.resnet import ResNet
from srdeploy.models.weights import load_pretrained

NETWORKS: dict[str, dict[str, Any]] = {
    "ocrnet-hrnet-w18": {"width": 4, "middle": 16, "blocks": 1, "modules": [1, 1, 1]},
    "ocrnet-resnet101": {"width": 4, "middle": 16},
}


def tiny(name: str, classes: int = 5, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return make_network(name, classes, **{**NETWORKS[name], **options})


def calibrated(network: nn.Module) -> nn.Module:
    """`network` in evaluation mode, its statistics those of a batch of noise."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the plain mean of what it saw
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 64, 96))
    return network.eval()


@settings(max_examples=15, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    classes=st.integers(2, 4),
    seed=st.integers(0, 2**16),
)
def test_a_region_is_the_mean_of_pixels_weighted_by_its_softmax_over_the_picture(
    grid: tuple[int, int], classes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    coarse = 3 * torch.randn(2, classes, *grid, generator=generator)
    pixels = torch.randn(2, 3, *grid, generator=generator)
    found = gather_regions(coarse, pixels)
    assert found.shape == (2, 3, classes, 1)
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    for n in range(2):
        for k in range(classes):
            raw = [math.exp(float(coarse[n, k, row, column])) for row, column in places]
            mean = torch.zeros(3, dtype=torch.float64)
            for weight, (row, column) in zip(raw, places, strict=True):
                mean += weight / sum(raw) * pixels[n, :, row, column].double()
            torch.testing.assert_close(found[n, :, k, 0].double(), mean, rtol=1e-5, atol=1e-5)


def test_a_large_pictures_regions_keep_their_digits_in_half_precision() -> None:
    torch.manual_seed(0)
    coarse, pixels = torch.randn(1, 2, 384, 512), 1 + torch.rand(1, 3, 384, 512)
    expected = gather_regions(coarse, pixels)
    found = gather_regions(coarse.half(), pixels.half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=0)


def test_each_pixels_context_is_its_attention_over_the_regions() -> None:
    torch.manual_seed(0)
    attention = RegionAttention(6, 4, bias=True)
    calibrate = [torch.randn(4, 6, 5, 7), torch.randn(4, 6, 3, 1)]
    with torch.no_grad():
        attention.train()(*calibrate)
    attention.eval()
    pixels, regions = torch.randn(2, 6, 5, 7), torch.randn(2, 6, 3, 1)
    with torch.inference_mode():
        found = attention(pixels, regions)
        query, key = attention.query(pixels).double(), attention.key(regions).double()
        value = attention.value(regions).double()
        context = torch.zeros(2, 4, 5, 7, dtype=torch.float64)
        for n, row, column in torch.cartesian_prod(*map(torch.arange, (2, 5, 7))).tolist():
            alike = [
                math.exp(float(query[n, :, row, column] @ key[n, :, k, 0]) / math.sqrt(4))
                for k in range(3)
            ]
            for k in range(3):
                context[n, :, row, column] += alike[k] / sum(alike) * value[n, :, k, 0]
        expected = attention.out(context.float())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_images_logits_do_not_depend_on_its_batch(name: str) -> None:
    network = calibrated(tiny(name))
    images = torch.randn(3, 3, 97, 131)
    with torch.inference_mode():
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * float(together.abs().max()))


@pytest.mark.parametrize(
    ("name", "grid"), [("ocrnet-hrnet-w18", (25, 33)), ("ocrnet-resnet101", (13, 17))]
)
def test_the_coarse_head_gives_one_map_of_logits_at_the_backbones_stride(
    name: str, grid: tuple[int, int]
) -> None:
    network = tiny(name).eval()
    seen: list[Tensor] = []
    network.get_submodule("coarse_head").register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    with torch.inference_mode():
        network(torch.randn(2, 3, 97, 131))
    assert [one.shape for one in seen] == [(2, 5, *grid)]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_main_logits_alone_move_every_parameter(name: str) -> None:
    """The coarse head too: it is no auxiliary one, and stays in the deployed network."""
    network = tiny(name).train()
    network(torch.randn(2, 3, 64, 96)).square().mean().backward()
    still = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias ahead of BatchNorm in training has no effect: its gradient is zero but for rounding.
    assert [n for n in still if not n.endswith("bias")] == []


def test_the_resnets_coarse_head_reads_layer3_and_not_layer4() -> None:
    network = tiny("ocrnet-resnet101").train()
    seen: list[Tensor] = []
    network.get_submodule("coarse_head").register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    network(torch.randn(2, 3, 64, 96))
    seen[0].square().mean().backward()
    moved = {n.split(".")[1] for n, p in network.named_parameters() if p.grad is not None}
    assert "layer3" in moved
    assert "layer4" not in moved


def test_the_resnets_first_dilated_blocks_have_half_the_dilation() -> None:
    backbone = tiny("ocrnet-resnet101").get_submodule("backbone")
    found = {
        layer: [block.get_submodule("conv2") for block in backbone.get_submodule(layer).children()]
        for layer in ("layer2", "layer3", "layer4")
    }
    dilations = {
        layer: [c.dilation[0] for c in convolutions if isinstance(c, nn.Conv2d)]
        for layer, convolutions in found.items()
    }
    assert dilations == {"layer2": [1] * 4, "layer3": [1] + [2] * 22, "layer4": [2, 4, 4]}


def test_a_torchvision_file_fills_the_resnet(tmp_path: Path) -> None:
    network = tiny("ocrnet-resnet101")
    torch.manual_seed(1)
    weights = ResNet("resnet101", width=4).state_dict()
    torch.save(
        {**weights, "fc.weight": torch.ones(2), "fc.bias": torch.ones(2)}, tmp_path / "r.pth"
    )
    line = load_pretrained(network, str(tmp_path / "r.pth"))
    assert line.endswith("into the backbone; classification layers left out: fc")
    loaded = network.get_submodule("backbone").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("options", "backbone"),
    [
        ({"deep_stem": True, "width": 64}, "'resnet101 with a deep stem'"),
        ({"width": 4}, "'resnet101 of width 4'"),
    ],
)
def test_imagenet_weights_of_another_shape_are_refused_before_a_download(
    options: dict[str, Any], backbone: str
) -> None:
    with torch.device("meta"):
        network = tiny("ocrnet-resnet101", **options)
    with pytest.raises(UserError, match=f"no ImageNet weights for backbone {backbone}"):
        load_pretrained(network, "imagenet")


def test_the_deep_stem_gives_layer1_twice_the_channels_on_the_same_grid() -> None:
    backbone = tiny("ocrnet-resnet101", deep_stem=True).get_submodule("backbone")
    plain = tiny("ocrnet-resnet101").get_submodule("backbone")
    images = torch.randn(1, 3, 97, 131)
    deep, usual = (one.get_submodule("conv1")(images) for one in (backbone, plain))
    assert deep.shape == (1, 8, 49, 66)
    assert usual.shape == (1, 4, 49, 66)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_middle_that_is_no_count_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="middle is 0: a whole number of channels"):
        tiny(name, middle=0)


def test_a_deep_stem_that_is_no_truth_value_is_refused() -> None:
    with pytest.raises(UserError, match="deep_stem is 'flase': true or false is needed"):
        tiny("ocrnet-resnet101", deep_stem="flase")
