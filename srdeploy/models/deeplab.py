"""DeepLab-v2 on ResNet or MobileNetV2, without CRF and multi-scale inputs.

Source: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous
Convolution, and Fully Connected CRFs", TPAMI 2018 (arXiv 1606.00915), model DeepLab-ASPP-L.
"""

from torch import Tensor, nn
from torch.nn import functional

from srdeploy.errors import UserError
from srdeploy.models.initialisation import initialise_logits
from srdeploy.models.mobilenet import MobileNetV2
from srdeploy.models.resnet import ResNet

OUTPUT_STRIDES = (8, 16)


class AtrousHead(nn.Module):
    """The sum of four dilated 3x3 convolutions: features [N, C, h, w] -> logits [N, K, h, w].

    The paper's dilations 6, 12, 18 and 24 belong to output stride 8; at stride 16 they are halved,
    so that the head sees the same part of the image.
    """

    def __init__(self, channels: int, classes: int, output_stride: int) -> None:
        super().__init__()
        dilations = [rate * 8 // output_stride for rate in (6, 12, 18, 24)]
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, classes, 3, padding=dilation, dilation=dilation)
            for dilation in dilations
        )
        for branch in self.branches:
            assert isinstance(branch, nn.Conv2d)
            initialise_logits(branch)

    def forward(self, features: Tensor) -> Tensor:
        # Added one by one: stacking them would copy all four maps, in the exported graph too.
        logits: Tensor = self.branches[0](features)
        for branch in self.branches[1:]:
            logits = logits + branch(features)
        return logits


class DeepLabV2(nn.Module):
    """images float32 [N, 3, H, W] -> logits float32 [N, K, H, W], any H, W >= 32.

    `stages` names the sub-modules, shallow to deep, that emit one feature tensor each per forward
    pass; the network's own logits are the last exit and are not listed. `auxiliary_heads` is empty:
    no head is for training only.
    """

    def __init__(
        self,
        backbone: ResNet | MobileNetV2,
        stages: tuple[str, ...],
        classes: int,
        output_stride: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = AtrousHead(backbone.channels, classes, output_stride)
        self.stages = tuple(f"backbone.{stage}" for stage in stages)
        self.auxiliary_heads: dict[str, float] = {}

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(self.backbone(images))
        return functional.interpolate(
            logits, size=images.shape[-2:], mode="bilinear", align_corners=False
        )


def deeplabv2_resnet18(classes: int, *, output_stride: int = 16, width: int = 64) -> DeepLabV2:
    """DeepLab-v2 on ResNet-18. `output_stride`: 8 (finer, about three times the work) or 16.
    `width`: the backbone's first channels; ImageNet weights: 64 only."""
    return _on_resnet("resnet18", classes, output_stride, width)


def deeplabv2_resnet50(classes: int, *, output_stride: int = 16, width: int = 64) -> DeepLabV2:
    """DeepLab-v2 on ResNet-50, with the options of `deeplabv2_resnet18`."""
    return _on_resnet("resnet50", classes, output_stride, width)


def deeplabv2_resnet101(classes: int, *, output_stride: int = 16, width: int = 64) -> DeepLabV2:
    """DeepLab-v2 on ResNet-101, the paper's backbone; its own output stride is 8. Options as
    `deeplabv2_resnet18`."""
    return _on_resnet("resnet101", classes, output_stride, width)


def deeplabv2_mobilenetv2(
    classes: int, *, output_stride: int = 16, width_mult: float = 1.0
) -> DeepLabV2:
    """DeepLab-v2 on MobileNetV2. `width_mult` scales its channels; ImageNet weights: 1.0 only."""
    _check_output_stride(output_stride)
    if isinstance(width_mult, bool) or not isinstance(width_mult, int | float) or width_mult <= 0:
        raise UserError(f"width_mult is {width_mult!r}: a number above 0 is needed, e.g. 0.5")
    backbone = MobileNetV2(output_stride, width_mult)
    # The last blocks at strides 2, 4, 8 and 16 of the undilated network.
    stages = ("features.1", "features.3", "features.6", "features.13")
    return DeepLabV2(backbone, stages, classes, output_stride)


def _on_resnet(architecture: str, classes: int, output_stride: int, width: int) -> DeepLabV2:
    _check_output_stride(output_stride)
    backbone = ResNet(architecture, output_stride, width=width)
    return DeepLabV2(backbone, ("relu", "layer1", "layer2", "layer3"), classes, output_stride)


def _check_output_stride(output_stride: int) -> None:
    if isinstance(output_stride, bool) or output_stride not in OUTPUT_STRIDES:
        raise UserError(f"output_stride is {output_stride!r}: 8 and 16 are built")
