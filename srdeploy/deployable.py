"""The deployed graph as a module: pre-processing, the plain network, post-processing.

Training normalises with `Normalise`, the torch runtime runs `Deployable`, and export traces the
same `Deployable`: there is no second implementation that could differ.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.outputs import main_logits, resize_logits
from srdeploy.spec import Spec

InputKind = Literal["uint8", "float32"]
OutputKind = Literal["labels", "logits", "both"]


class Normalise(nn.Module):
    """images uint8 [N, H, W, 3] RGB -> float32 [N, 3, H, W], normalised and in the network's
    colour order."""

    scale: Tensor
    offset: Tensor

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        mean = torch.tensor(spec.mean, dtype=torch.float64)
        std = torch.tensor(spec.std, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("offset", (-mean / std).float(), persistent=False)
        self.swap = spec.colour_order == "BGR"

    def forward(self, images: Tensor) -> Tensor:
        values = images.to(torch.float32) * self.scale + self.offset
        if self.swap:
            values = values.flip(-1)
        return values.permute(0, 3, 1, 2)


def pad_images(images: Tensor, multiple: int) -> Tensor:
    """images float32 [N, 3, H, W], normalised, with zeros (the mean colour) at the bottom and
    right, so that `multiple` divides height and width."""
    if multiple == 1:
        return images
    margin = multiple - 1
    # Not -(-side // multiple): ONNX divides towards zero.
    height, width = ((side + margin) // multiple * multiple for side in images.shape[2:])
    # A constant margin, then a cut: a tracer would fix a margin that depends on the size to the
    # example's.
    return functional.pad(images, (0, margin, 0, margin))[:, :, :height, :width]


def cut_logits(logits: Tensor, size: tuple[int, int], multiple: int) -> Tensor:
    """Logits [N, K, h, w] of padded images as [N, K, H, W] at the images' own `size` (H, W).

    They are resized to the padded size first, so that every logit stays where its pixel is.
    """
    if multiple == 1:
        return resize_logits(logits, size)
    height, width = ((side + multiple - 1) // multiple * multiple for side in size)
    return resize_logits(logits, (height, width))[:, :, : size[0], : size[1]]


class Deployable(nn.Module):
    """What is deployed: uint8 images in, uint8 labels out, by default.

    images: uint8 [N, H, W, 3] RGB, or float32 [N, 3, H, W] already normalised (input="float32").
    Returns labels uint8 [N, H, W]; or logits float32 [N, K, H, W]; or both as a tuple (labels,
    logits). Any H, W from spec.input.smallest: where the network takes only
    multiples of spec.input.multiple, the image is padded and the result cropped in here.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: Spec,
        input: InputKind = "uint8",
        output: OutputKind = "labels",
    ) -> None:
        super().__init__()
        self.network = network
        self.normalise: nn.Module = Normalise(spec) if input == "uint8" else nn.Identity()
        self.input = input
        self.output = output
        self.multiple = spec.input.multiple

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        height, width = images.shape[1:3] if self.input == "uint8" else images.shape[2:4]
        logits = main_logits(self.network(pad_images(self.normalise(images), self.multiple)))
        logits = cut_logits(logits, (height, width), self.multiple)
        if self.output == "logits":
            return logits
        labels = logits.argmax(1).to(torch.uint8)
        return labels if self.output == "labels" else (labels, logits)
