"""From class maps to a mask: which class each pixel gets, how certain that is, and what is ignored.

T classes of one photo, H, W its size.
"""

import numpy as np
import numpy.typing as npt

from srdeploy.imaging import Pixels
from srdeploy.train.weak.cam import PhotoMaps

CERTAIN = 255
"""Confidence of a pixel that nothing speaks against."""


def with_background(found: PhotoMaps, background: int, level: float) -> PhotoMaps:
    """The maps with the background's first: its own where it has one, else `level` everywhere."""
    if background in found.classes:
        return found
    flat = np.full((1, *found.maps.shape[1:]), level, np.float32)
    return PhotoMaps((background, *found.classes), np.concatenate([flat, found.maps]))


def best(found: PhotoMaps) -> Pixels:
    """The class of the highest score at each pixel, uint8 [H, W]."""
    labels: Pixels = np.array(found.classes, np.uint8)[found.maps.argmax(0)]
    return labels


def certainty(found: PhotoMaps) -> npt.NDArray[np.float32]:
    """(a - b) / (a + b) of the best score a and the second best b at each pixel: float32 [H, W] in
    0..1; 1 where there is one class alone."""
    if len(found.classes) == 1:
        return np.ones(found.maps.shape[1:], np.float32)
    second, first = np.partition(found.maps, -2, axis=0)[-2:]
    total = first + second
    return np.asarray(np.divide(first - second, total, out=np.zeros_like(total), where=total > 0))


def lost(found: PhotoMaps, background: int) -> bool:
    """Whether a class that the photo shows was found nowhere in it."""
    return any(
        not one.any()
        for ident, one in zip(found.classes, found.maps, strict=True)
        if ident != background
    )


def decide(
    found: PhotoMaps, background: int, certain: float, ignore_index: int
) -> tuple[Pixels, Pixels]:
    """A pseudo mask, uint8 [H, W], and its confidence, uint8 [H, W], 255 * certainty.

    found: with the background's map. Pixels whose certainty is below `certain` get `ignore_index`
    and confidence 0. So do all that would be background where a class's map is 0 everywhere: the
    photo shows that class, and it may be anywhere. No class is in the mask that is not in
    `found.classes`.
    """
    sure = certainty(found)
    labels = best(found)
    left_out = sure < certain
    if lost(found, background):
        left_out |= labels == background
    confidence = np.rint(sure * CERTAIN).astype(np.uint8)
    return (
        np.where(left_out, np.uint8(ignore_index), labels),
        np.where(left_out, np.uint8(0), confidence),
    )
