"""Arrays of one photo in one .npz file, which appears whole."""

import zipfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.deployable import Normalise, cut_logits, pad_images
from srdeploy.errors import UserError
from srdeploy.files import whole_file
from srdeploy.imaging import Pixels
from srdeploy.outputs import main_logits, resize_logits
from srdeploy.spec import Spec
from srdeploy.train.weak.pseudo_run import PseudoConfig
from srdeploy.train.weak.tag_network import TagNetwork


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes `arrays`, compressed. Raises UserError (full disk)."""
    # Not synced to the disk: what is lost in a power cut is made again.
    with whole_file(path, sync=False) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_arrays(path: Path, names: Set[str]) -> dict[str, npt.NDArray[Any]]:
    """The arrays `names` of a file. Raises UserError where it is broken or lacks one."""
    try:
        # Opened here: numpy leaves a file open that it can't read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: absent or broken: remove it and run again") from error


# Class maps: a classifier's activation, or a segmenter's probabilities

Maps = npt.NDArray[np.float32]
HIGHEST = 255
"""The stored value of 1."""


class MapMaker(Protocol):
    """Where class maps come from."""

    @property
    def classes(self) -> tuple[int, ...]:
        """The class of each map."""

    def __call__(self, images: Tensor) -> Tensor:
        """images float32 [N, 3, H, W], normalised -> scores float32 [N, K, h, w] from 0 on."""


class Activation:
    """The class activation maps of a classifier of tags; the background has none."""

    def __init__(self, network: TagNetwork, classes: Sequence[int], spec: Spec) -> None:
        self.network = network.eval()
        self.classes = tuple(classes)
        self._multiple = spec.input.multiple

    def __call__(self, images: Tensor) -> Tensor:
        size = (images.shape[2], images.shape[3])
        maps = self.network.activation(pad_images(images, self._multiple))
        return cut_logits(maps, size, self._multiple)


class Teacher:
    """A trained segmenter's probabilities, the background's among them."""

    def __init__(self, network: nn.Module, spec: Spec) -> None:
        self.network = network.eval()
        self.classes = tuple(range(spec.class_count))
        self._multiple = spec.input.multiple

    def __call__(self, images: Tensor) -> Tensor:
        size = (images.shape[2], images.shape[3])
        logits = main_logits(self.network(pad_images(images, self._multiple))).float()
        return cut_logits(logits, size, self._multiple).softmax(1)


@torch.inference_mode()
def averaged_maps(
    maker: MapMaker, images: Tensor, normalise: Normalise, spec: Spec, config: PseudoConfig
) -> Tensor:
    """Maps of photos uint8 [N, H, W, 3], averaged over the scales and mirrored photos that `config`
    names: float32 [N, K, h, w] on its grid."""
    height, width = images.shape[1:3]
    size = (-(-height // config.grid), -(-width // config.grid))
    photos = normalise(images)
    total: Tensor | None = None
    for scale in config.scales:
        seen = photos if scale == 1 else _scaled(photos, scale, spec.input.smallest)
        found = resize_logits(maker(seen), size)
        if config.flip:
            found = found + resize_logits(maker(seen.flip(3)), size).flip(3)
        total = found if total is None else total + found
    assert total is not None
    return total / (len(config.scales) * (2 if config.flip else 1))


def _scaled(photos: Tensor, scale: float, smallest: tuple[int, int]) -> Tensor:
    height, width = (
        max(least, round(side * scale))
        for side, least in zip(photos.shape[2:], smallest, strict=True)
    )
    return functional.interpolate(
        photos, size=(height, width), mode="bilinear", align_corners=False, antialias=scale < 1
    )


@dataclass(frozen=True)
class PhotoMaps:
    """The maps of one photo, of only its tags (and of the background, where a teacher made
    them)."""

    classes: tuple[int, ...]
    """T class ids, ascending."""
    maps: Maps
    """float32 [T, h, w] in 0..1."""


def of_tags(
    maps: Tensor, classes: Sequence[int], tags: frozenset[int], background: int
) -> PhotoMaps:
    """What counts of one photo's maps float32 [K, h, w]: those of `tags`, scaled.

    Activations are divided by their highest value, each class's its own; a teacher's probabilities,
    which come with the background, by the sum over the classes that are left.
    """
    wanted = tags | {background} if background in classes else tags
    kept = tuple(sorted(wanted & set(classes)))
    chosen = maps[[classes.index(one) for one in kept]]
    if background in classes:
        chosen = chosen / chosen.sum(0, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    else:
        chosen = to_highest(chosen)
    return PhotoMaps(kept, chosen.float().cpu().numpy())


def to_highest(maps: Tensor) -> Tensor:
    """maps [..., h, w], each divided by its highest value; one that is 0 everywhere stays so."""
    highest = maps.amax((-2, -1), keepdim=True)
    return torch.where(highest > 0, maps / highest.clamp(min=1e-12), 0)


def write_maps(path: Path, found: PhotoMaps) -> None:
    """Keeps maps to 1/255 in an .npz; the file appears whole."""
    levels = np.rint(found.maps * HIGHEST).clip(0, HIGHEST).astype(np.uint8)
    write_arrays(path, {"classes": np.array(found.classes, np.int64), "maps": levels})


def read_maps(path: Path) -> PhotoMaps:
    """Reads the maps that `write_maps` wrote. Raises UserError where the file is no such one."""
    found = read_arrays(path, {"classes", "maps"})
    levels = found["maps"].astype(np.float32) / np.float32(HIGHEST)
    return PhotoMaps(tuple(int(one) for one in found["classes"]), levels)


# Pixel-adaptive mask refinement (PAMR)

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


# Refinement by a random walk over colours

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


# Refined maps at the photo's own grid


def at_size(found: PhotoMaps, size: tuple[int, int]) -> PhotoMaps:
    """The maps at `size` (H, W), unrefined."""
    if not found.classes:
        return replace(found, maps=np.zeros((0, *size), np.float32))
    maps = resize_logits(torch.from_numpy(found.maps)[None], size)[0]
    return replace(found, maps=maps.numpy())


def refined(
    photos: list[Pixels],
    found: list[PhotoMaps],
    background: int,
    config: PseudoConfig,
    device: torch.device,
) -> list[PhotoMaps]:
    """Maps of photos of one size uint8 [H, W, 3], at that size, as `config.refine` says.

    Photos with fewer classes than others take part with maps of zeros, which stay zeros.
    """
    size = (photos[0].shape[0], photos[0].shape[1])
    most = max(len(one.classes) for one in found)
    if config.refine == "none" or most == 0:
        return [at_size(one, size) for one in found]
    stacked = torch.zeros(len(found), most, *found[0].maps.shape[1:])
    for row, one in enumerate(found):
        stacked[row, : len(one.classes)] = torch.from_numpy(one.maps)
    images = torch.from_numpy(np.stack(photos)).to(device).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        maps = resize_logits(stacked.to(device), size)
        if config.refine == "pamr":
            maps = refine(images, maps, config.pamr_dilations, config.pamr_steps)
        else:
            maps = walk(
                images,
                maps,
                config.walk_grid,
                config.walk_radius,
                config.walk_power,
                config.walk_steps,
            )
        scaled = to_highest(maps)
    results = []
    for row, one in enumerate(found):
        # A teacher's probabilities stay what they are: refinement keeps their sum.
        kept = maps if background in one.classes else scaled
        results.append(replace(one, maps=kept[row, : len(one.classes)].cpu().numpy()))
    return results
