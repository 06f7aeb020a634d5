"""Scores of maps and masks, against masks compared pixel by pixel."""

from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srdeploy.data.classes import colour_map
from srdeploy.metrics import Score
from srdeploy.spec import Spec
from srdeploy.train.weak.decide import (
    LEVELS,
    MapScores,
    best,
    confusion,
    mean_iou,
    read_scores,
    score_photo,
    with_background,
    write_scores,
)
from srdeploy.train.weak.maps import PhotoMaps

SPEC = Spec(classes=("background", "a", "b"), palette=colour_map(3), ignore_index=255)
few = settings(max_examples=30, deadline=None)


def labels(seed: int, values: list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), (9, 11))


def scored(seed: int) -> MapScores:
    rng = np.random.default_rng(seed)
    found = PhotoMaps((1, 2), rng.random((2, 9, 11)).astype(np.float32))
    mask = labels(seed + 1, [0, 1, 2, 255])
    return score_photo(labels(seed, [0, 1, 2, 255]), found, found, mask, SPEC, 0, level=0.25)


@few
@given(st.integers(0, 2**31))
def test_miou_is_that_of_evaluation_where_nothing_is_ignored(seed: int) -> None:
    truth, guess = labels(seed, [0, 1, 2, 255]), labels(seed + 1, [0, 1, 2])
    score = Score(SPEC)
    score.update(truth, guess)
    assert mean_iou(confusion(truth, guess, SPEC), SPEC) == pytest.approx(score.result().miou)


@few
@given(st.integers(0, 2**31))
def test_pixels_that_the_mask_ignores_count_for_nothing(seed: int) -> None:
    truth, guess = labels(seed, [0, 1, 2, 255]), labels(seed + 1, [0, 1, 2, 255])
    known = (truth != 255) & (guess != 255)
    expected = np.zeros((3, 3), np.int64)
    for i in range(3):
        for j in range(3):
            expected[i, j] = ((truth == i) & (guess == j) & known).sum()
    assert (confusion(truth, guess, SPEC) == expected).all()


def test_coverage_is_the_share_of_labelled_pixels_that_the_mask_decides() -> None:
    truth = np.array([[0, 1, 255, 2]], np.uint8)
    mask = np.array([[0, 255, 1, 2]], np.uint8)
    maps = PhotoMaps((1, 2), np.zeros((2, 1, 4), np.float32))
    found = score_photo(truth, maps, maps, mask, SPEC, 0, level=0.25).summary(SPEC)
    assert found["coverage"] == pytest.approx(2 / 3)


def test_the_best_level_of_the_background_is_found() -> None:
    """The object's map is 0.5, the background's 0.38: only levels between them part the two."""
    truth = np.array([[1] * 6 + [0] * 6], np.uint8)
    maps = PhotoMaps((1,), np.where(truth == 1, 0.5, 0.38)[None].astype(np.float32))
    found = score_photo(truth, maps, maps, truth, SPEC, 0, level=0.25).summary(SPEC)
    assert found["best_background"]["level"] in (0.4, 0.45)
    assert found["best_background"]["miou"] == 1
    assert found["refined"]["miou"] < 1


@few
@given(st.integers(0, 2**31), st.integers(0, 2))
def test_every_level_is_counted_as_if_it_were_the_background(seed: int, tags: int) -> None:
    """Maps of a few values, so that some equal a level."""
    rng = np.random.default_rng(seed)
    values = np.array([0, 0.05, 0.12, 0.3, 0.35, 0.6, 0.9], np.float32)
    found = PhotoMaps((1, 2)[:tags], rng.choice(values, (tags, 9, 11)))
    truth = labels(seed, [0, 1, 2, 255])
    counted = score_photo(truth, found, found, truth, SPEC, 0, level=0.25).levels
    for level, counts in zip(LEVELS, counted, strict=True):
        expected = confusion(truth, best(with_background(found, 0, level)), SPEC)
        assert (counts == expected).all()


def test_a_teachers_maps_have_no_level_to_look_for() -> None:
    maps = PhotoMaps((0, 1), np.full((2, 1, 2), 0.5, np.float32))
    truth = np.array([[0, 1]], np.uint8)
    found = score_photo(truth, maps, maps, truth, SPEC, 0, level=0.25).summary(SPEC)
    assert found["best_background"] is None


@few
@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=4))
def test_scores_of_photos_add_up(seeds: list[int]) -> None:
    total = reduce(add, [scored(seed) for seed in seeds])
    assert (total.cam == sum(scored(seed).cam for seed in seeds)).all()
    assert total.levels.shape == (len(LEVELS), 3, 3)
    assert total.labelled == sum(scored(seed).labelled for seed in seeds)


def test_kept_scores_come_back(tmp_path: Path) -> None:
    found = scored(5)
    write_scores(tmp_path / "one.npz", found)
    again = read_scores(tmp_path / "one.npz")
    assert again.summary(SPEC) == found.summary(SPEC)
