"""SegNet: VGG16's convolutions, and a decoder that unpools with the encoder's pooling choices.

Source: Badrinarayanan et al., "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation", TPAMI 2017 (arXiv 1511.00561).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.models.initialisation import check_width, initialise, initialise_logits


@dataclass(frozen=True)
class Choice:
    """Which pixel of every 2x2 window was the maximum; on ties the first in reading order."""

    lower: Tensor
    """bool [N, C, h, w]: the maximum is in the window's second row."""
    right: Tensor
    """bool [N, C, h, w]: the maximum is in the window's second column."""
    height: int
    width: int
    """Size of the pooled map before pooling."""


def pool_2x2(features: Tensor) -> tuple[Tensor, Choice]:
    """2x2 max-pool, stride 2, ceil mode: [N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)], choices.

    `features` must not be negative (they come from a ReLU): the zeros that pad odd sizes then never
    win. Equal to max_pool2d(return_indices=True), but only of comparisons and selections: TensorRT
    has neither MaxPool's indices nor MaxUnpool, and CUDA's max_unpool2d is not deterministic. Two
    bools take the place of an int64 index.
    """
    height, width = features.shape[-2:]
    padded = functional.pad(features, (0, 1, 0, 1))
    upper_left, upper_right = padded[..., :-1:2, :-1:2], padded[..., :-1:2, 1::2]
    lower_left, lower_right = padded[..., 1::2, :-1:2], padded[..., 1::2, 1::2]
    right_of_upper, right_of_lower = upper_right > upper_left, lower_right > lower_left
    upper = torch.where(right_of_upper, upper_right, upper_left)
    lower = torch.where(right_of_lower, lower_right, lower_left)
    is_lower = lower > upper
    # torch.where of bools would need an operator that onnxruntime lacks.
    right = (is_lower & right_of_lower) | (~is_lower & right_of_upper)
    return torch.where(is_lower, lower, upper), Choice(is_lower, right, height, width)


def unpool_2x2(features: Tensor, choice: Choice) -> Tensor:
    """Puts every value of [N, C, h, w] back where `choice` says, zeros elsewhere: [N, C, H, W]."""
    zero = features.new_zeros(())
    upper = torch.where(choice.lower, zero, features)
    lower = torch.where(choice.lower, features, zero)
    corners = [
        torch.where(choice.right, zero, upper),
        torch.where(choice.right, upper, zero),
        torch.where(choice.right, zero, lower),
        torch.where(choice.right, lower, zero),
    ]
    spread = functional.pixel_shuffle(torch.stack(corners, 2).flatten(1, 2), 2)
    return spread[..., : choice.height, : choice.width]


def conv_stage(*channels: int) -> nn.Sequential:
    """3x3 convolution, BatchNorm and ReLU from each of the channel counts to the next."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(channels, channels[1:], strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class SegNet(nn.Module):
    """images float32 [N, 3, H, W] -> logits float32 [N, K, H, W], any H, W >= 32.

    `width` is the channel count of the first stage; the later ones have 2, 4, 8 and 8 times as
    many. `stages` names the encoder's stages, each emitting its feature map before pooling.
    `auxiliary_heads` is empty.
    """

    def __init__(self, classes: int, *, width: int = 64) -> None:
        super().__init__()
        check_width(width)
        a, b, c, d = width, 2 * width, 4 * width, 8 * width
        self.encoder = nn.ModuleList(
            [
                conv_stage(3, a, a),
                conv_stage(a, b, b),
                conv_stage(b, c, c, c),
                conv_stage(c, d, d, d),
                conv_stage(d, d, d, d),
            ]
        )
        self.decoder = nn.ModuleList(
            [
                conv_stage(d, d, d, d),
                conv_stage(d, d, d, c),
                conv_stage(c, c, c, b),
                conv_stage(b, b, a),
                conv_stage(a, a),
            ]
        )
        self.classifier = nn.Conv2d(a, classes, 3, padding=1)
        self.stages = tuple(f"encoder.{i}" for i in range(5))
        self.auxiliary_heads: dict[str, float] = {}
        initialise(self)
        initialise_logits(self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        features, choices = images, []
        for stage in self.encoder:
            features, choice = pool_2x2(stage(features))
            choices.append(choice)
        for stage, choice in zip(self.decoder, reversed(choices), strict=True):
            features = stage(unpool_2x2(features, choice))
        logits: Tensor = self.classifier(features)
        return logits
