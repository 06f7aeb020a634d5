"""Class maps of photos: a classifier's activation, or what a trained segmenter says.

N batch, K classes, T classes of one photo, H, W of the photo as the network sees it, h, w of the
grid that maps are kept on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from srdeploy.deployable import Normalise, cut_logits, pad_images
from srdeploy.outputs import main_logits, resize_logits
from srdeploy.spec import Spec
from srdeploy.train.weak.arrays import read_arrays, write_arrays
from srdeploy.train.weak.pseudo_config import PseudoConfig
from srdeploy.train.weak.tag_network import TagNetwork

Maps = npt.NDArray[np.float32]
HIGHEST = 255
"""What 1 is kept as."""


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
    """The maps of one photo, of its tags alone (and of the background, where a teacher made
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
    """What `write_maps` kept. Raises UserError where the file is no such one."""
    found = read_arrays(path, {"classes", "maps"})
    levels = found["maps"].astype(np.float32) / np.float32(HIGHEST)
    return PhotoMaps(tuple(int(one) for one in found["classes"]), levels)
