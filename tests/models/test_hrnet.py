"""HRNet: its grids, its exchange between branches, its names, and the options it refuses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.models import make_network
from srdeploy.models.hrnet import Fusion, HighResolutionModule, HRNetBackbone
from srdeploy.models.weights import load_pretrained

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return make_network("hrnet-w18", 5, width=4, blocks=1, modules=[1, 2, 1])


def randomised(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode with BatchNorms that are not the identity."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value in (part.running_mean, part.weight, part.bias):
                assert value is not None
                nn.init.normal_(value, std=0.3)
            assert part.running_var is not None
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module.eval()


def convolved(path: nn.Module, features: Tensor) -> Tensor:
    """Convolution and BatchNorm of `path` in float64, by their definitions."""
    convolution, norm = path.get_submodule("0"), path.get_submodule("1")
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    weight, stride, side = convolution.weight.double(), convolution.stride[0], convolution.padding
    pad = int(side[0])
    padded = nn.functional.pad(features, (pad, pad, pad, pad))
    rows = (features.shape[2] - 1) // stride + 1
    columns = (features.shape[3] - 1) // stride + 1
    total = torch.zeros(features.shape[0], weight.shape[0], rows, columns, dtype=torch.float64)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            part = padded[..., i::stride, j::stride][..., :rows, :columns]
            total += torch.einsum("oc,nchw->nohw", weight[:, :, i, j], part)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance, scale, offset = (
        value.double()[:, None, None]
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (total - mean) / (variance + norm.eps).sqrt() * scale + offset


def raised_by_loops(features: Tensor, height: int, width: int) -> Tensor:
    """Bilinear with half-pixel centres, pixel by pixel."""
    low_height, low_width = features.shape[-2:]
    result = torch.zeros(*features.shape[:2], height, width, dtype=torch.float64)
    for row in range(height):
        y = max((row + 0.5) * low_height / height - 0.5, 0)
        top = int(y)
        below = min(top + 1, low_height - 1)
        for column in range(width):
            x = max((column + 0.5) * low_width / width - 0.5, 0)
            left = int(x)
            right = min(left + 1, low_width - 1)
            upper = features[..., top, left] * (1 - x + left) + features[..., top, right] * (
                x - left
            )
            lower = features[..., below, left] * (1 - x + left) + features[..., below, right] * (
                x - left
            )
            result[..., row, column] = upper * (1 - y + top) + lower * (y - top)
    return result


def exchanged(widths: Sequence[int], target: int, fusion: Fusion, maps: list[Tensor]) -> Tensor:
    """The exchange into branch `target`, in float64."""
    total = maps[target].double()
    for source in range(len(widths)):
        path, features = fusion[source], maps[source].double()
        if source > target:
            low = convolved(path, features)
            total = total + raised_by_loops(low, *maps[target].shape[-2:])
        elif source < target:
            *inner, last = path.children()
            for step in inner:
                features = convolved(step, features).clamp(min=0)
            total = total + convolved(last, features)
    return total.clamp(min=0)


@pytest.mark.parametrize("target", [0, 1, 2])
def test_the_exchange_between_branches_equals_its_definition_at_odd_sizes(target: int) -> None:
    torch.manual_seed(target)
    widths = (3, 5, 4)
    fusion = Fusion(widths, target)
    randomised(fusion)
    grids = ((9, 13), (5, 7), (3, 4))
    maps = [torch.randn(2, c, *grid) for c, grid in zip(widths, grids, strict=True)]
    with torch.inference_mode():
        found = fusion(maps)
        expected = exchanged(widths, target, fusion, maps)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_branches_halve_their_grids_rounding_up_and_double_their_channels() -> None:
    seen: list[tuple[int, ...]] = []
    network = tiny().eval()
    network.get_submodule("backbone.stage4").register_forward_hook(
        lambda _module, _inputs, maps: seen.extend(tuple(one.shape) for one in maps)
    )
    with torch.inference_mode():
        network(torch.randn(1, 3, 97, 131))
    assert seen == [(1, 4, 25, 33), (1, 8, 13, 17), (1, 16, 7, 9), (1, 32, 4, 5)]


def test_a_stages_exit_has_read_all_of_its_branches() -> None:
    module = HighResolutionModule((3, 4, 5), 1)
    maps = [torch.randn(2, c, 8 // s, 8 // s) for c, s in ((3, 1), (4, 2), (5, 4))]
    module(maps)[0].square().sum().backward()
    for branch in module.branches:
        assert all(p.grad is not None and bool(p.grad.any()) for p in branch.parameters())


def test_an_images_logits_do_not_depend_on_its_batch() -> None:
    network = randomised(tiny())
    images = torch.randn(3, 3, 97, 131)
    with torch.inference_mode():
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * float(together.abs().max()))


def normed(at: str, first: int = 0) -> set[str]:
    """A convolution without bias at `at`.`first` and the BatchNorm after it."""
    return {f"{at}.{first}.weight"} | {f"{at}.{first + 1}.{n}" for n in NORM}


def block_keys(at: str, convolutions: int, projects: bool) -> set[str]:
    keys = normed(f"{at}.downsample") if projects else set()
    for i in range(1, convolutions + 1):
        keys |= {f"{at}.conv{i}.weight"} | {f"{at}.bn{i}.{n}" for n in NORM}
    return keys


def stage_keys(branches: int, modules: int, blocks: int) -> set[str]:
    """Stage k has k branches; exchange i <- j is a 1x1 upwards and i - j 3x3 steps downwards."""
    keys = set()
    for module in range(modules):
        at = f"stage{branches}.{module}"
        for i in range(branches):
            for block in range(blocks):
                keys |= block_keys(f"{at}.branches.{i}.{block}", 2, False)
            for j in range(i + 1, branches):
                keys |= normed(f"{at}.fuse_layers.{i}.{j}")
            for j in range(i):
                for step in range(i - j):
                    keys |= normed(f"{at}.fuse_layers.{i}.{j}.{step}")
    return keys


def test_the_backbone_has_the_names_of_the_authors_code() -> None:
    expected = {f"conv{i}.weight" for i in (1, 2)} | {f"bn{i}.{n}" for i in (1, 2) for n in NORM}
    for block in range(4):
        expected |= block_keys(f"layer1.{block}", 3, block == 0)
    expected |= normed("transition1.0") | normed("transition1.1.0")
    expected |= normed("transition2.2.0") | normed("transition3.3.0")
    expected |= stage_keys(2, 1, 4) | stage_keys(3, 4, 4) | stage_keys(4, 3, 4)
    with torch.device("meta"):
        backbone = HRNetBackbone(18)
    assert set(backbone.state_dict()) == expected


def test_a_classification_checkpoint_fills_the_backbone(tmp_path: Path) -> None:
    source, network = tiny(), make_network("hrnet-w18", 3, width=4, blocks=1, modules=[1, 2, 1])
    weights = source.get_submodule("backbone").state_dict()
    extra = {name: torch.ones(2) for name in ("incre_modules.0.0.conv1.weight", "classifier.bias")}
    torch.save({**weights, **extra}, tmp_path / "hrnet.pth")
    line = load_pretrained(network, str(tmp_path / "hrnet.pth"))
    assert line.endswith("classification layers left out: classifier, incre_modules")
    loaded = network.get_submodule("backbone").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_a_download_of_imagenet_weights_is_refused_by_name() -> None:
    network = make_network("hrnet-w18", 3, blocks=1, modules=[1, 1, 1])
    with pytest.raises(UserError, match="no ImageNet weights for backbone 'hrnet-w18'"):
        load_pretrained(network, "imagenet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width is 0: a whole number of channels"),
        ({"blocks": 0}, "blocks is 0: a whole number from 1"),
        ({"blocks": True}, "blocks is True"),
        ({"modules": [1, 4]}, r"modules is \[1, 4\]: three whole numbers"),
        ({"modules": [1, 0, 3]}, r"modules is \[1, 0, 3\]"),
        ({"modules": 3}, "modules is 3"),
        ({"modules": "143"}, "modules is '143'"),
    ],
)
def test_an_option_without_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_network("hrnet-w32", 3, **options)
