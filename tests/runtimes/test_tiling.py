"""Where tiles lie, and how they are blended."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from srdeploy.runtimes.views import blending, cuts, spans

lengths = st.integers(1, 700)
tiles = st.integers(64, 200)
grids = st.sampled_from([1, 8, 32])


@settings(max_examples=200, deadline=None)
@given(lengths, tiles, st.integers(0, 150), grids, st.booleans())
def test_tiles_cover_an_axis_on_the_grid_with_the_overlap(
    length: int, tile: int, overlap: int, grid: int, exact: bool
) -> None:
    overlap = min(overlap, tile - grid)
    found = spans(length, tile, overlap, grid, exact)
    assert (found[0].start, found[-1].end) == (0, length)
    for before, after in zip(found, found[1:], strict=False):
        assert before.start < after.start
        assert before.end - after.start >= overlap
        assert before.length == tile
        assert before.start % grid == 0
    if len(found) > 1:
        assert found[-1].length == tile if exact else tile <= found[-1].length < tile + grid


@settings(max_examples=200, deadline=None)
@given(lengths, tiles, st.integers(0, 150), grids, st.booleans())
def test_weights_sum_to_1_and_every_pixel_has_one_tile_that_decides(
    length: int, tile: int, overlap: int, grid: int, exact: bool
) -> None:
    overlap = min(overlap, tile - grid)
    found = spans(length, tile, overlap, grid, exact)
    total = np.zeros(length)
    for span, weight in zip(found, blending(found, overlap), strict=True):
        assert weight.min() >= 0
        total[span.start : span.end] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    own = cuts(found)
    assert [(one.start, one.end) for one in own] == [
        (before, after)
        for before, after in zip(
            [0, *(one.end for one in own[:-1])],
            [*(one.end for one in own[:-1]), length],
            strict=True,
        )
    ]
    for span, mine in zip(found, own, strict=True):
        assert span.start <= mine.start <= mine.end <= span.end


def test_the_outer_quarter_of_an_overlap_does_not_count() -> None:
    found = spans(160, 96, 32, 32, exact=False)
    first, second = blending(found, 32)
    assert (first[:72] == 1).all()
    assert (first[88:] == 0).all()
    assert (second[:8] == 0).all()
