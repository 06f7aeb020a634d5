"""The deployed graph as a module: pre-processing, the plain network, post-processing.

Training normalises with `Normalise`, the torch runtime runs `Deployable`, and export traces the
same `Deployable`: there is no second implementation that could differ.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.outputs import main_logits
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


class Deployable(nn.Module):
    """What is deployed: uint8 images in, uint8 labels out, by default.

    images: uint8 [N, H, W, 3] RGB, or float32 [N, 3, H, W] already normalised (input="float32").
    Returns labels uint8 [N, H, W]; or logits float32 [N, K, H, W]; or both as a tuple (labels,
    logits).
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

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        height, width = images.shape[1:3] if self.input == "uint8" else images.shape[2:4]
        logits = main_logits(self.network(self.normalise(images)))
        if logits.shape[2] != height or logits.shape[3] != width:
            logits = functional.interpolate(
                logits, size=(height, width), mode="bilinear", align_corners=False
            )
        if self.output == "logits":
            return logits
        labels = logits.argmax(1).to(torch.uint8)
        return labels if self.output == "labels" else (labels, logits)
