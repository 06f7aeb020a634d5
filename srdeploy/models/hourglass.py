"""Stacked hourglass: pre-activation bottlenecks through a recursion of four poolings, repeated.

Source: Newell et al., "Stacked Hourglass Networks for Human Pose Estimation", ECCV 2016 (arXiv
1603.06937). Parameters and work are those of the usual public implementation with one block per
residual place, whose convolutions all have biases.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.errors import UserError
from srdeploy.models.initialisation import initialise, initialise_logits
from srdeploy.outputs import resize_logits

DEPTH = 4
"""Poolings inside one hourglass."""


class Residual(nn.Module):
    """BN, ReLU, convolution, three times (1x1 to half, 3x3, 1x1), added to the shortcut.

    [N, inputs, h, w] -> [N, outputs, h, w]. The shortcut is a 1x1 convolution where the width
    changes. `outputs` must be even.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, outputs, 1)
        self.relu = nn.ReLU()
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.conv1(self.relu(self.bn1(features)))
        hidden = self.conv2(self.relu(self.bn2(hidden)))
        hidden = self.conv3(self.relu(self.bn3(hidden)))
        output: Tensor = hidden + self.shortcut(features)
        return output


class Pool(nn.Module):
    """2x2 max-pool that rounds sizes up: [N, C, h, w] -> [N, C, ceil(h/2), ceil(w/2)].

    The last row and column are doubled, which changes no maximum; of even sizes the pooling leaves
    them out again. It equals ceil mode, four of which in a row torch.export can't trace for sizes
    that vary.
    """

    def forward(self, features: Tensor) -> Tensor:
        features = torch.cat((features, features[:, :, -1:]), 2)
        features = torch.cat((features, features[:, :, :, -1:]), 3)
        return functional.max_pool2d(features, 2)


class Hourglass(nn.Module):
    """[N, C, h, w] -> [N, C, h, w]: down by `depth` poolings and up again, a skip at every size.

    Poolings round up, so that no map vanishes and any size >= 1 fits; on the way up the coarser map
    goes to the skip's exact size. With nearest neighbours that is doubling and cutting what stands
    over.
    """

    def __init__(self, channels: int, depth: int = DEPTH) -> None:
        super().__init__()
        self.skip = Residual(channels, channels)
        self.pool = Pool()
        self.down = Residual(channels, channels)
        self.inner = Hourglass(channels, depth - 1) if depth > 1 else Residual(channels, channels)
        self.up = Residual(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        skip: Tensor = self.skip(features)
        lower = self.down(self.pool(features))
        lower = self.up(self.inner(lower))
        return skip + functional.interpolate(lower, size=skip.shape[-2:], mode="nearest")


class Stem(nn.Sequential):
    """images [N, 3, H, W] -> [N, C, h, w] at a quarter of the size, rounded up twice."""

    def __init__(self, channels: int) -> None:
        quarter, half = channels // 4, channels // 2
        super().__init__(
            nn.Conv2d(3, quarter, 7, stride=2, padding=3),
            nn.BatchNorm2d(quarter),
            nn.ReLU(),
            Residual(quarter, half),
            Pool(),
            Residual(half, channels),
            Residual(channels, channels),
        )


class Stack(nn.Sequential):
    """One hourglass with its residual and 1x1 BN ReLU: the features that its score reads."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            Hourglass(channels),
            Residual(channels, channels),
            nn.Conv2d(channels, channels, 1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )


class StackedHourglass(nn.Module):
    """images float32 [N, 3, H, W] -> logits float32 [N, K, H, W], any H, W >= 32.

    `stacks` hourglasses follow each other at a quarter of the image's size; each gives logits, and
    the next one reads its features and logits added to its own input. `width` is their channel
    count, a multiple of 4. `stages` names the stem and the stacks. The last stack's logits, resized
    bilinearly, are the network's output; those of the stacks before are `auxiliary_heads` with
    weight 1: the paper supervises all stacks alike.
    """

    def __init__(self, classes: int, *, stacks: int = 2, width: int = 256) -> None:
        super().__init__()
        _check("stacks", stacks, 1)
        _check("width", width, 4)
        self.stem = Stem(width)
        self.stacks = nn.ModuleList(Stack(width) for _ in range(stacks))
        self.scores = nn.ModuleList(nn.Conv2d(width, classes, 1) for _ in range(stacks))
        self.merge_features = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(stacks - 1))
        self.merge_scores = nn.ModuleList(nn.Conv2d(classes, width, 1) for _ in range(stacks - 1))
        self.stages = ("stem", *(f"stacks.{i}" for i in range(stacks)))
        self.auxiliary_heads = {f"scores.{i}": 1.0 for i in range(stacks - 1)}
        initialise(self)
        for score in self.scores:
            assert isinstance(score, nn.Conv2d)
            initialise_logits(score)

    def forward(self, images: Tensor) -> Tensor:
        given: Tensor = self.stem(images)
        features = self.stacks[0](given)
        logits: Tensor = self.scores[0](features)
        rest = zip(
            self.merge_features, self.merge_scores, self.stacks[1:], self.scores[1:], strict=True
        )
        for merge_features, merge_scores, stack, score in rest:
            given = given + merge_features(features) + merge_scores(logits)
            features = stack(given)
            logits = score(features)
        return resize_logits(logits, (images.shape[-2], images.shape[-1]))


def _check(name: str, value: object, multiple: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % multiple:
        what = "a whole number from 1" if multiple == 1 else f"a multiple of {multiple}"
        raise UserError(f"{name} is {value!r}: {what} is needed, e.g. {2 * multiple}")
