"""Where the tiles of an image lie, and how much each of them counts at each pixel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
    its weight is 0, over the middle half it grows to what it has further inside. Where one tile
    alone counts, its weight is exactly 1.
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
    """Which pixels each tile decides alone, where nothing can be blended: neighbours part in the
    middle of their overlap."""
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
