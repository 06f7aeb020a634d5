"""Scores against slow, independent counting: nested loops and a flood fill in plain Python."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from srdeploy import metrics
from srdeploy.errors import UserError
from srdeploy.metrics import LARGE_SHARE, SMALL_SHARE, SPECK_PIXELS, Labels, Score
from srdeploy.spec import Spec

VOID = 255


def spec_of(*names: str, scored: tuple[int, ...] | None = None) -> Spec:
    palette = tuple((i, i, i) for i in range(len(names)))
    return Spec(classes=names, palette=palette, scored=scored)


def label_maps(side: int, classes: int) -> st.SearchStrategy[Labels]:
    """Square maps of large blocks, so that components of all sizes occur."""
    values = st.sampled_from([*range(classes), VOID])
    coarse = hnp.arrays(np.uint8, (side // 8, side // 8), elements=values)
    return coarse.map(lambda blocks: blocks.repeat(8, 0).repeat(8, 1))


def flood(labels: Labels, index: int) -> list[list[tuple[int, int]]]:
    """The 8-connected components of one class, as lists of pixels."""
    height, width = labels.shape
    left = {(r, c) for r in range(height) for c in range(width) if labels[r, c] == index}
    components = []
    while left:
        queue, found = deque([left.pop()]), []
        while queue:
            row, column = queue.popleft()
            found.append((row, column))
            for r in (row - 1, row, row + 1):
                for c in (column - 1, column, column + 1):
                    if (r, c) in left:
                        left.remove((r, c))
                        queue.append((r, c))
        components.append(found)
    return components


@settings(max_examples=40, deadline=None)
@given(
    truth=hnp.arrays(np.uint8, (5, 7), elements=st.sampled_from([0, 1, 2, 3, VOID])),
    guess=hnp.arrays(np.uint8, (5, 7), elements=st.integers(0, 3)),
    scored=st.sampled_from([None, (0, 2), (3,)]),
)
def test_confusion_iou_and_accuracy_equal_counting_pixel_by_pixel(
    truth: Labels, guess: Labels, scored: tuple[int, ...] | None
) -> None:
    spec = spec_of("background", "cat", "dog", "cow", scored=scored)
    confusion = np.zeros((4, 4), int)
    for true, predicted in zip(truth.flat, guess.flat, strict=True):
        if true in spec.scored_ids:
            confusion[true, predicted] += 1
    score = Score(spec)
    score.update(truth, guess)
    np.testing.assert_array_equal(score.confusion, confusion)
    if confusion.sum() == 0:
        with pytest.raises(UserError, match="nothing to score"):
            score.result()
        return
    result = score.result()
    assert result.pixel_accuracy == pytest.approx(np.trace(confusion) / confusion.sum())
    ious = {}
    for index in spec.scored_ids:
        hit = confusion[index, index]
        union = confusion[index].sum() + confusion[:, index].sum() - hit
        ious[spec.classes[index]] = hit / union if union else None
    assert result.iou == pytest.approx(ious)
    assert result.miou == pytest.approx(np.mean([v for v in ious.values() if v is not None]))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_both_failures_equal_a_flood_fill(data: st.DataObject) -> None:
    side = 48
    spec = spec_of("background", "cat", "dog", "cow", scored=(0, 1, 2))
    truth = data.draw(label_maps(side, 4))
    guess = np.where(data.draw(label_maps(side, 4)) == VOID, 0, truth)
    # Errors at single pixels too, so that recalls take many values.
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    wrong = rng.random(truth.shape) < data.draw(st.sampled_from([0.1, 0.5, 0.7]))
    guess = np.where(wrong, rng.integers(0, 4, truth.shape), guess).astype(np.uint8)
    guess[guess == VOID] = 0
    truth[rng.random(truth.shape) < 0.03] = VOID
    score = Score(spec)
    score.update(truth, guess)
    if score.confusion.sum() == 0:
        return
    result = score.result()
    area = side * side
    small_all, missed_all, pixels_all, taken_all = 0, 0, 0, 0
    for index, name in ((1, "cat"), (2, "dog")):
        small, missed, pixels, taken = 0, 0, 0, 0
        for component in flood(truth, index):
            seen = [guess[place] for place in component]
            recall = seen.count(index) / len(seen)
            if SPECK_PIXELS <= len(component) < SMALL_SHARE * area:
                small += 1
                missed += recall < 0.5
            if len(component) >= LARGE_SHARE * area and recall > 0.5:
                pixels += len(component)
                taken += sum(other in (1, 2) and other != index for other in seen)
        assert result.small_components[name] == small
        assert result.failure1_per_class[name] == (missed / small if small else None)
        assert result.failure2_per_class[name] == (taken / pixels if pixels else None)
        small_all, missed_all = small_all + small, missed_all + missed
        pixels_all, taken_all = pixels_all + pixels, taken_all + taken
    assert result.failure1 == (missed_all / small_all if small_all else None)
    assert result.failure2 == (taken_all / pixels_all if pixels_all else None)


def test_a_missed_small_thing_and_a_confused_part_are_the_two_failures() -> None:
    spec = spec_of("background", "cow", "buffalo")
    truth = np.zeros((100, 100), np.uint8)
    truth[5:10, 5:10] = 1  # small, missed
    truth[5:10, 30:35] = 1  # small, found
    truth[20:23, 90:93] = 1  # a speck of 9 pixels
    truth[40:80, 20:80] = 2  # large, a quarter taken by cow, a tenth by background
    guess = truth.copy()
    guess[5:10, 5:10] = 0
    guess[20:23, 90:93] = 0
    guess[40:80, 20:35] = 1
    guess[40:44, 35:80] = 0
    score = Score(spec)
    score.update(truth, guess)
    result = score.result()
    assert result.failure1 == 0.5
    assert result.failure1_per_class == {"cow": 0.5, "buffalo": None}
    assert result.small_components == {"cow": 2, "buffalo": 0}
    assert result.failure2 == 0.25
    assert result.failure2_per_class == {"cow": None, "buffalo": 0.25}


def test_things_that_touch_at_a_corner_are_one() -> None:
    spec = spec_of("background", "cow")
    truth = np.zeros((80, 80), np.uint8)
    truth[0:4, 0:4] = truth[4:8, 4:8] = 1
    score = Score(spec)
    score.update(truth, truth)
    assert score.result().small_components["cow"] == 1


@settings(max_examples=15, deadline=None)
@given(maps=st.lists(label_maps(48, 3), min_size=2, max_size=4))
def test_a_perfect_prediction_scores_one_and_order_does_not_matter(maps: list[Labels]) -> None:
    spec = spec_of("road", "car", "tree")
    forth, back = Score(spec), Score(spec)
    for labels in maps:
        forth.update(labels, np.where(labels == VOID, 0, labels).astype(np.uint8))
    for labels in reversed(maps):
        back.update(labels, np.where(labels == VOID, 0, labels).astype(np.uint8))
    if forth.confusion.sum() == 0:
        return
    result = forth.result()
    assert result == back.result()
    assert (result.miou, result.pixel_accuracy) == (1, 1)
    assert result.failure1 in (0, None)
    assert result.failure2 in (0, None)
    assert result.images == len(maps)


def test_a_class_that_is_predicted_but_absent_counts_as_zero_and_an_unseen_one_not() -> None:
    score = Score(spec_of("road", "car", "tree"))
    score.update(np.zeros((4, 4), np.uint8), np.array([[0, 0, 0, 1]] * 4, np.uint8))
    result = score.result()
    assert result.iou == {"road": 0.75, "car": 0.0, "tree": None}
    assert result.miou == 0.375


def test_a_prediction_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"shape \(4, 5\), its labels \(4, 4\)"):
        Score(spec_of("a", "b")).update(np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8))


@pytest.mark.parametrize(
    ("truth", "guess", "message"),
    [(2, 0, "label 2 is neither one of 2 classes"), (0, 2, "predicted label 2 is not one of 2")],
)
def test_labels_out_of_range_are_refused(truth: int, guess: int, message: str) -> None:
    maps = np.full((4, 4), truth, np.uint8), np.full((4, 4), guess, np.uint8)
    with pytest.raises(UserError, match=message):
        Score(spec_of("a", "b")).update(*maps)


def test_the_table_shows_percent_with_two_decimals_and_a_dash_for_nothing() -> None:
    from io import StringIO

    from rich.console import Console

    score = Score(spec_of("background", "cow"))
    score.update(np.zeros((3, 1), np.uint8), np.array([[0], [0], [1]], np.uint8))
    out = StringIO()
    Console(file=out, width=100).print(score.result().table("val"))
    assert "66.67" in out.getvalue()
    assert metrics.percent(2 / 3) == "66.67"
    assert metrics.percent(None) == "-"


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)))
def test_components_are_numbered_as_scipy_numbers_them(mask: np.ndarray) -> None:
    expected, count = ndimage.label(mask, np.ones((3, 3), np.int8))
    found, found_count = metrics.connected_components(mask)
    assert found_count == count
    np.testing.assert_array_equal(found, expected)


def test_components_of_noise_are_numbered_as_scipy_numbers_them() -> None:
    """Larger than hypothesis draws: many runs that join late."""
    for share in (0.1, 0.4, 0.6):
        mask = np.random.default_rng(0).random((120, 90)) < share
        expected, count = ndimage.label(mask, np.ones((3, 3), np.int8))
        found, found_count = metrics.connected_components(mask)
        assert found_count == count
        np.testing.assert_array_equal(found, expected)
