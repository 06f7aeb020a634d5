"""Exits: a segmenter and a classifier that read one stage of a network, in training alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.errors import UserError
from srdeploy.train.regulation_config import RegulationConfig

AUTHORS_WIDTH = 256


class ExitOutput(NamedTuple):
    """What one exit says about a batch."""

    logits: Tensor
    """[N, K, h, w], at the exit's own resolution."""
    class_logits: Tensor
    """[N, K], of the classes being present in the image."""
    hidden: Tensor
    """[N, C, h, w], the last map before the segmenter."""


class LeanExit(nn.Module):
    """The tap averaged to a coarse grid, 1x1 and 3x3 to `width` channels, then to K classes."""

    def __init__(self, channels: int, classes: int, width: int, window: int) -> None:
        """`window`: cells of the tap, per axis, that are averaged into one cell of the exit."""
        super().__init__()
        self.window = window
        self.reduce = unit(channels, width, 1)
        self.mix = unit(width, width, 3)
        self.segmenter = nn.Conv2d(width, classes, 1)
        self.classifier = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> ExitOutput:
        """features [N, C, h, w] -> logits and hidden map at ceil(h / window), ceil(w / window)."""
        if self.window > 1:
            # Fixed windows: adaptive pooling's backward is not deterministic on CUDA.
            features = functional.avg_pool2d(features, self.window, ceil_mode=True)
        hidden = self.mix(self.reduce(features))
        return ExitOutput(self.segmenter(hidden), self.classifier(hidden.mean((2, 3))), hidden)


class AuthorsExit(nn.Module):
    """The published demo's head: two 3x3 convolutions to 256 channels, 1x1 to K.

    It works at the tap's own size; its classifier reads the segmentation logits' means.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.reduce = unit(channels, AUTHORS_WIDTH, 3)
        self.mix = unit(AUTHORS_WIDTH, AUTHORS_WIDTH, 3)
        self.segmenter = nn.Conv2d(AUTHORS_WIDTH, classes, 1)
        self.classifier = nn.Linear(classes, classes)

    def forward(self, features: Tensor) -> ExitOutput:
        """features [N, C, h, w] -> logits and hidden map at h, w."""
        hidden = self.mix(self.reduce(features))
        logits = self.segmenter(hidden)
        return ExitOutput(logits, self.classifier(logits.mean((2, 3))), hidden)


class Exits(nn.Module):
    """All exits of a regulated network: one per tap, and a classifier of the network's own output.

    Its state_dict is what exits.safetensors holds; the network's weights are not in it.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        classes: int,
        settings: RegulationConfig,
    ) -> None:
        """channels, strides: of the taps, shallow to deep; strides in input pixels per cell."""
        super().__init__()
        self.taps = nn.ModuleList()
        for width, stride in zip(channels, strides, strict=True):
            if settings.exits == "authors":
                self.taps.append(AuthorsExit(width, classes))
            else:
                window = max(1, -(-settings.min_stride // stride))
                self.taps.append(LeanExit(width, classes, settings.width, window))
        self.own_classifier = nn.Linear(classes, classes)

    def forward(self, features: Sequence[Tensor]) -> list[ExitOutput]:
        """features: one map [N, C, h, w] per tap, shallow to deep -> one output per tap."""
        return [tap(map_) for tap, map_ in zip(self.taps, features, strict=True)]

    def check_cells(self, features: Sequence[Tensor], names: Sequence[str]) -> None:
        """Raises UserError where an exit would train BatchNorm on one value per channel."""
        for tap, map_, name in zip(self.taps, features, names, strict=True):
            window = tap.window if isinstance(tap, LeanExit) else 1
            rows, columns = (-(-side // window) for side in map_.shape[2:])
            if map_.shape[0] * rows * columns == 1:
                raise UserError(
                    f"one image leaves the exit at '{name}' a single cell, and BatchNorm can't be "
                    "trained on one value: use a batch of 2 or more, or larger images"
                )

    def classify(self, logits: Tensor) -> Tensor:
        """The network's own logits [N, K, h, w] -> its class logits [N, K]."""
        found: Tensor = self.own_classifier(logits.mean((2, 3)))
        return found


def make_exits(
    channels: Sequence[int],
    strides: Sequence[int],
    classes: int,
    settings: RegulationConfig,
    like: Tensor,
) -> Exits:
    """New exits with the device and dtype of `like`, leaving torch's random state as it was.

    So a baseline and a regulated run with one seed draw the same weights, data and dropout.
    """
    with torch.random.fork_rng(devices=[]):
        return Exits(channels, strides, classes, settings).to(like.device, like.dtype)


def unit(channels: int, width: int, kernel: int) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU; the size stays."""
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )
