"""Augmentation of one photo and its labels: scale, crop, mirror, colour. Pillow and numpy, uint8
throughout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from srdeploy.imaging import Pixels
from srdeploy.spec import Spec
from srdeploy.train.config import TrainConfig

GRAY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a colour's gray, after ITU-R BT.601."""


@dataclass(frozen=True)
class Augmentation:
    """How photos vary. Sizes are (height, width) in pixels."""

    crop: tuple[int, int]
    scale: tuple[float, float]
    """The photo is scaled by a factor drawn evenly from this range."""
    flip: float
    """Share of photos that are mirrored."""
    colour: float
    """Brightness, contrast and saturation vary by the factors 1 - colour to 1 + colour."""
    fill: tuple[int, int, int]
    """RGB of the ground that a photo smaller than the crop is laid on: the mean colour, normalised
    to 0."""
    ignore_index: int
    """Label of that ground."""
    on_device: bool = False
    """True if the device mirrors and changes colours."""


def augmentation_for(config: TrainConfig, spec: Spec) -> Augmentation:
    """The augmentation of a run."""
    red, green, blue = (round(255 * value) for value in spec.mean)
    return Augmentation(
        crop=config.crop,
        scale=config.scale,
        flip=config.flip,
        colour=config.colour,
        fill=(red, green, blue),
        ignore_index=spec.ignore_index,
        on_device=config.augment_on == "device",
    )


class Look(NamedTuple):
    """What is left to do to a crop where that is done on the device (`train.device_augment`)."""

    brightness: float
    contrast: float
    saturation: float
    mirrored: bool
    top: int
    left: int
    height: int
    width: int
    """The part of the crop that the photo fills, in pixels."""


class Sample(NamedTuple):
    """One random view of a photo."""

    photo: Pixels
    """uint8 [h, w, 3] RGB, (h, w) the crop's size."""
    labels: Pixels
    """uint8 [h, w]."""
    confidence: Pixels | None = None
    """How sure the labels are, uint8 [h, w]; None where nobody asked."""
    look: Look | None = None
    """None where nothing is left to do."""


def sample_of(photo: Pixels, maps: Sequence[Pixels], look: Look | None = None) -> Sample:
    """maps: the labels, then their confidence if any."""
    labels, *sure = maps
    return Sample(photo, labels, sure[0] if sure else None, look)


def augment(
    photo: Pixels,
    labels: Pixels,
    how: Augmentation,
    rng: np.random.Generator,
    confidence: Pixels | None = None,
) -> Sample:
    """One random view. photo uint8 [H, W, 3] RGB, labels and their confidence uint8 [H, W].

    The same number of values is drawn from `rng` whatever the settings, so that changing one
    setting leaves the other choices as they were.
    """
    scale = rng.uniform(*how.scale)
    place = rng.random(2)
    mirrored = bool(rng.random() < how.flip)
    factors = rng.uniform(1 - how.colour, 1 + how.colour, 3)
    brightness, contrast, saturation = (float(factor) for factor in factors)
    maps = [labels] if confidence is None else [labels, confidence]
    photo, maps, offset = scaled_crop(photo, maps, scale, how.crop, place)
    if how.on_device:
        height, width = maps[0].shape
        look = Look(brightness, contrast, saturation, mirrored, *offset, height, width)
        photo, maps = pad(photo, maps, how, offset)
        return sample_of(photo, maps, look)
    if how.colour > 0:
        photo = jitter(photo, brightness, contrast, saturation)
    photo, maps = pad(photo, maps, how, offset)
    if mirrored:
        photo, maps = photo[:, ::-1], [one[:, ::-1] for one in maps]
    return sample_of(np.ascontiguousarray(photo), [np.ascontiguousarray(one) for one in maps])


def scaled_crop(
    photo: Pixels,
    maps: Sequence[Pixels],
    scale: float,
    crop: tuple[int, int],
    place: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> tuple[Pixels, list[Pixels], tuple[int, int]]:
    """Scales by `scale` (image bilinear, its maps nearest: labels, then their confidence if any)
    and crops at `place`, in 0..1 along both axes.

    Only the part inside the crop is resampled, which is the scaled photo's crop but for the
    outermost pixels. Where the scaled photo is smaller than the crop the result is smaller too; the
    third value is where it then belongs inside the crop (top, left).
    """
    height, width = photo.shape[:2]
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    starts, kept, offset = [], [], []
    for axis in (0, 1):
        slack = size[axis] - crop[axis]
        start = int(place[axis] * (abs(slack) + 1))
        starts.append(start if slack > 0 else 0)
        offset.append(0 if slack > 0 else start)
        kept.append(min(size[axis], crop[axis]))
    down, across = height / size[0], width / size[1]
    # Rounding must not put the box a hair outside the photo: Pillow refuses that.
    box = (
        starts[1] * across,
        starts[0] * down,
        min((starts[1] + kept[1]) * across, width),
        min((starts[0] + kept[0]) * down, height),
    )
    target = (kept[1], kept[0])
    image = Image.fromarray(photo).resize(target, Image.Resampling.BILINEAR, box)
    cut = [Image.fromarray(one).resize(target, Image.Resampling.NEAREST, box) for one in maps]
    return np.asarray(image), [np.asarray(one) for one in cut], (offset[0], offset[1])


def jitter(photo: Pixels, brightness: float, contrast: float, saturation: float) -> Pixels:
    """The photo with the three factors applied in that order, clipped once, uint8 [H, W, 3].

    Each of the three is an affine map of the colour (contrast blends with the mean gray, saturation
    with the pixel's gray), so their product is one matrix and one pass.
    """
    gray = np.array(GRAY)
    # Channel by channel: numpy takes six times as long over all three at once.
    mean = sum(float(photo[..., i].mean()) * gray[i] for i in range(3)) * brightness
    mix = saturation * np.eye(3) + (1 - saturation) * gray[None, :]
    matrix = np.empty((3, 4))
    matrix[:, :3] = mix * (brightness * contrast)
    # Every row of `mix` sums to 1: a constant passes through it unchanged.
    matrix[:, 3] = (1 - contrast) * mean
    return np.asarray(Image.fromarray(photo).convert("RGB", tuple(matrix.ravel().tolist())))


def pad(
    photo: Pixels, maps: list[Pixels], how: Augmentation, offset: tuple[int, int]
) -> tuple[Pixels, list[Pixels]]:
    """Lays photo and maps (as of `scaled_crop`) at `offset` (top, left) on grounds of the crop's
    size, which are ignored and of no confidence; as they are where they fill it."""
    height, width = photo.shape[:2]
    if (height, width) == how.crop:
        return photo, maps
    ground = np.empty((*how.crop, 3), np.uint8)
    ground[:] = how.fill
    here = (slice(offset[0], offset[0] + height), slice(offset[1], offset[1] + width))
    ground[here] = photo
    laid = [np.full(how.crop, value, np.uint8) for value in (how.ignore_index, 0)[: len(maps)]]
    for below, one in zip(laid, maps, strict=True):
        below[here] = one
    return ground, laid


# The second half of augmentation as tensors, where the device has more time than the threads that
# read: mirroring and colours. Scaling and cropping stay with the threads, as they leave less to
# send.


def varied(images: Tensor, maps: Sequence[Tensor], looks: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Crops with their looks applied: uint8 [N, H, W, 3] and uint8 [N, H, W] each.

    images, maps: as that, the maps being labels and what else lies over the photos; looks:
    float32 [N, 8], in the order of `train.augment.Look`'s fields.
    Equals `train.augment.augment` to one level of 255. Nothing waits for the device.
    """
    count, height, width = images.shape[:3]
    brightness, contrast, saturation, mirrored, top, left, high, wide = looks.unbind(1)

    # What the photo fills: the ground around it keeps its colour, and counts for no mean.
    down = torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    rows = (down >= top[:, None]) & (down < (top + high)[:, None])
    columns = (across >= left[:, None]) & (across < (left + wide)[:, None])
    filled = (rows[:, :, None] & columns[:, None, :])[..., None]

    # One affine map of the colour, as train.augment.jitter derives it.
    values = images.float()
    # Filled on the device: a copy from here would wait for it.
    gray = torch.cat([torch.full((1,), weight, device=images.device) for weight in GRAY])
    mean = ((values @ gray) * filled[..., 0]).sum((1, 2)) / (high * wide) * brightness
    one = torch.eye(3, device=images.device)
    mix = saturation[:, None, None] * one + (1 - saturation)[:, None, None] * gray
    matrix = mix * (brightness * contrast)[:, None, None]
    shift = (1 - contrast) * mean
    flat = values.reshape(count, -1, 3) @ matrix.transpose(1, 2) + shift[:, None, None]
    found = flat.reshape(values.shape).round().clamp(0, 255).to(torch.uint8)
    found = torch.where(filled, found, images)

    turned = mirrored.bool()
    return (
        torch.where(turned[:, None, None, None], found.flip(2), found),
        [torch.where(turned[:, None, None], each.flip(2), each) for each in maps],
    )
