"""MobileNetV2 without its classifier, dilated to output stride 8 or 16.

Parameter names are torchvision's, so that its weight files load. Source: Sandler et al.,
"MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
"""

from torch import Tensor, nn

from srdeploy.models.initialisation import initialise

LAYOUT = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks and stride of each group; the paper's table 2."""


def conv_bn_relu6(
    inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU6; the output keeps the input's grid."""
    padding = (kernel - 1) // 2 * dilation
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1; the input is added where grid and width stay."""

    def __init__(
        self, inputs: int, outputs: int, expansion: int, stride: int, dilation: int, add: bool
    ) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [conv_bn_relu6(inputs, hidden, 1)]
        layers += [
            conv_bn_relu6(hidden, hidden, 3, stride, dilation, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.add = add

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.conv(features)
        return features + output if self.add else output


def rounded_channels(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and never more than a tenth below `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class MobileNetV2(nn.Module):
    """images float32 [N, 3, H, W] -> features float32 [N, C, h, w].

    `output_stride` is 8, 16 or 32. Ends with the 320-channel block (times `width_mult`): the
    convolution to 1280 channels that follows it for classification (features.18) would make the
    head four times as expensive, and is left out. The depthwise convolution that had a left-out
    stride keeps the dilation before it, later ones double theirs: sampled on the strided network's
    grid, the features are exactly the strided network's.
    """

    def __init__(self, output_stride: int = 32, width_mult: float = 1.0) -> None:
        super().__init__()
        self.architecture = "mobilenet_v2" + ("" if width_mult == 1.0 else f" x{width_mult:g}")
        inputs = rounded_channels(32 * width_mult)
        features: list[nn.Module] = [conv_bn_relu6(3, inputs, 3, stride=2)]
        reached, dilation = 2, 1
        for expansion, channels, blocks, group_stride in LAYOUT:
            outputs = rounded_channels(channels * width_mult)
            for position in range(blocks):
                wanted = group_stride if position == 0 else 1
                stride = wanted if reached < output_stride else 1
                # Where a stride is left out the input is still not added: weights trained with
                # the stride never saw that sum.
                add = wanted == 1 and inputs == outputs
                features.append(InvertedResidual(inputs, outputs, expansion, stride, dilation, add))
                reached *= stride
                dilation *= wanted // stride
                inputs = outputs
        self.features = nn.Sequential(*features)
        self.channels = inputs
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.features(images)
        return output
