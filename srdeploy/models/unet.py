"""U-Net with BatchNorm and padded convolutions, so that logits have the image's size.

Source: Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation",
MICCAI 2015 (arXiv 1505.04597).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.models.initialisation import check_width, initialise, initialise_logits


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Twice 3x3 convolution without bias, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Up(nn.Module):
    """Doubles the grid of [N, C, h, w], pads to the skip's size, merges both to C / 2 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)
        self.conv = double_conv(channels, channels // 2)

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        raised = self.up(features)
        # Pooling drops the last row or column of an odd size; zeros take its place.
        below = skip.shape[-2] - raised.shape[-2]
        right = skip.shape[-1] - raised.shape[-1]
        raised = functional.pad(raised, (0, right, 0, below))
        merged: Tensor = self.conv(torch.cat((skip, raised), 1))
        return merged


class UNet(nn.Module):
    """images float32 [N, 3, H, W] -> logits float32 [N, K, H, W], any H, W >= 32.

    `width` is the channel count of the first stage; it doubles with each of the four stages below.
    `stages` names the encoder's stages, the lowest included, each emitting its feature map before
    pooling. `auxiliary_heads` is empty.
    """

    def __init__(self, classes: int, *, width: int = 64) -> None:
        super().__init__()
        check_width(width)
        channels = [width * 2**i for i in range(5)]
        self.encoder = nn.ModuleList(
            double_conv(inputs, outputs)
            for inputs, outputs in zip([3, *channels], channels, strict=False)
        )
        self.decoder = nn.ModuleList(Up(count) for count in reversed(channels[1:]))
        self.classifier = nn.Conv2d(width, classes, 1)
        self.stages = tuple(f"encoder.{i}" for i in range(5))
        self.auxiliary_heads: dict[str, float] = {}
        initialise(self)
        initialise_logits(self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder[0](images)
        skips = []
        for stage in list(self.encoder)[1:]:
            skips.append(features)
            features = stage(functional.max_pool2d(features, 2))
        for up, skip in zip(self.decoder, reversed(skips), strict=True):
            features = up(features, skip)
        logits: Tensor = self.classifier(features)
        return logits
