"""Which maps of a network exits read when nobody names them, and how those maps are read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.errors import UserError
from srdeploy.models import NETWORKS, make_network
from srdeploy.train.exits import TapChoice, choose_taps, collected, feature_map, given_taps
from srdeploy.train.regulation import AUXILIARY_WEIGHT, SelfRegulation
from srdeploy.train.regulation_config import RegulationConfig

K = 4
SMALL: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "small_networks.json").read_text()
)


def conv(inputs: int, outputs: int, stride: int = 1, inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=inplace),
    )


def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A ResNet's layer in small: two blocks of one kind."""
    return nn.Sequential(conv(inputs, outputs, stride), conv(outputs, outputs))


class Flat(nn.Module):
    """A dilated ResNet whose layers, pyramid pooling and auxiliary head are parts of the network
    itself, with the stem's ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 2, 1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = layer(4, 4, 1)
        self.layer2 = layer(4, 6, 2)
        self.layer3 = layer(6, 8, 1)
        self.layer4 = layer(8, 10, 1)
        self.pools = nn.ModuleList(nn.AdaptiveAvgPool2d(n) for n in (1, 2, 3, 6))
        self.head = nn.Sequential(conv(50, 4), nn.Dropout2d(0.1), nn.Conv2d(4, K, 1))
        self.aux = nn.Sequential(conv(8, 4), nn.Conv2d(4, K, 1))

    def forward(self, images: Tensor) -> Any:
        mid = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(images))))))
        deep = self.layer4(mid)
        size = deep.shape[-2:]
        pooled = [functional.interpolate(pool(deep), size=size) for pool in self.pools]
        logits = self.head(torch.cat([deep, *pooled], 1))
        return (logits, self.aux(mid)) if self.training else logits


class Unet(nn.Module):
    """An smp-like U-Net: an encoder that gives all its levels, a decoder that takes them."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            self.layer1, self.layer2 = layer(4, 4, 1), layer(4, 6, 2)
            self.layer3 = layer(6, 8, 2)

        def forward(self, images: Tensor) -> list[Tensor]:
            first = self.relu(self.bn1(self.conv1(images)))
            found = [images, first]
            features = self.maxpool(first)
            for stage in (self.layer1, self.layer2, self.layer3):
                features = stage(features)
                found.append(features)
            return found

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [(8, 6), (6, 4), (4, 4)]
            self.blocks = nn.ModuleList(conv(low + skip, skip) for low, skip in widths)

        def forward(self, *found: Tensor) -> Tensor:
            features, *skips = found[::-1]
            for block, skip in zip(self.blocks, skips, strict=False):
                raised = functional.interpolate(features, size=skip.shape[-2:])
                features = block(torch.cat((raised, skip), 1))
            return features

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Unet.Encoder(), Unet.Decoder()
        self.segmentation_head = nn.Sequential(nn.Conv2d(4, K, 3, padding=1), nn.Upsample(None, 2))

    def forward(self, images: Tensor) -> Any:
        return {"pred": self.segmentation_head(self.decoder(*self.encoder(images)))}


class Wrapped(nn.Module):
    """A network inside another, and its output in an object."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network

    def forward(self, images: Tensor) -> Any:
        return [self.model(images)]


class TwoPaths(nn.Module):
    """A shallow path for detail first, a deep one for context, both merged (BiSeNet's way)."""

    def __init__(self) -> None:
        super().__init__()
        self.detail = nn.Sequential(conv(3, 4, 2), conv(4, 4, 2), conv(4, 4, 2))
        self.context = nn.Sequential(conv(3, 4, 2), conv(4, 5, 2), conv(5, 6, 2), conv(6, 7, 2))
        self.merge = conv(11, 6)
        self.head = nn.Conv2d(6, K, 1)

    def forward(self, images: Tensor) -> Any:
        detail, context = self.detail(images), self.context(images)
        context = functional.interpolate(context, size=detail.shape[-2:])
        return self.head(self.merge(torch.cat((detail, context), 1)))


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return tokens + self.mix(self.norm(tokens)), None


class Transformer(nn.Module):
    """A vision transformer of 12 blocks with a class token and a linear head."""

    def __init__(self, patch: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.ModuleList(Block(8) for _ in range(12))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Conv2d(8, K, 1)

    def forward(self, images: Tensor) -> Any:
        patches = self.embed(images)
        cells = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat((self.token.expand(len(cells), -1, -1), cells), 1)
        for block in self.blocks:
            tokens = block(tokens)[0]
        cells = self.norm(tokens)[:, 1:].transpose(1, 2)
        return self.head(cells.unflatten(2, patches.shape[2:]))


class ChannelsLast(nn.Module):
    """Stages over [N, H, W, C]: linear maps and patch merging, as torchvision's Swin has them."""

    class Merge(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.mix = nn.Linear(4 * inputs, outputs)

        def forward(self, cells: Tensor) -> Tensor:
            corners = [cells[:, y::2, x::2] for y in (0, 1) for x in (0, 1)]
            mixed: Tensor = self.mix(torch.cat(corners, -1))
            return mixed

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 4, 4)
        merge = ChannelsLast.Merge
        self.features = nn.Sequential(
            nn.Sequential(nn.Linear(6, 6), nn.GELU()),
            merge(6, 8),
            nn.Sequential(nn.Linear(8, 8), nn.GELU()),
            merge(8, 10),
            nn.Sequential(nn.Linear(10, 10), nn.GELU()),
        )
        self.head = nn.Conv2d(10, K, 1)

    def forward(self, images: Tensor) -> Any:
        cells = self.features(self.patch(images).permute(0, 2, 3, 1))
        return self.head(cells.permute(0, 3, 1, 2))


def tapped(choice: TapChoice) -> list[tuple[str, int]]:
    return [(one.name, one.stride) for one in choice.maps]


CASES: list[tuple[nn.Module, list[tuple[str, int]]]] = [
    (
        Flat(),
        [("layer1", 2), ("layer2", 4), ("layer3", 4), ("layer4", 4)],
    ),
    (
        Unet(),
        [("encoder.relu", 2), ("encoder.layer1", 4), ("encoder.layer2", 8), ("encoder.layer3", 16)],
    ),
    (
        Wrapped(Unet()),
        [
            ("model.encoder.relu", 2),
            ("model.encoder.layer1", 4),
            ("model.encoder.layer2", 8),
            ("model.encoder.layer3", 16),
        ],
    ),
    (TwoPaths(), [("context.0", 2), ("context.1", 4), ("context.2", 8), ("context.3", 16)]),
    (Transformer(), [(f"blocks.{i}", 16) for i in (2, 5, 8, 11)]),
    (ChannelsLast(), [("features.0", 4), ("features.2", 8), ("features.4", 16)]),
    (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(True), nn.Dropout(), conv(4, 6, 2)
        ).append(nn.Conv2d(6, K, 1)),
        [("2", 2), ("4", 4)],
    ),
]


@pytest.mark.parametrize(("network", "expected"), CASES, ids=lambda value: type(value).__name__)
def test_taps_are_one_per_level_of_the_encoder(
    network: nn.Module, expected: list[tuple[str, int]]
) -> None:
    choice = choose_taps(network)
    assert choice.source == "traced"
    assert tapped(choice) == expected
    assert choice.names == tuple(name for name, _ in expected)
    assert len(choice.reasons) == len(expected)
    assert all(line.startswith(f"{n} (") for line, (n, _) in zip(choice.reasons, expected))  # noqa: B905


def test_the_reasons_say_what_follows_each_map() -> None:
    reasons = choose_taps(Unet()).reasons
    assert reasons[1] == (
        "encoder.layer1 (Sequential): the last map at stride 4, before the network goes to 8"
    )
    assert "at stride 16, before maps grow again: the decoder begins at decoder" in reasons[-1]
    assert choose_taps(Flat()).reasons[2] == "layer3 (Sequential): stage 2 of 3 at stride 4"
    assert choose_taps(Transformer()).reasons[0] == (
        "blocks.2 (Block): block 3 of 12 of one kind at one stride"
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_without_their_stages_the_networks_of_the_house_are_read_at_the_same_strides(
    name: str,
) -> None:
    network: Any = make_network(name, K, **SMALL[name])
    named = choose_taps(network)
    assert named.source == "stages"
    assert named.names == tuple(network.stages)
    del network.stages
    found = choose_taps(network)
    assert found.source == "traced"
    assert {one.stride for one in named.maps} <= {one.stride for one in found.maps}
    assert 2 <= len(found.names) <= 6
    strides = [one.stride for one in found.maps]
    assert strides == sorted(strides)


def test_a_map_that_is_overwritten_in_place_is_no_tap() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4))
    network = nn.Sequential(stem, nn.ReLU(inplace=True), conv(4, 4, 2), nn.Conv2d(4, K, 1))
    assert choose_taps(network).names == ("1", "2")
    with pytest.raises(UserError, match="tap '0' gives is overwritten in place"):
        given_taps(network, ["0"])


def test_a_network_without_an_encoder_is_told_to_name_its_taps() -> None:
    with pytest.raises(UserError, match=r"no feature map .* Sequential: pass taps=.* parts are 0"):
        choose_taps(nn.Sequential(nn.Conv2d(3, K, 1)))


@pytest.mark.parametrize("size", [(64, 96), (97, 131), (32, 32), (224, 160)])
@pytest.mark.parametrize("patch", [14, 16])
def test_tokens_are_read_as_the_map_they_stand_for(patch: int, size: tuple[int, int]) -> None:
    network = Transformer(patch).eval()
    choice = given_taps(network, ["norm", "head"])
    images = torch.randn(2, 3, *size)
    with collected(network, ["norm", "head"]) as outputs:
        network(images)
    cells = feature_map(outputs, "norm", choice.maps[0], size)
    logits = feature_map(outputs, "head", choice.maps[1], size)
    torch.testing.assert_close(network.head(cells), logits)


def test_maps_with_channels_last_are_read_with_channels_first() -> None:
    network = ChannelsLast().eval()
    (seen,) = given_taps(network, ["features"]).maps
    images = torch.randn(2, 3, 48, 80)
    with collected(network, ["features"]) as outputs:
        logits = network(images)
    found = feature_map(outputs, "features", seen, (48, 80))
    assert found.shape == (2, 10, 3, 5)
    torch.testing.assert_close(network.head(found), logits)


def test_tokens_that_make_no_grid_at_a_size_are_refused_by_name() -> None:
    (seen,) = given_taps(Transformer(), ["norm"]).maps
    with pytest.raises(UserError, match="tap 'norm' gives 23 tokens for images of 64x96"):
        feature_map({"norm": torch.zeros(2, 24, 8)}, "norm", seen, (64, 96))


@pytest.mark.parametrize(("network", "_taps"), CASES, ids=lambda value: type(value).__name__)
def test_any_network_trains_under_regulation_with_the_taps_that_were_found(
    network: nn.Module, _taps: object
) -> None:
    torch.manual_seed(0)
    regulated = SelfRegulation(network, K, settings=RegulationConfig(width=4))
    images, labels = torch.randn(2, 3, 48, 80), torch.randint(K, (2, 48, 80))
    found = regulated.losses(images, labels)
    assert torch.isfinite(found.total)
    found.total.backward()
    assert regulated.exits is not None
    for key, parameter in regulated.exits.named_parameters():
        assert parameter.grad is not None, key
    assert all(not module._forward_hooks for module in network.modules())


def test_a_foreign_networks_running_auxiliary_heads_are_its_own_exits() -> None:
    regulated = SelfRegulation(Flat(), K)
    assert regulated.auxiliary_heads == {"aux": AUXILIARY_WEIGHT}
    images, labels = torch.randn(2, 3, 48, 80), torch.randint(K, (2, 48, 80))
    assert "own" in regulated.losses(images, labels).terms
    # In evaluation this network leaves the head out: its loss has nothing to say then.
    assert "own" not in regulated.eval().losses(images, labels).terms


def test_own_exits_can_be_named_with_their_weights_or_left_out() -> None:
    network = Flat()
    assert SelfRegulation(network, K, auxiliary_heads={}).auxiliary_heads == {}
    assert SelfRegulation(network, K, auxiliary_heads={"aux": 1.0}).auxiliary_heads == {"aux": 1.0}
    wrong: list[tuple[Any, str]] = [
        ("all", "auxiliary_heads is 'all'"),
        ({"auxx": 1.0}, "no module 'auxx' to supervise as an own exit: did you mean 'aux'"),
        ({"aux": -1.0}, "'aux' has loss weight -1.0"),
        ({"layer1": 1.0}, "'layer1' of the network gives 4 logits .* classes is 3"),
        ({"pools.1": 1.0, "unused": 1.0}, "no module 'unused'"),
    ]
    for auxiliary_heads, message in wrong:
        classes = 3 if "classes is 3" in message else K
        network.head[2] = nn.Conv2d(4, classes, 1)
        with pytest.raises(UserError, match=message):
            SelfRegulation(network, classes, auxiliary_heads=auxiliary_heads)


class OneSize(nn.Module):
    """A learnt position per cell: 32 x 48 images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 4, 2), conv(4, 6, 2))
        self.position = nn.Parameter(torch.zeros(1, 6, 8, 12))
        self.head = nn.Conv2d(6, K, 1)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.body(images) + self.position)


def test_a_network_of_one_size_is_probed_at_that_size() -> None:
    with pytest.raises(UserError, match="64x96.*probe_size"):
        SelfRegulation(OneSize(), K)
    regulated = SelfRegulation(OneSize(), K, probe_size=(32, 48))
    assert regulated.taps == ("body.0", "body.1")
    labels = torch.zeros(2, 32, 48, dtype=torch.uint8)
    assert torch.isfinite(regulated.losses(torch.randn(2, 3, 32, 48), labels).total)


def test_an_exit_of_a_single_cell_is_refused_in_training_and_fine_in_evaluation() -> None:
    regulated = SelfRegulation(Transformer(), K, taps=["blocks.5", "norm"])
    images, labels = torch.randn(1, 3, 16, 16), torch.zeros(1, 16, 16, dtype=torch.uint8)
    with pytest.raises(UserError, match="exit at 'blocks.5' a single cell.*batch of 2 or more"):
        regulated.losses(images, labels)
    assert torch.isfinite(regulated.eval().losses(images, labels).total)
