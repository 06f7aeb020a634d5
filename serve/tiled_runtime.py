"""A runtime that looks at large images tile by tile."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, strongest
from srdeploy.serve.runtime import Logits, Runtime
from srdeploy.serve.tiling import Span, blending, cuts, spans
from srdeploy.serve.wrapped_runtime import WrappedRuntime
from srdeploy.spec import InputPolicy

GRID = 32
"""Tiles start on multiples of it: networks halve images up to five times, and see the same pixels
together only where they halve them alike."""
LARGEST = 1 << 20
"""Pixels a side; what bounds an image is the memory."""

Run = Callable[[Pixels], npt.NDArray[Any]]
"""Runtime.run or Runtime.logits."""


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
        self._sides = _fixed_sides(inner)
        fitting = tuple(own or side for own, side in zip(self._sides, tile, strict=True))
        if tile != fitting:
            raise UserError(
                f"{inner.path} takes images of {self._sides[0] or 'H'}x{self._sides[1] or 'W'} "
                f"alone: use --tile {fitting[0]}x{fitting[1]}"
            )
        if inner.input_shape[0] not in (None, 1):
            raise UserError(
                f"{inner.path} takes {inner.input_shape[0]} images at once and no other number: "
                "tiles need a graph that takes one"
            )
        self._least = tuple(
            own or least for own, least in zip(self._sides, policy.smallest, strict=True)
        )
        self._grid = lcm(GRID, policy.multiple)
        self._overlap = min(tile) // 4 if overlap is None else overlap
        is_small = any(side < least for side, least in zip(tile, self._least, strict=True))
        if is_small or min(tile) - self._overlap < self._grid:
            raise UserError(
                f"tiles of {tile[0]}x{tile[1]} that overlap by {self._overlap} are too small: "
                f"they must be {self._least[0]}x{self._least[1]} at least, and longer than the "
                f"overlap by {self._grid}"
            )
        for own, side in zip(self._sides, tile, strict=True):
            if own is None and side % policy.multiple:
                raise UserError(
                    f"{inner.path} takes sizes divisible by {policy.multiple} alone: choose such a "
                    "tile"
                )
        own_policy = InputPolicy(
            smallest=(1, 1), usual=tile, largest=(max(LARGEST, tile[0]), max(LARGEST, tile[1]))
        )
        super().__init__(
            inner, inner.spec.model_copy(update={"input": own_policy}), (None, None, None, 3)
        )
        self._tile = tile
        self._batch = 1 if inner.input_shape[0] == 1 else batch

    def _labels(self, images: Pixels) -> Pixels:
        height, width = images.shape[1:3]
        padded = self._padded(images)
        rows, columns = self._layout(padded)
        labels = np.empty(images.shape[:3], np.uint8)
        if len(rows) == len(columns) == 1:
            # The graph's own labels: less moves than logits.
            found = self._run(padded, self.inner.run)
            for own, whole in zip(labels, found, strict=True):
                own[:] = whole[:height, :width]
        elif self.inner.gives_logits:
            for own, image in zip(labels, padded, strict=True):
                for done, band in self._bands(image, rows, columns):
                    own[done.start : done.end] = strongest(band)[: len(own) - done.start, :width]
        else:
            for own, image in zip(labels, padded, strict=True):
                for done, right, part in self._parts(image, rows, columns):
                    place = own[done.start : done.end, right.start : right.end]
                    place[:] = part[: place.shape[0], : place.shape[1]]
        return labels

    def _logits(self, images: Pixels) -> Logits:
        count, height, width = images.shape[:3]
        padded = self._padded(images)
        rows, columns = self._layout(padded)
        logits = np.empty((count, self.spec.class_count, height, width), np.float32)
        if len(rows) == len(columns) == 1:
            found = self._run(padded, self.inner.logits)
            for own, whole in zip(logits, found, strict=True):
                own[:] = whole[:, :height, :width]
            return logits
        for own, image in zip(logits, padded, strict=True):
            for done, band in self._bands(image, rows, columns):
                place = own[:, done.start : done.end]
                place[:] = band[:, : place.shape[1], :width]
        return logits

    def _parts(
        self, image: Pixels, rows: Sequence[Span], columns: Sequence[Span]
    ) -> Iterator[tuple[Span, Span, Pixels]]:
        """(rows, columns, labels uint8 [rows, columns]) that each tile decides alone."""
        for row, down in zip(rows, cuts(rows), strict=True):
            found = self._run_row(image, row, columns, self.inner.run)
            for column, across, tile in zip(columns, cuts(columns), found, strict=True):
                yield (
                    down,
                    across,
                    tile[
                        down.start - row.start : down.end - row.start,
                        across.start - column.start : across.end - column.start,
                    ],
                )

    def _bands(
        self, image: Pixels, rows: Sequence[Span], columns: Sequence[Span]
    ) -> Iterator[tuple[Span, Logits]]:
        """(rows, logits float32 [K, rows, W]) of an image from top to bottom.

        The logits of one row of tiles and its overlap are in memory at a time: those of a whole
        large photo are gigabytes. The array is used again for the next band.
        """
        down, across = blending(rows, self._overlap), blending(columns, self._overlap)
        most = max(row.length for row in rows)
        sums = np.zeros((self.spec.class_count, most, image.shape[1]), np.float32)
        ends = [*(row.start for row in rows[1:]), len(image)]
        for row, bottom, weights in zip(rows, ends, down, strict=True):
            found = self._run_row(image, row, columns, self.inner.logits)
            for column, tile, weight in zip(columns, found, across, strict=True):
                place = sums[:, : row.length, column.start : column.end]
                place += tile * (weights[:, None] * weight)
            done = Span(row.start, bottom)
            yield done, sums[:, : done.length]
            kept = row.end - bottom  # rows to which the next tiles add
            sums[:, :kept] = sums[:, done.length : row.length].copy()
            sums[:, kept:] = 0

    def _run_row(
        self, image: Pixels, row: Span, columns: Sequence[Span], run: Run
    ) -> Iterator[npt.NDArray[Any]]:
        """What `run` gives for each tile of a row."""
        for _, alike in groupby(columns, key=lambda column: column.length):
            yield from self._run(
                (image[row.start : row.end, one.start : one.end] for one in alike), run
            )

    def _run(self, tiles: Iterable[Pixels], run: Run) -> Iterator[npt.NDArray[Any]]:
        """What `run` gives for each of several tiles of one size, in batches."""
        left = iter(tiles)
        while some := tuple(islice(left, self._batch)):
            yield from run(np.stack(some))

    def _layout(self, images: Pixels) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        """The tiles' rows and columns."""
        down, across = (
            spans(length, side, self._overlap, self._grid, exact=own is not None)
            for length, side, own in zip(images.shape[1:3], self._tile, self._sides, strict=True)
        )
        return down, across

    def _padded(self, images: Pixels) -> Pixels:
        """The images, and mean colour below and right of them where they are too small."""
        count, height, width = images.shape[:3]
        size = max(height, self._least[0]), max(width, self._least[1])
        if size == (height, width):
            return images
        padded = np.empty((count, *size, 3), np.uint8)
        padded[:] = np.rint(255 * np.asarray(self.spec.mean))
        padded[:, :height, :width] = images
        return padded


def _fixed_sides(runtime: Runtime) -> tuple[int | None, int | None]:
    """Height and width where the runtime takes one alone; None: any."""
    policy = runtime.spec.input
    return policy.largest if policy.fixed else runtime.input_shape[1:3]
