"""HRNetV2: branches at strides 4, 8, 16 and 32 that run side by side and exchange their maps.

Module names below `backbone` follow the authors' code and timm's (conv1, layer1, transition1,
stage2, ...), so that their ImageNet files have a place to go; no such file has been tried. One
difference: maps are raised bilinearly with half-pixel centres, where the authors' segmentation code
leaves align_corners to its configuration and timm takes the nearest cell.
Source: Wang et al., "Deep High-Resolution Representation Learning for Visual Recognition",
TPAMI 2020 (arXiv 1908.07919).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.errors import UserError
from srdeploy.models.initialisation import check_width, initialise, initialise_logits
from srdeploy.models.resnet import BasicBlock, Bottleneck, conv3x3

MODULES = (1, 4, 3)
"""Exchanges in stages 2, 3 and 4."""

STEM = 64
"""Channels of the stem, and of the inner convolutions of stage 1."""


def raised(features: Tensor, height: int, width: int) -> Tensor:
    """[N, C, h, w] -> [N, C, height, width], bilinear with half-pixel centres."""
    return functional.interpolate(
        features, size=(height, width), mode="bilinear", align_corners=False
    )


def conv_bn(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    """3x3 convolution without bias, and BatchNorm."""
    return [conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)]


class Transition(nn.ModuleList):
    """k maps -> k or k + 1 maps of `widths` channels; a new one has half the last one's grid."""

    def __init__(self, before: Sequence[int], widths: Sequence[int]) -> None:
        paths: list[nn.Module] = []
        for position, width in enumerate(widths):
            if position >= len(before):
                # Nested twice for the names' sake: the sources allow several halvings here.
                step = nn.Sequential(*conv_bn(before[-1], width, 2), nn.ReLU())
                paths.append(nn.Sequential(step))
            elif before[position] != width:
                paths.append(nn.Sequential(*conv_bn(before[position], width, 1), nn.ReLU()))
            else:
                paths.append(nn.Identity())
        super().__init__(paths)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [path(maps[min(i, len(maps) - 1)]) for i, path in enumerate(self)]


class Fusion(nn.ModuleList):
    """All branches' maps -> branch `target`'s next map [N, C, h, w]: the ReLU of their sum.

    Lower branches come through a 1x1 convolution and are raised to the target's grid, higher ones
    through a chain of 3x3 convolutions of stride 2, whose grids are the branches' own: ceil halves.
    """

    def __init__(self, widths: Sequence[int], target: int) -> None:
        super().__init__(fusion_path(widths, source, target) for source in range(len(widths)))
        self.target = target

    def forward(self, maps: list[Tensor]) -> Tensor:
        height, width = maps[self.target].shape[-2:]
        parts = [
            raised(path(one), height, width) if source > self.target else path(one)
            for source, (path, one) in enumerate(zip(self, maps, strict=True))
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.relu()


def fusion_path(widths: Sequence[int], source: int, target: int) -> nn.Module:
    """The layers from branch `source` to branch `target`, without the upsampling of lower ones."""
    if source == target:
        return nn.Identity()
    if source > target:
        convolution = nn.Conv2d(widths[source], widths[target], 1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(widths[target]))
    steps: list[nn.Module] = [
        nn.Sequential(*conv_bn(widths[source], widths[source], 2), nn.ReLU())
        for _ in range(target - source - 1)
    ]
    return nn.Sequential(*steps, nn.Sequential(*conv_bn(widths[source], widths[target], 2)))


class HighResolutionModule(nn.Module):
    """`blocks` residual blocks per branch, then one exchange between all branches."""

    def __init__(self, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(width, width, 1, (1, 1)) for _ in range(blocks)))
            for width in widths
        )
        self.fuse_layers = nn.ModuleList(Fusion(widths, i) for i in range(len(widths)))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        worked = [branch(one) for branch, one in zip(self.branches, maps, strict=True)]
        return [fuse(worked) for fuse in self.fuse_layers]


class HRNetBackbone(nn.Module):
    """images float32 [N, 3, H, W] -> features float32 [N, 15 * width, ceil(H/4), ceil(W/4)].

    The features are the four branches' maps on the highest branch's grid. `stages` names the stem
    and stages 1 to 4: of stages 2 to 4 the last exchange into the highest branch, which has read
    all branches of the stage, so every one of them has stride 4.
    """

    def __init__(self, width: int, blocks: int = 4, modules: Sequence[int] = MODULES) -> None:
        super().__init__()
        check_width(width)
        check_depth(blocks, modules)
        self.architecture = f"hrnet-w{width}"
        self.conv1, self.bn1 = conv3x3(3, STEM, 2), nn.BatchNorm2d(STEM)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = conv3x3(STEM, STEM, 2), nn.BatchNorm2d(STEM)
        self.relu2 = nn.ReLU()
        first = STEM * Bottleneck.expansion
        self.layer1 = nn.Sequential(
            *(Bottleneck(first if i else STEM, STEM, 1, (1, 1)) for i in range(blocks))
        )
        widths = [width * 2**i for i in range(4)]
        self.transition1 = Transition([first], widths[:2])
        self.stage2 = exchanges(widths[:2], blocks, modules[0])
        self.transition2 = Transition(widths[:2], widths[:3])
        self.stage3 = exchanges(widths[:3], blocks, modules[1])
        self.transition3 = Transition(widths[:3], widths)
        self.stage4 = exchanges(widths, blocks, modules[2])
        self.channels = sum(widths)
        ends = (f"stage{i}.{count - 1}.fuse_layers.0" for i, count in enumerate(modules, 2))
        self.stages = ("relu2", "layer1", *ends)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.relu1(self.bn1(self.conv1(images)))
        stem = self.relu2(self.bn2(self.conv2(stem)))
        maps = self.stage2(self.transition1([self.layer1(stem)]))
        maps = self.stage3(self.transition2(maps))
        maps = self.stage4(self.transition3(maps))
        height, width = maps[0].shape[-2:]
        return torch.cat([maps[0], *(raised(one, height, width) for one in maps[1:])], 1)


def exchanges(widths: Sequence[int], blocks: int, count: int) -> nn.Sequential:
    """One stage: `count` modules over branches of `widths` channels."""
    return nn.Sequential(*(HighResolutionModule(widths, blocks) for _ in range(count)))


class HRNet(nn.Module):
    """images float32 [N, 3, H, W] -> logits float32 [N, K, H, W], any H, W >= 32.

    Logits are computed at stride 4. `auxiliary_heads` is empty: no head is for training only.
    """

    def __init__(self, backbone: HRNetBackbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.last_layer = joint_head(backbone.channels, classes)
        self.stages = tuple(f"backbone.{stage}" for stage in backbone.stages)
        self.auxiliary_heads: dict[str, float] = {}

    def forward(self, images: Tensor) -> Tensor:
        logits = self.last_layer(self.backbone(images))
        return raised(logits, *images.shape[-2:])


def joint_head(channels: int, classes: int) -> nn.Sequential:
    """1x1 convolution that keeps the channels, BatchNorm, ReLU, 1x1 convolution to the logits."""
    last = nn.Conv2d(channels, classes, 1)
    head = nn.Sequential(
        nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(), last
    )
    initialise(head)
    initialise_logits(last)
    return head


def check_depth(blocks: object, modules: object) -> None:
    """Raises UserError where these are no counts: `blocks` one, `modules` three, from 1."""
    if not _is_count(blocks):
        raise UserError(f"blocks is {blocks!r}: a whole number from 1 is needed, e.g. 4")
    given = list(modules) if isinstance(modules, Iterable) else []
    if len(given) != len(MODULES) or not all(_is_count(count) for count in given):
        raise UserError(
            f"modules is {modules!r}: three whole numbers from 1 are needed, for stages 2, 3 and "
            "4, e.g. [1, 4, 3]"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def hrnet_w18(
    classes: int, *, width: int = 18, blocks: int = 4, modules: Sequence[int] = MODULES
) -> HRNet:
    """HRNetV2-W18. `width`: channels of the branch at stride 4; the lower ones have 2, 4 and 8
    times as many. `blocks`: residual blocks per branch between exchanges, and in stage 1.
    `modules`: exchanges in stages 2, 3 and 4; blocks=2, modules=[1, 3, 2] is the small W18."""
    return HRNet(HRNetBackbone(width, blocks, modules), classes)


def hrnet_w32(
    classes: int, *, width: int = 32, blocks: int = 4, modules: Sequence[int] = MODULES
) -> HRNet:
    """HRNetV2-W32, with the options of `hrnet_w18`."""
    return HRNet(HRNetBackbone(width, blocks, modules), classes)


def hrnet_w48(
    classes: int, *, width: int = 48, blocks: int = 4, modules: Sequence[int] = MODULES
) -> HRNet:
    """HRNetV2-W48, with the options of `hrnet_w18`."""
    return HRNet(HRNetBackbone(width, blocks, modules), classes)
