"""Areas, run lengths and polygons of label maps."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from srdeploy.imaging import Pixels
from srdeploy.regions import (
    Areas,
    ClassArea,
    Mask,
    Polygon,
    border_length,
    class_areas,
    label_runs,
    polygons,
)
from srdeploy.spec import Spec

SPEC = Spec(classes=("a", "b", "c"), palette=((1, 2, 3), (200, 0, 0), (0, 0, 200)))


def masks() -> st.SearchStrategy[Mask]:
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
    return hnp.arrays(np.bool_, shapes)


def inside(found: list[Polygon], height: int, width: int) -> Mask:
    """Which pixel centres lie inside, by the even-odd rule, told by rays to the right."""
    crossings = np.zeros((height, width), int)
    rows, columns = np.mgrid[:height, :width] + 0.5
    for ring in (ring for polygon in found for ring in polygon):
        for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
            if y0 == y1:
                continue
            spans = (y0 <= rows) != (y1 <= rows)
            crossings += spans & (columns < x0 + (rows - y0) * (x1 - x0) / (y1 - y0))
    return np.asarray(crossings % 2 == 1)


def area(ring: list[list[float]]) -> float:
    """Positive for the one direction, negative for the other."""
    x, y = np.array(ring).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


@settings(max_examples=150, deadline=None)
@given(mask=masks())
def test_a_pixels_centre_is_inside_the_polygons_exactly_where_the_mask_is_set(mask: Mask) -> None:
    np.testing.assert_array_equal(inside(polygons(mask), *mask.shape), mask)


@settings(max_examples=100, deadline=None)
@given(mask=masks())
def test_polygons_have_one_outer_ring_then_holes_of_its_other_direction(mask: Mask) -> None:
    for outer, *holes in polygons(mask):
        assert area(outer) > 0
        assert all(area(hole) < 0 for hole in holes)
        assert area(outer) + sum(map(area, holes)) > 0


@settings(max_examples=100, deadline=None)
@given(mask=masks())
def test_no_corner_of_a_polygon_is_needless(mask: Mask) -> None:
    for ring in (ring for polygon in polygons(mask) for ring in polygon):
        points = np.array(ring)
        steps, next_steps = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
        turn = steps[:, 0] * next_steps[:, 1] - steps[:, 1] * next_steps[:, 0]
        assert (turn != 0).all()
        assert len(points) >= 4


def test_coordinates_are_pixels_from_the_images_corner() -> None:
    mask = np.zeros((20, 30), bool)
    mask[3, 7] = True
    (((*corners,),),) = polygons(mask)
    assert sorted(corners) == [[7.0, 3.5], [7.5, 3.0], [7.5, 4.0], [8.0, 3.5]]
    (((*whole,),),) = polygons(np.ones((20, 30), bool))
    assert np.min(whole, 0).tolist() == [0, 0]
    assert np.max(whole, 0).tolist() == [30, 20]
    assert len(whole) == 8


def test_a_hole_belongs_to_the_polygon_around_it() -> None:
    mask = np.zeros((12, 30), bool)
    mask[2:11, 2:11] = mask[2:11, 15:24] = True
    mask[5, 5] = mask[8, 8] = mask[5, 20] = False
    assert sorted(len(polygon) for polygon in polygons(mask)) == [2, 3]


def test_an_empty_mask_has_no_polygons() -> None:
    assert polygons(np.zeros((3, 4), bool)) == []


@settings(max_examples=50, deadline=None)
@given(
    labels=hnp.arrays(
        np.uint8,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
        elements=st.sampled_from([0, 1, 2, 3, 254, 255]),
    )
)
def test_areas_count_every_pixel_once(labels: Pixels) -> None:
    areas = class_areas(labels, SPEC)
    assert sum(area.pixels for area in areas.classes) + areas.ignored == labels.size
    for found in areas.classes:
        assert found.pixels == (labels == found.id).sum() > 0
        assert found.share == found.pixels / labels.size
    assert areas.ignored == (labels > 2).sum()
    assert list(areas.classes) == sorted(areas.classes, key=lambda area: -area.pixels)


def test_classes_that_occur_are_listed_the_largest_first() -> None:
    labels = np.array([[2, 2, 2], [0, 255, 7]], np.uint8)
    assert class_areas(labels, SPEC) == Areas((ClassArea(2, 3, 0.5), ClassArea(0, 1, 1 / 6)), 2)


@settings(max_examples=100, deadline=None)
@given(
    labels=hnp.arrays(
        np.uint8,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9),
        elements=st.sampled_from([0, 1, 2, 255]),
    )
)
def test_runs_of_a_label_give_its_mask_back_and_alternate_from_other_pixels(
    labels: Pixels,
) -> None:
    found = list(label_runs(labels))
    assert [runs.label for runs in found] == sorted(set(labels.ravel().tolist()))
    for runs in found:
        mask = labels == runs.label
        values = np.arange(len(runs.counts)) % 2 == 1
        drawn = np.repeat(values, runs.counts).reshape(labels.shape, order="F")
        np.testing.assert_array_equal(drawn, mask)
        assert all(count > 0 for count in runs.counts[1:])
        assert runs.area == mask.sum()
        rows, columns = np.nonzero(mask)
        left, top = columns.min(), rows.min()
        width, height = columns.max() - left + 1, rows.max() - top + 1
        assert runs.box == (left, top, width, height)
    assert list(label_runs(np.asfortranarray(labels))) == found


def test_runs_go_down_the_columns_and_start_with_other_pixels() -> None:
    first, second = label_runs(np.array([[0, 1], [0, 1], [1, 0]], np.uint8))
    assert (first.counts, second.counts) == ([0, 2, 3, 1], [2, 3, 1])
    assert (first.box, second.box) == ((0, 0, 2, 3), (0, 0, 2, 3))


@settings(max_examples=50, deadline=None)
@given(mask=masks())
def test_the_border_bounds_the_corners_and_the_runs(mask: Mask) -> None:
    labels = mask.astype(np.uint8)
    border = border_length(np.pad(labels, 1))
    assert sum(len(ring) for polygon in polygons(mask) for ring in polygon) <= border
    for runs in label_runs(labels):
        assert len(runs.counts) <= border_length(labels) + mask.shape[1] + 2
