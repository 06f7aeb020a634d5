"""Runtimes around another one: test-time augmentation, and tiles of large images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from srdeploy.errors import UserError
from srdeploy.graph.signature import Shape
from srdeploy.imaging import Pixels, strongest
from srdeploy.runtimes.base import Logits, Runtime
from srdeploy.spec import InputPolicy, Spec

GRID = 32
"""Tiles start on multiples of it: networks halve images up to five times, and see the same pixels
together only where they halve them alike."""
LARGEST = 1 << 20
"""Pixels a side; what bounds an image is the memory."""

Run = Callable[[Pixels], npt.NDArray[Any]]
"""Runtime.run or Runtime.logits."""
Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in pixels: from `start` to before `end`."""

    start: int
    end: int

    @property
    def length(self) -> int:
        """In pixels."""
        return self.end - self.start


class WrappedRuntime(Runtime):
    """A runtime that looks at images through another one."""

    def __init__(self, inner: Runtime, spec: Spec, input_shape: Shape) -> None:
        """inner: not open yet."""
        super().__init__(inner.artifact, spec, inner.device, input_shape)
        self.inner = inner
        self.backend = inner.backend
        self.precision = inner.precision

    @property
    def gives_logits(self) -> bool:
        """Whether the inner one does."""
        return self.inner.gives_logits

    def _open(self) -> None:
        self.inner.__enter__()
        self.precision = self.inner.precision  # which it knows once it is open

    def _close(self) -> None:
        self.inner.__exit__(None, None, None)


# Averaging over scales and mirror images


class AugmentedRuntime(WrappedRuntime):
    """Test-time augmentation: the classes' probabilities are averaged over the views.

    Its logits are the logarithms of the mean probabilities: softmax gives these back. Only scale 1
    gives what the inner runtime gives, bit for bit.
    """

    def __init__(self, inner: Runtime, scales: Sequence[float], flip: bool) -> None:
        """scales: relative to the images' size. flip: each also mirrored left to right. Raises
        UserError where the graph gives no logits, or takes only one size."""
        if not inner.gives_logits:
            raise UserError(
                f"{inner.path} gives only labels, and scales and mirrored images are averaged "
                "over logits: export it with --output both"
            )
        fixed = inner.spec.input.fixed or inner.input_shape[1:3] != (None, None)
        if fixed and set(scales) != {1.0}:
            raise UserError(f"{inner.path} takes images of only one size: leave --scales away")
        super().__init__(inner, inner.spec, inner.input_shape)
        self._scales = tuple(scales)
        self._flip = flip
        self._plain = not flip and set(scales) == {1.0}

    def _labels(self, images: Pixels) -> Pixels:
        if self._plain:
            return self.inner.run(images)
        return np.stack([strongest(mean) for mean in self._mean(images)])

    def _logits(self, images: Pixels) -> Logits:
        if self._plain:
            return self.inner.logits(images)
        mean = self._mean(images)
        logits: Logits = np.log(np.maximum(mean, np.finfo(np.float32).tiny))
        return logits

    def _mean(self, images: Pixels) -> Logits:
        """Mean probabilities float32 [N, K, H, W] of images uint8 [N, H, W, 3]."""
        size = images.shape[1:3]
        total: Logits | None = None
        for scale in self._scales:
            view = self._scaled(images, scale)
            for mirrored in (False, True) if self._flip else (False,):
                logits = self.inner.logits(view[:, :, ::-1] if mirrored else view)
                logits = _resized(logits[..., ::-1] if mirrored else logits, size[0], size[1])
                shares = _softmax(logits)
                if total is None:
                    total = shares
                else:
                    total += shares
        assert total is not None
        total /= np.float32(len(self._scales) * (2 if self._flip else 1))
        return total

    def _scaled(self, images: Pixels, scale: float) -> Pixels:
        """The images at `scale` times their size, and no smaller than the network takes them."""
        height, width = (
            max(round(images.shape[1 + axis] * scale), self.spec.input.smallest[axis])
            for axis in (0, 1)
        )
        if (height, width) == images.shape[1:3]:
            return images
        return np.stack(
            [
                np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR))
                for one in images
            ]
        )


def _resized(logits: Logits, height: int, width: int) -> Logits:
    """Logits [N, K, h, w] at [N, K, height, width], bilinear with half-pixel centres; where they
    shrink, each takes the mean of what lies under it, as photos do."""
    if logits.shape[2:] == (height, width):
        return logits
    resized = np.empty((*logits.shape[:2], height, width), np.float32)
    for own, planes in zip(resized, logits, strict=True):
        for target, plane in zip(own, planes, strict=True):
            image = Image.fromarray(np.ascontiguousarray(plane))
            target[:] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return resized


def _softmax(logits: Logits) -> Logits:
    """Over K of logits [N, K, H, W], in float32."""
    shares: Logits = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


# Tiled inference


class TiledRuntime(WrappedRuntime):
    """Images of any size, at their own size, through a network that sees tiles of them.

    Inside the tiles, further from their edges than the network looks, logits are those of the whole
    image. Where tiles overlap, their logits are blended; of graphs that give only labels, each
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
                f"{inner.path} takes only images of "
                f"{self._sides[0] or 'H'}x{self._sides[1] or 'W'}: "
                f"use --tile {fitting[0]}x{fitting[1]}"
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
                    f"{inner.path} takes only sizes divisible by {policy.multiple}: choose such a "
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
        """(rows, columns, labels uint8 [rows, columns]) that each tile decides by itself."""
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
    """Height and width where the runtime takes only one; None: any."""
    policy = runtime.spec.input
    return policy.largest if policy.fixed else runtime.input_shape[1:3]


# Tile positions and weights


def spans(length: int, tile: int, overlap: int, grid: int, exact: bool) -> tuple[Span, ...]:
    """The tiles of an axis of `length` pixels: neighbours overlap by `overlap` or more.

    They start on multiples of `grid`. The last one is longer than `tile` by less than `grid`, so
    that it ends with the image; `exact`: it is as long as all others, and starts anywhere.
    """
    if length <= tile:
        return (Span(0, length),)
    step = (tile - overlap) // grid * grid
    last = length - tile if exact else (length - tile) // grid * grid
    starts = [*range(0, last, step), last]
    return (*(Span(start, start + tile) for start in starts[:-1]), Span(last, length))


def blending(tiles: Sequence[Span], overlap: int) -> tuple[Weights, ...]:
    """The weight of each tile at each of its pixels; those of all tiles sum to 1 everywhere.

    At an edge inside the image a tile knows the least: over the outermost quarter of the overlap
    its weight is 0, over the middle half it grows to what it has further inside. Where only one
    tile counts, its weight is exactly 1.
    """
    length = tiles[-1].end
    own = []
    total = np.zeros(length, np.float64)
    for index, tile in enumerate(tiles):
        weight = np.ones(tile.length, np.float64)
        inwards = np.arange(tile.length) + 0.5
        if index > 0:
            weight = np.minimum(weight, _ramp(inwards, overlap))
        if index < len(tiles) - 1:
            weight = np.minimum(weight, _ramp(inwards, overlap)[::-1])
        own.append(weight)
        total[tile.start : tile.end] += weight
    return tuple(
        (weight / total[tile.start : tile.end]).astype(np.float32)
        for tile, weight in zip(tiles, own, strict=True)
    )


def cuts(tiles: Sequence[Span]) -> tuple[Span, ...]:
    """Which pixels each tile decides by itself, where nothing can be blended: neighbours meet in
    the middle of their overlap."""
    middles = [
        (before.end + after.start) // 2 for before, after in zip(tiles, tiles[1:], strict=False)
    ]
    borders = [0, *middles, tiles[-1].end]
    return tuple(Span(start, end) for start, end in zip(borders, borders[1:], strict=False))


def _ramp(inwards: npt.NDArray[Any], overlap: int) -> npt.NDArray[Any]:
    """0 up to a quarter of the overlap from the edge, 1 from three quarters on."""
    if overlap == 0:
        return np.ones_like(inwards)
    return np.clip((inwards - overlap / 4) / (overlap / 2), 0.0, 1.0)
