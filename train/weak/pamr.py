"""Pixel-adaptive mask refinement, PAMR: maps follow the photo's edges, with nothing to train.

Source: Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels" (CVPR 2020).
N batch, C maps, P neighbours, H height, W width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

TINY = 1e-8
SHARPNESS = 0.1
"""A neighbour whose colour differs by this share of the local deviation weighs e times less."""


def refine(images: Tensor, maps: Tensor, dilations: Sequence[int], steps: int) -> Tensor:
    """maps float32 [N, C, H, W], mixed `steps` times with those of similar neighbours.

    images: float32 [N, 3, H, W], of any scale. Of each pixel the 8 neighbours at each of
    `dilations` count; beyond the border the border's pixels are repeated. Weights sum to 1, so a
    constant map stays as it is and no value leaves the range of its map.
    """
    weights = neighbour_weights(images, dilations)
    for _ in range(steps):
        mixed = torch.zeros_like(maps)
        for number, shifted in enumerate(neighbours(maps, dilations)):
            mixed.addcmul_(weights[:, number : number + 1], shifted)
        maps = mixed
    return maps


def neighbour_weights(images: Tensor, dilations: Sequence[int]) -> Tensor:
    """images [N, 3, H, W] -> float32 [N, P, H, W]: softmax over the P neighbours of the mean over
    the colours of -|I_i - I_j| / (1e-8 + 0.1 sigma_i)."""
    images = images.float()
    # The deviation over each dilation's 3x3 window, its centre included each time, as the authors'
    # code has it. Two passes: a difference of squares would cancel.
    count = 9 * len(dilations)
    mean = torch.zeros_like(images)
    for shifted in neighbours(images, dilations):
        mean += shifted
    mean = (mean + len(dilations) * images) / count
    squares = len(dilations) * (images - mean) ** 2
    for shifted in neighbours(images, dilations):
        squares += (shifted - mean) ** 2
    scale = TINY + SHARPNESS * (squares / (count - 1)).sqrt()
    likeness = [
        -((images - shifted).abs() / scale).mean(1) for shifted in neighbours(images, dilations)
    ]
    return torch.stack(likeness, 1).softmax(1)


def neighbours(values: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """The map shifted to each of the 8 neighbours at each distance: views [N, C, H, W], in one
    order."""
    height, width = values.shape[2:]
    reach = max(dilations)
    padded = functional.pad(values, (reach, reach, reach, reach), mode="replicate")
    for distance in dilations:
        for down in (-distance, 0, distance):
            for across in (-distance, 0, distance):
                if down or across:
                    top, left = reach + down, reach + across
                    yield padded[:, :, top : top + height, left : left + width]
