"""ResNet-18, -50 and -101 without their classifier, dilated to output stride 8 or 16.

Parameter names are torchvision's, so that its weight files load. As there, a bottleneck's stride
sits in its 3x3 convolution ("v1.5"). Source: He et al., "Deep Residual Learning for Image
Recognition", CVPR 2016.
"""

from torch import Tensor, nn

from srdeploy.errors import UserError
from srdeploy.models.initialisation import check_width, initialise


def conv3x3(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias, padded so that stride 1 keeps the size."""
    return nn.Conv2d(
        inputs, outputs, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, with one of `dilations` each, and a shortcut: ResNet-18's block."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilations: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride, dilations[0])
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, dilation=dilations[1])
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = shortcut(inputs, width * self.expansion, stride)

    def forward(self, features: Tensor) -> Tensor:
        identity = features if self.downsample is None else self.downsample(features)
        hidden = self.relu(self.bn1(self.conv1(features)))
        output: Tensor = self.relu(self.bn2(self.conv2(hidden)) + identity)
        return output


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride and dilations[0]), 1x1 to four times the width, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, dilations: tuple[int, int]) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride, dilations[0])
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, features: Tensor) -> Tensor:
        identity = features if self.downsample is None else self.downsample(features)
        hidden = self.relu(self.bn1(self.conv1(features)))
        hidden = self.relu(self.bn2(self.conv2(hidden)))
        output: Tensor = self.relu(self.bn3(self.conv3(hidden)) + identity)
        return output


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """The projection where a block changes width or grid; None where the identity fits.

    A layer whose stride was turned into dilation still changes width, so its file's weights have a
    place.
    """
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
    )


RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}
"""Block and blocks per layer, by architecture."""


class ResNet(nn.Module):
    """images float32 [N, 3, H, W] -> features float32 [N, C, h, w]; `output_stride` 8, 16 or 32.

    Where a stride is left out, later convolutions are dilated instead. The convolution that had the
    stride keeps the dilation before it, and the ones after it double theirs: sampled on the strided
    network's grid, the features are then exactly the strided network's, which is what the
    pretrained weights were trained for. (DeepLab-v2's Caffe model dilates whole layers: its stride
    sits in the 1x1 before the 3x3.)

    The max-pool uses ceil mode as DeepLab-v2's does: at even sizes the border pixels get a sample
    of their own and are not left to extrapolation. Inside the image both modes give the same
    values.

    `width` is the channel count of the stem and of layer1's inner convolutions. `deep_stem` puts
    three 3x3 convolutions (width, width, 2 * width) in place of the 7x7 one.
    """

    def __init__(
        self,
        architecture: str,
        output_stride: int = 32,
        *,
        width: int = 64,
        deep_stem: bool = False,
    ) -> None:
        super().__init__()
        check_width(width)
        if not isinstance(deep_stem, bool):
            raise UserError(f"deep_stem is {deep_stem!r}: true or false is needed")
        self.architecture = _called(architecture, width, deep_stem)
        block, depths = RESNETS[architecture]
        inputs = 2 * width if deep_stem else width
        self.conv1 = _deep_stem(width) if deep_stem else _stem(width)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        reached, dilation = 4, 1
        layers = []
        for position, depth in enumerate(depths):
            stride = 1 if position == 0 or reached >= output_stride else 2
            first = dilation
            if position > 0:
                dilation, reached = (
                    (dilation, reached * 2) if stride == 2 else (dilation * 2, reached)
                )
            planes = width * 2**position
            blocks: list[nn.Module] = [block(inputs, planes, stride, (first, dilation))]
            inputs = planes * block.expansion
            blocks += [block(inputs, planes, 1, (dilation, dilation)) for _ in range(1, depth)]
            layers.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.channels = inputs
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.last_two(images)[1]

    def last_two(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features [N, C / 2, h, w] of layer3 and [N, C, h', w'] of layer4."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        third = self.layer3(self.layer2(self.layer1(features)))
        return third, self.layer4(third)


def _stem(width: int) -> nn.Conv2d:
    return nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)


def _deep_stem(width: int) -> nn.Sequential:
    """Three 3x3 convolutions in place of the 7x7 one, to twice the channels."""
    return nn.Sequential(
        conv3x3(3, width, 2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        conv3x3(width, width),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        conv3x3(width, 2 * width),
    )


def _called(architecture: str, width: int, deep_stem: bool) -> str:
    """The name that finds weight files: only the plain form has torchvision's shapes."""
    name = architecture if width == 64 else f"{architecture} of width {width}"
    return f"{name} with a deep stem" if deep_stem else name
