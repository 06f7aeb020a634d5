"""From class maps to a mask: which class each pixel gets, how certain that is, and what is ignored.

T classes of one photo, H, W its size.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from srdeploy.imaging import Pixels, restore
from srdeploy.spec import Spec
from srdeploy.train.weak.maps import PhotoMaps, read_arrays, write_arrays

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
    0..1; 1 where there is only one class."""
    if len(found.classes) == 1:
        return np.ones(found.maps.shape[1:], np.float32)
    second, first = np.partition(found.maps, -2, axis=0)[-2:]
    total = first + second
    return np.asarray(np.divide(first - second, total, out=np.zeros_like(total), where=total > 0))


def lost(found: PhotoMaps, background: int) -> bool:
    """True if a class that the photo shows was not found anywhere in it."""
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


# How good class maps and pseudo masks are, where true masks exist: mIoU, and the best level of the
# background.

LEVELS = tuple(round(0.05 * i, 2) for i in range(1, 13))
"""Background scores that are tried on the refined maps."""

Confusion = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MapScores:
    """Counts of one photo, or of several: int64 [K, K] each, rows the true class. They add up."""

    cam: Confusion
    """The counts of the maps as the classifier gives them."""
    refined: Confusion
    mask: Confusion
    """The counts of the pseudo mask, without ignored pixels."""
    levels: Confusion
    """[L, K, K]: `refined` at each of LEVELS; [0, K, K] where the background has a map."""
    labelled: int
    """Pixels with a true label."""

    def __add__(self, other: Self) -> "MapScores":
        return MapScores(
            self.cam + other.cam,
            self.refined + other.refined,
            self.mask + other.mask,
            self.levels + other.levels,
            self.labelled + other.labelled,
        )

    def summary(self, spec: Spec) -> dict[str, Any]:
        """As JSON: {"cam", "refined", "mask"}, each {"miou", "iou"}; "coverage", the share of the
        labelled pixels that the mask does not ignore; "best_background", {"level", "miou"} or
        None."""
        found: dict[str, Any] = {
            name: {
                "miou": mean_iou(counts, spec),
                "iou": {spec.classes[i]: _finite(class_iou(counts)[i]) for i in spec.scored_ids},
            }
            for name, counts in (("cam", self.cam), ("refined", self.refined), ("mask", self.mask))
        }
        found["coverage"] = float(self.mask.sum() / self.labelled) if self.labelled else None
        tried = [mean_iou(one, spec) or 0.0 for one in self.levels]
        top = int(np.argmax(tried)) if tried else None
        best_one = None if top is None else {"level": LEVELS[top], "miou": tried[top]}
        return {**found, "best_background": best_one}


def score_photo(
    truth: Pixels,
    cam: PhotoMaps,
    refined: PhotoMaps,
    mask: Pixels,
    spec: Spec,
    background: int,
    level: float,
) -> MapScores:
    """Counts of one photo. truth, mask: uint8 [H, W] at the photo's own size; cam, refined: at the
    size that the network sees."""

    def at(found: PhotoMaps, level: float) -> Confusion:
        labels = restore(best(with_background(found, background, level)), *truth.shape)
        return confusion(truth, labels, spec)

    return MapScores(
        cam=at(cam, level),
        refined=at(refined, level),
        mask=confusion(truth, mask, spec),
        levels=_at_levels(truth, refined, spec, background),
        labelled=int((truth != spec.ignore_index).sum()),
    )


def _at_levels(truth: Pixels, found: PhotoMaps, spec: Spec, background: int) -> Confusion:
    """What `confusion` counts of `found` with the background at each of LEVELS: int64 [L, K, K]; of
    no level where the background has a map.

    In one count: pixels by true class, class of the highest map, and how many levels that beats.
    """
    count = spec.class_count
    if background in found.classes:
        return np.zeros((0, count, count), np.int64)
    if not found.classes:
        labels = np.full(truth.shape, background, np.uint8)
        return np.repeat(confusion(truth, labels, spec)[None], len(LEVELS), axis=0)
    # Strictly above: where they are equal the background wins, as in `best`.
    beaten = np.searchsorted(np.array(LEVELS, np.float32), found.maps.max(0), side="left")
    best_class = restore(best(found), *truth.shape)
    beaten = restore(beaten.astype(np.uint8), *truth.shape)
    known = truth != spec.ignore_index
    ways = len(LEVELS) + 1
    keys = (truth[known].astype(np.int64) * count + best_class[known]) * ways + beaten[known]
    counts = np.bincount(keys, minlength=count * count * ways).reshape(count, count, ways)
    # At level i those win that beat more than i levels.
    winning = counts[:, :, ::-1].cumsum(2)[:, :, ::-1][:, :, 1:].transpose(2, 0, 1).copy()
    winning[:, :, background] = counts.sum((1, 2)) - winning.sum(2)
    return np.asarray(winning)


def confusion(truth: Pixels, guess: Pixels, spec: Spec) -> Confusion:
    """Pairs of labels, int64 [K, K]; pixels that either ignores are left out."""
    counted = (truth != spec.ignore_index) & (guess != spec.ignore_index)
    count = spec.class_count
    pairs = truth[counted].astype(np.int64) * count + guess[counted]
    return np.bincount(pairs, minlength=count * count).reshape(count, count)


def class_iou(counts: Confusion) -> npt.NDArray[np.float64]:
    """IoU of each class, [K]; NaN where it is neither there nor predicted."""
    correct = counts.diagonal().astype(np.float64)
    union = counts.sum(0) + counts.sum(1) - correct
    return np.asarray(np.divide(correct, union, out=np.full(len(correct), np.nan), where=union > 0))


def mean_iou(counts: Confusion, spec: Spec) -> float | None:
    """Mean over the scored classes that are there or predicted; None where none is."""
    iou = class_iou(counts)[list(spec.scored_ids)]
    known = iou[~np.isnan(iou)]
    return float(known.mean()) if len(known) else None


def write_scores(path: Path, scores: MapScores) -> None:
    """Keeps the counts of one photo; the file appears whole."""
    write_arrays(path, {name: np.asarray(value) for name, value in vars(scores).items()})


def read_scores(path: Path) -> MapScores:
    """Reads the counts of `write_scores`. Raises UserError where the file is no such one."""
    found = read_arrays(path, {field.name for field in fields(MapScores)})
    labelled = int(found.pop("labelled"))
    return MapScores(labelled=labelled, **found)


def _finite(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)
