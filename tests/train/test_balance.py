"""Class weights against a naive loop, hand arithmetic, and the real set they were published for."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srdeploy.data import open_dataset
from srdeploy.errors import UserError
from srdeploy.train.data import class_weights, count_pixels, median_frequency

SHARED = Path(os.environ.get("SRDEPLOY_DATA", Path(__file__).parents[2] / "../shared/data"))
# The SegNet authors' Caffe model, as the set's README quotes it.
PUBLISHED = [0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, 9.6446, 1.8418, 0.6823, 6.2478, 7.3614]
SIGN_SYMBOL = 6


def naive(masks: list[np.ndarray], classes: int) -> list[float]:
    """Median frequency balancing, spelt out pixel by pixel."""
    frequencies: dict[int, float] = {}
    for k in range(classes):
        own = all_pixels = 0
        for mask in masks:
            values = mask.ravel().tolist()
            if k in values:
                own += values.count(k)
                all_pixels += sum(value < classes for value in values)
        if own:
            frequencies[k] = own / all_pixels
    ordered = sorted(frequencies.values())
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return [median / frequencies[k] if k in frequencies else 1.0 for k in range(classes)]


@pytest.mark.wheel
@given(
    classes=st.integers(2, 6), images=st.integers(1, 5), seed=st.integers(0, 10**6), data=st.data()
)
@settings(max_examples=40, deadline=None)
def test_median_frequency_equals_a_naive_loop(
    classes: int, images: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    known = np.array([*range(classes), 255])
    masks = []
    for _ in range(images):
        chosen = data.draw(st.sets(st.integers(0, classes), min_size=1))
        masks.append(rng.choice(known[sorted(chosen)], (4, 5)))
    pixels, present = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    for mask in masks:
        counts = np.array([(mask == k).sum() for k in range(classes)])
        pixels += counts
        present += (counts > 0) * counts.sum()
    if pixels.sum() == 0:
        with pytest.raises(UserError, match="no pixel of the training split carries a class"):
            median_frequency(pixels, present)
        return
    assert median_frequency(pixels, present) == pytest.approx(naive(masks, classes), rel=1e-12)


@pytest.mark.wheel
def test_counting_a_split_equals_counting_its_files(tiny_data: Path) -> None:
    dataset = open_dataset(tiny_data, "train")
    masks = [np.asarray(Image.open(item.label)) for item in dataset.items]
    pixels, present = count_pixels(dataset)
    assert pixels.tolist() == [sum(int((m == k).sum()) for m in masks) for k in range(3)]
    assert median_frequency(pixels, present) == pytest.approx(naive(masks, 3), rel=1e-12)
    weights = class_weights(dataset, "median-frequency")
    assert weights is not None
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(naive(masks, 3), rel=1e-6)


@pytest.mark.wheel
def test_without_weights_nothing_is_read(tiny_data: Path) -> None:
    assert class_weights(open_dataset(tiny_data, "train"), "none") is None


def test_camvids_weights_are_near_the_published_ones() -> None:
    root = SHARED / "camvid"
    if not root.is_dir():
        pytest.skip(f"no CamVid at {root}: set SRDEPLOY_DATA to the folder that holds it")
    weights = median_frequency(*count_pixels(open_dataset(root, "train")))
    # The published ones were taken from other label files: all but sign_symbol, 2.5 times as
    # high there, lie within a fifth of these.
    ratio = np.delete(np.array(PUBLISHED) / weights, SIGN_SYMBOL)
    assert ratio.min() > 0.8
    assert ratio.max() < 1.0
