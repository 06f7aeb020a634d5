"""Refinement by a random walk: what a map says spreads within regions of one colour.

Source of the walk: Ahn, Cho and Kwak, "Weakly Supervised Learning of Instance Segmentation with
Inter-pixel Relations" (CVPR 2019), whose affinities a network learns; ours are colours' likeness,
with nothing to train. N batch, C maps, M cells, H height, W width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from srdeploy.errors import UserError
from srdeploy.outputs import resize_logits

TINY = 1e-8
MOST_CELLS = 6000
"""The matrix of a walk has the square of this many entries."""


def walk(images: Tensor, maps: Tensor, grid: int, radius: int, power: float, steps: int) -> Tensor:
    """maps float32 [N, C, H, W] after `steps` steps on a grid of cells of `grid` pixels.

    images: float32 [N, 3, H, W]. The sum of a map's cells stays the same.
    Raises UserError where the grid has too many cells.
    """
    size = (images.shape[2], images.shape[3])
    cells = functional.avg_pool2d(images.float(), grid, ceil_mode=True)
    height, width = cells.shape[2:]
    if height * width > MOST_CELLS:
        raise UserError(
            f"a random walk over {height * width} cells needs too much memory (at most "
            f"{MOST_CELLS}): raise pseudo.walk_grid above {grid}, or set longest_side"
        )
    coarse = functional.avg_pool2d(maps.float(), grid, ceil_mode=True).flatten(2)
    moves = torch.linalg.matrix_power(transitions(cells, radius, power), steps)
    walked = torch.einsum("nij,ncj->nci", moves, coarse)
    return resize_logits(walked.unflatten(2, (height, width)), size)


def transitions(cells: Tensor, radius: int, power: float) -> Tensor:
    """cells [N, 3, h, w] -> [N, M, M], M = h * w: the probability to step from column j to row i.

    The affinity of cells at most `radius` apart along both axes is exp(-d), with d the mean over
    the colours of |I_i - I_j| / (1e-8 + sigma) and sigma the image's deviation; to the `power`, and
    every column divided by its sum.
    """
    height, width = cells.shape[2:]
    colours = cells.flatten(2)
    scale = TINY + colours.std(2, correction=0)[:, :, None, None]
    distance = ((colours[:, :, :, None] - colours[:, :, None, :]).abs() / scale).mean(1)
    rows = torch.arange(height, device=cells.device).repeat_interleave(width)
    columns = torch.arange(width, device=cells.device).repeat(height)
    near = (rows[:, None] - rows).abs().le(radius) & (columns[:, None] - columns).abs().le(radius)
    affinity = torch.exp(-power * distance) * near
    return affinity / affinity.sum(1, keepdim=True)
