"""From maps to masks: who wins, what is ignored, and that no class comes from nowhere."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from srdeploy.train.weak.decide import best, certainty, decide, with_background
from srdeploy.train.weak.maps import PhotoMaps

IGNORE = 255
few = settings(max_examples=50, deadline=None)
tag_sets = st.frozensets(st.integers(1, 20), max_size=4)


def made(tags: frozenset[int], seed: int) -> PhotoMaps:
    rng = np.random.default_rng(seed)
    return PhotoMaps(tuple(sorted(tags)), rng.random((len(tags), 5, 7)).astype(np.float32))


@few
@given(tag_sets, st.integers(0, 2**31), st.floats(0.01, 0.99), st.floats(0, 0.9))
def test_a_mask_holds_no_class_that_the_tags_lack(
    tags: frozenset[int], seed: int, level: float, certain: float
) -> None:
    labels, _ = decide(with_background(made(tags, seed), 0, level), 0, certain, IGNORE)
    assert set(np.unique(labels).tolist()) <= {0, *tags, IGNORE}


@few
@given(tag_sets, st.integers(0, 2**31), st.floats(0.01, 0.99), st.floats(0, 0.9))
def test_each_pixel_follows_the_rule(
    tags: frozenset[int], seed: int, level: float, certain: float
) -> None:
    """The class of the highest score, the background's being `level`; ignored below `certain`."""
    found = made(tags, seed)
    labels, confidence = decide(with_background(found, 0, level), 0, certain, IGNORE)
    for row in range(5):
        for column in range(7):
            scores = {0: np.float32(level)}
            scores |= {c: found.maps[i, row, column] for i, c in enumerate(found.classes)}
            ranked = sorted(scores, key=lambda c: -scores[c])
            sure = 1.0
            if len(ranked) > 1:
                a, b = scores[ranked[0]], scores[ranked[1]]
                sure = float((a - b) / (a + b))
            if sure < certain:
                assert labels[row, column] == IGNORE
                assert confidence[row, column] == 0
            else:
                assert labels[row, column] == ranked[0]
                assert abs(confidence[row, column] - 255 * sure) <= 0.51


def test_a_photo_without_tags_is_background_for_sure() -> None:
    empty = PhotoMaps((), np.zeros((0, 3, 4), np.float32))
    labels, confidence = decide(with_background(empty, 0, 0.25), 0, 0.2, IGNORE)
    assert (labels == 0).all()
    assert (confidence == 255).all()


def test_nothing_is_background_where_a_tag_was_found_nowhere() -> None:
    """The cow that the classifier does not see may stand anywhere that no dog is."""
    maps = np.zeros((2, 1, 3), np.float32)
    maps[1, 0, 0] = 1
    found = with_background(PhotoMaps((10, 12), maps), 0, level=0.25)
    labels, confidence = decide(found, 0, 0.2, IGNORE)
    assert labels.tolist() == [[12, IGNORE, IGNORE]]
    assert confidence[0, 1] == 0


def test_a_background_with_its_own_map_needs_no_level() -> None:
    maps = np.array([[[0.9, 0.1]], [[0.1, 0.9]]], np.float32)
    found = with_background(PhotoMaps((0, 5), maps), 0, level=0.5)
    assert best(found).tolist() == [[0, 5]]


def test_scores_of_zero_are_uncertain() -> None:
    found = PhotoMaps((0, 5), np.zeros((2, 1, 1), np.float32))
    assert certainty(found)[0, 0] == 0
