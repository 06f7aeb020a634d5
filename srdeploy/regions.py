"""Label maps as regions: areas, run lengths and polygons of the classes."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
import numpy.typing as npt
from contourpy import FillType, contour_generator
from PIL import Image

from srdeploy.imaging import Pixels
from srdeploy.spec import Spec

Mask = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]
Offsets = npt.NDArray[np.unsignedinteger]
Ring = list[list[float]]
"""Corners [x, y], the first not repeated at the end."""
Polygon = list[Ring]
"""The outer ring, then the holes."""


@dataclass(frozen=True)
class ClassArea:
    """How much of an image one class covers."""

    id: int
    pixels: int
    share: float
    """Share of all pixels of the image, those without a class included."""


@dataclass(frozen=True)
class Areas:
    """The classes in a label map."""

    classes: tuple[ClassArea, ...]
    """Those that occur, the largest first."""
    ignored: int
    """Pixels whose label is no class."""


def class_areas(labels: Pixels, spec: Spec) -> Areas:
    """Counts a label map uint8 [H, W]."""
    # Pillow counts bytes as they are, np.bincount makes each an int64 first.
    counts = Image.fromarray(labels).histogram()
    found = [
        ClassArea(label, count, count / labels.size)
        for label, count in enumerate(counts[: spec.class_count])
        if count
    ]
    found.sort(key=lambda area: (-area.pixels, area.id))
    return Areas(tuple(found), sum(counts[spec.class_count :]))


def border_length(labels: Pixels) -> int:
    """Number of neighbouring pixels of a label map uint8 [H, W] that differ.

    All polygons together have at most about twice as many corners; all run lengths have as many
    numbers, and a few for each column and class. It is quick, so it can limit the work in advance.
    """
    down = np.count_nonzero(labels[1:] != labels[:-1])
    across = np.count_nonzero(labels[:, 1:] != labels[:, :-1])
    return int(down + across)


@dataclass(frozen=True)
class LabelRuns:
    """The pixels of one label in a label map."""

    label: int
    area: int
    """Pixels."""
    box: tuple[int, int, int, int]
    """Bounding box in pixels: x, y, width, height."""
    counts: list[int]
    """COCO's uncompressed run lengths: numbers of other pixels and of the label's in turn, starting
    with others, down the columns."""


def label_runs(labels: Pixels) -> Iterator[LabelRuns]:
    """All labels that occur in a label map uint8 [H, W], by label, found in one pass: a pass for
    each label takes longer."""
    height = labels.shape[0]
    column_order = labels.ravel(order="F")
    if column_order.size == 0:
        return
    changes = np.flatnonzero(column_order[1:] != column_order[:-1]) + 1
    starts = np.concatenate([[0], changes])
    ends = np.concatenate([changes, [column_order.size]])
    values = column_order[starts]
    order = np.argsort(values, kind="stable")
    firsts = np.flatnonzero(np.diff(values[order], prepend=-1))
    for first, last in pairwise([*firsts.tolist(), len(order)]):
        mine = order[first:last]
        begin, end = starts[mine], ends[mine]
        bounds = np.concatenate([[0], np.column_stack([begin, end]).ravel(), [column_order.size]])
        counts: list[int] = np.diff(bounds).tolist()
        if counts[-1] == 0:
            counts.pop()
        yield LabelRuns(
            label=int(values[mine[0]]),
            area=int((end - begin).sum()),
            box=_box(begin, end - 1, height),
            counts=counts,
        )


def _box(first: Places, last: Places, height: int) -> tuple[int, int, int, int]:
    """x, y, width and height around runs down the columns. first, last: places of their first and
    last pixels, int64 [runs], in growing order."""
    left, right = int(first[0]) // height, int(last[-1]) // height
    if (first // height != last // height).any():  # from one column's foot to the next one's head
        return left, 0, right - left + 1, height
    top, bottom = int((first % height).min()), int((last % height).max())
    return left, top, right - left + 1, bottom - top + 1


def polygons(mask: Mask) -> list[Polygon]:
    """The outlines of a mask bool [H, W], through the middle between pixels inside and outside.

    Coordinates are in pixels: the image's top left corner is (0, 0), the first pixel's centre
    (0.5, 0.5). A pixel's centre lies inside by the even-odd rule exactly where the mask is set.
    Takes about 30 bytes of memory for each pixel of the mask's bounding box.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return []
    top, left = int(rows[0]), int(columns[0])
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    # The rim of zeros closes the outlines at the image's edge.
    padded = np.zeros((part.shape[0] + 2, part.shape[1] + 2))
    padded[1:-1, 1:-1] = part
    generator = contour_generator(z=padded, fill_type=FillType.ChunkCombinedOffsetOffset)
    # All rings in one array, and in which of them polygons begin: noise makes very many.
    filled = cast(tuple[list[Points], list[Offsets], list[Offsets]], generator.filled(0.5, 2.0))
    (points,), (rings,), (outer,) = filled
    corners, bounds = _corners(points, rings.astype(np.int64))
    # contourpy's coordinates are those of pixel centres, and of the padded part.
    listed: Ring = (corners + (left - 0.5, top - 0.5)).tolist()
    found = [listed[start:end] for start, end in pairwise(bounds)]
    return [found[start:end] for start, end in pairwise(outer.tolist())]


def _corners(points: Points, offsets: npt.NDArray[np.int64]) -> tuple[Points, list[int]]:
    """Rings without repeated ends and without points between two others on a line, and where each
    ring begins and the last ends.

    points float64 [P, 2]: rings one after the other, each closed by its first point again; offsets
    int64 [rings + 1].
    """
    firsts, lasts = offsets[:-1], offsets[1:] - 1
    before, after = np.arange(len(points)) - 1, np.arange(len(points)) + 1
    before[firsts] = lasts - 1
    after[lasts] = lasts  # of no use: the last points go
    step, next_step = points - points[before], points[after] - points
    turns = step[:, 0] * next_step[:, 1] != step[:, 1] * next_step[:, 0]  # exact: halves
    turns[lasts] = False
    kept = np.concatenate([[0], np.cumsum(turns)])
    return points[turns], kept[offsets].tolist()
