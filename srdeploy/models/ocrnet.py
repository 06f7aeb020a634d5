"""OCRNet: every pixel is described anew by the regions of the classes that it resembles.

A coarse segmentation, supervised in training, gathers one vector per class from the pixels it
gives to that class; each pixel attends to these K region vectors. Source: Yuan et al.,
"Object-Contextual Representations for Semantic Segmentation", ECCV 2020 (arXiv 1909.11065).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from srdeploy.models.hrnet import MODULES, HRNetBackbone, joint_head, raised
from srdeploy.models.initialisation import check_width, initialise, initialise_logits
from srdeploy.models.resnet import ResNet

COARSE_WEIGHT = 0.4
"""Weight of the coarse segmentation's loss, the authors'."""

DROPOUT = 0.05
"""Share of the channels that the head drops in training, the authors'."""


def conv_relu(inputs: int, outputs: int, size: int = 1, bias: bool = True) -> list[nn.Module]:
    """Convolution of `size` x `size` that keeps the grid, BatchNorm, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def gather_regions(coarse: Tensor, pixels: Tensor) -> Tensor:
    """Coarse logits [N, K, h, w] and pixels [N, C, h, w] -> one vector per class [N, C, K, 1].

    Each is the mean of all pixels, weighted by the softmax of its class over the picture. A network
    in float16 takes it in float32: the weights of a large picture are about 1e-5 each, less than
    float16 holds with its full digits. (bfloat16, which training may use, has the range.)
    """
    weights = coarse.float().flatten(2).softmax(2)
    regions = pixels.float().flatten(2) @ weights.transpose(1, 2)
    return regions.unsqueeze(3).to(pixels.dtype)


class RegionAttention(nn.Module):
    """Pixels [N, C, h, w], regions [N, C, K, 1] -> each pixel's context [N, C, h, w].

    Keys of `keys` channels; the softmax runs over the K regions. `bias`: in the 1x1 convolutions.
    """

    def __init__(self, channels: int, keys: int, bias: bool) -> None:
        super().__init__()
        self.query = nn.Sequential(
            *conv_relu(channels, keys, bias=bias), *conv_relu(keys, keys, bias=bias)
        )
        self.key = nn.Sequential(
            *conv_relu(channels, keys, bias=bias), *conv_relu(keys, keys, bias=bias)
        )
        self.value = nn.Sequential(*conv_relu(channels, keys, bias=bias))
        self.out = nn.Sequential(*conv_relu(keys, channels, bias=bias))
        self.scale = keys**-0.5

    def forward(self, pixels: Tensor, regions: Tensor) -> Tensor:
        query = self.query(pixels)
        # The small factor is scaled, before the product can leave float16's range; and the pixels
        # stay the last axis, so that no large map is transposed.
        key = self.key(regions).flatten(2).transpose(1, 2) * self.scale
        shares = (key @ query.flatten(2)).softmax(1)
        context = self.value(regions).flatten(2) @ shares
        output: Tensor = self.out(context.reshape(query.shape))
        return output


class OCRNet(nn.Module):
    """images float32 [N, 3, H, W] -> logits float32 [N, K, H, W], any H, W >= 32.

    `coarse_head` gives the coarse logits [N, K, h, w] that gather the regions: it is supervised in
    training (`auxiliary_heads`) and needed at inference. On HRNet both heads read the joined
    branches, at stride 4; on a ResNet, of output stride 8, the coarse one reads layer3 and the
    other layer4. `middle` is the heads' channel count; keys have half as many.
    """

    def __init__(
        self,
        backbone: HRNetBackbone | ResNet,
        stages: Sequence[str],
        coarse_head: nn.Sequential,
        classes: int,
        middle: int,
        bias: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.coarse_head = coarse_head
        self.pixel_head = nn.Sequential(*conv_relu(backbone.channels, middle, 3))
        self.attention = RegionAttention(middle, max(1, middle // 2), bias)
        self.merge = nn.Sequential(*conv_relu(2 * middle, middle, bias=bias), nn.Dropout2d(DROPOUT))
        self.classifier = nn.Conv2d(middle, classes, 1)
        self.stages = tuple(f"backbone.{stage}" for stage in stages)
        self.auxiliary_heads = {"coarse_head": COARSE_WEIGHT}
        for part in (self.pixel_head, self.attention, self.merge):
            initialise(part)
        initialise_logits(self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.backbone, ResNet):
            shallow, deep = self.backbone.last_two(images)
        else:
            shallow = deep = self.backbone(images)
        pixels = self.pixel_head(deep)
        regions = gather_regions(self.coarse_head(shallow), pixels)
        context = self.attention(pixels, regions)
        logits = self.classifier(self.merge(torch.cat((context, pixels), 1)))
        return raised(logits, *images.shape[-2:])


def ocrnet_hrnet_w18(
    classes: int,
    *,
    width: int = 18,
    middle: int = 512,
    blocks: int = 4,
    modules: Sequence[int] = MODULES,
) -> OCRNet:
    """OCRNet on HRNetV2-W18. `middle`: channels of the heads, keys having half as many; the other
    options are `hrnet_w18`'s."""
    return _on_hrnet(HRNetBackbone(width, blocks, modules), classes, middle)


def ocrnet_hrnet_w48(
    classes: int,
    *,
    width: int = 48,
    middle: int = 512,
    blocks: int = 4,
    modules: Sequence[int] = MODULES,
) -> OCRNet:
    """OCRNet on HRNetV2-W48, with the options of `ocrnet_hrnet_w18`."""
    return _on_hrnet(HRNetBackbone(width, blocks, modules), classes, middle)


def ocrnet_resnet101(
    classes: int, *, width: int = 64, middle: int = 512, deep_stem: bool = False
) -> OCRNet:
    """OCRNet on ResNet-101 at output stride 8. `deep_stem`: three 3x3 convolutions in place of the
    7x7 one. `middle`: channels of the heads. ImageNet weights: width 64 without deep_stem only."""
    check_width(middle, "middle")
    backbone = ResNet("resnet101", 8, width=width, deep_stem=deep_stem)
    last = nn.Conv2d(middle, classes, 1)
    coarse_head = nn.Sequential(
        *conv_relu(backbone.channels // 2, middle, 3), nn.Dropout2d(DROPOUT), last
    )
    initialise(coarse_head)
    initialise_logits(last)
    stages = ("relu", "layer1", "layer2", "layer3")
    return OCRNet(backbone, stages, coarse_head, classes, middle, bias=True)


def _on_hrnet(backbone: HRNetBackbone, classes: int, middle: int) -> OCRNet:
    check_width(middle, "middle")
    coarse_head = joint_head(backbone.channels, classes)
    return OCRNet(backbone, backbone.stages, coarse_head, classes, middle, bias=False)
