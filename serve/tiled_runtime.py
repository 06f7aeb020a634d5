"""A runtime that looks at large images tile by tile."""

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels
from srdeploy.serve.runtime import Logits, Runtime
from srdeploy.serve.tiling import Span, blending, cuts, spans
from srdeploy.serve.wrapped_runtime import WrappedRuntime
from srdeploy.spec import InputPolicy

GRID = 32
"""Tiles start on multiples of it: networks halve images up to five times, and see the same pixels
together only where they halve them alike."""
LARGEST = 1 << 20
"""Pixels a side; what bounds an image is the memory."""


class TiledRuntime(WrappedRuntime):
    """Images of any size, at their own size, through a network that sees tiles of them.

    Inside the tiles, further from their edges than the network looks, logits are those of the whole
    image. Where tiles overlap, their logits are blended; of graphs that give labels alone, each
    tile decides up to the middle of the overlap. Networks that look at the image as a whole (global
    pooling) give other logits for tiles. Images smaller than what the network takes are padded
    with the mean colour, and the result is cut.
    """

    def __init__(
        self, inner: Runtime, tile: tuple[int, int], overlap: int | None = None, batch: int = 1
    ) -> None:
        """tile: (height, width). overlap: in pixels; None: a quarter of the shorter side. batch:
        tiles in one run, at most. Raises UserError where the network can't take such tiles."""
        policy = inner.spec.input
        fixed = _fixed_size(inner)
        self._exact = fixed is not None
        if fixed is not None and tile != fixed:
            raise UserError(
                f"{inner.path} takes images of {fixed[0]}x{fixed[1]} alone: use --tile "
                f"{fixed[0]}x{fixed[1]}"
            )
        if inner.input_shape[0] not in (None, 1):
            raise UserError(
                f"{inner.path} takes {inner.input_shape[0]} images at once and no other number: "
                "tiles need a graph that takes one"
            )
        self._grid = lcm(GRID, policy.multiple)
        self._overlap = min(tile) // 4 if overlap is None else overlap
        step = min(tile) - self._overlap
        if step < self._grid or (fixed is None and min(tile) < max(policy.smallest)):
            raise UserError(
                f"tiles of {tile[0]}x{tile[1]} that overlap by {self._overlap} are too small: "
                f"they must be {max(policy.smallest)} pixels a side at least, and longer than the "
                f"overlap by {self._grid}"
            )
        if policy.multiple > 1 and any(side % policy.multiple for side in tile):
            raise UserError(
                f"{inner.path} takes sizes divisible by {policy.multiple} alone: choose such a tile"
            )
        super().__init__(
            inner,
            inner.spec.model_copy(
                update={
                    "input": InputPolicy(smallest=(1, 1), usual=tile, largest=(LARGEST, LARGEST))
                }
            ),
            (None, None, None, 3),
        )
        self._tile = tile
        self._least = fixed or policy.smallest
        self._batch = 1 if inner.input_shape[0] == 1 else batch

    def _labels(self, images: Pixels) -> Pixels:
        return np.stack([self._labels_of(image) for image in images])

    def _logits(self, images: Pixels) -> Logits:
        count, height, width = images.shape[:3]
        logits = np.empty((count, self.spec.class_count, height, width), np.float32)
        for own, image in zip(logits, images, strict=True):
            for rows, band in self._bands(image):
                own[:, rows.start : rows.end] = band
        return logits

    def _labels_of(self, image: Pixels) -> Pixels:
        """Labels uint8 [H, W] of an image uint8 [H, W, 3]."""
        labels = np.empty(image.shape[:2], np.uint8)
        if self.inner.gives_logits:
            for done, band in self._bands(image):
                labels[done.start : done.end] = band.argmax(0)
            return labels
        padded = self._padded(image)
        rows, columns = self._layout(padded)
        whole = np.empty(padded.shape[:2], np.uint8)
        for row, own_rows in zip(rows, cuts(rows), strict=True):
            found = self._run_row(padded, row, columns, self.inner.run)
            for column, own, tile in zip(columns, cuts(columns), found, strict=True):
                whole[own_rows.start : own_rows.end, own.start : own.end] = tile[
                    own_rows.start - row.start : own_rows.end - row.start,
                    own.start - column.start : own.end - column.start,
                ]
        labels[:] = whole[: image.shape[0], : image.shape[1]]
        return labels

    def _bands(self, image: Pixels) -> Iterator[tuple[Span, Logits]]:
        """(rows, logits float32 [K, rows, W]) of an image from top to bottom.

        The logits of one row of tiles and its overlap are in memory at a time: those of a whole
        large photo are gigabytes. The array is used again for the next band.
        """
        height, width = image.shape[:2]
        padded = self._padded(image)
        rows, columns = self._layout(padded)
        down, across = blending(rows, self._overlap), blending(columns, self._overlap)
        most = max(row.length for row in rows)
        shape = (self.spec.class_count, most, padded.shape[1])
        sums = np.zeros(shape, np.float32)
        top = 0  # the image's row that `sums` begins with
        for index, row in enumerate(rows):
            found = self._run_row(padded, row, columns, self.inner.logits)
            for column, tile, weight in zip(columns, found, across, strict=True):
                place = sums[:, row.start - top : row.end - top, column.start : column.end]
                place += tile * (down[index][:, None] * weight)
            bottom = rows[index + 1].start if index + 1 < len(rows) else padded.shape[0]
            done = Span(top, min(bottom, height))
            if done.length > 0:
                yield done, sums[:, : done.length, :width]
            kept = row.end - bottom
            if kept > 0:
                sums[:, :kept] = sums[:, bottom - top : row.end - top].copy()
            sums[:, max(kept, 0) :] = 0
            top = bottom

    def _run_row(
        self, image: Pixels, row: Span, columns: Sequence[Span], run: Any
    ) -> Iterator[npt.NDArray[Any]]:
        """What `run` gives for each tile of a row, those of one size in batches."""
        for _, group in groupby(columns, key=lambda column: column.length):
            while tiles := tuple(islice(group, self._batch)):
                parts = [image[row.start : row.end, one.start : one.end] for one in tiles]
                yield from run(np.stack(parts))

    def _layout(self, image: Pixels) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        """The tiles' rows and columns."""
        down, across = (
            spans(image.shape[axis], self._tile[axis], self._overlap, self._grid, self._exact)
            for axis in (0, 1)
        )
        return down, across

    def _padded(self, image: Pixels) -> Pixels:
        """The image, and mean colour below and right of it where it is too small."""
        height, width = (max(image.shape[axis], self._least[axis]) for axis in (0, 1))
        if (height, width) == image.shape[:2]:
            return image
        padded = np.empty((height, width, 3), np.uint8)
        padded[:] = np.rint(255 * np.asarray(self.spec.mean))
        padded[: image.shape[0], : image.shape[1]] = image
        return padded


def _fixed_size(runtime: Runtime) -> tuple[int, int] | None:
    """(height, width) where the runtime takes one alone."""
    _, height, width, _ = runtime.input_shape
    if height is not None and width is not None:
        return height, width
    policy = runtime.spec.input
    return policy.largest if policy.fixed else None
