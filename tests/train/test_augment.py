"""Augmentation: geometry against whole-photo resizing, colour against arithmetic."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from srdeploy.train.augment import Augmentation, augment, jitter, scaled_crop

pytestmark = pytest.mark.wheel
Bytes = npt.NDArray[np.uint8]


def how(**changes: object) -> Augmentation:
    values: dict[str, object] = {
        "crop": (32, 48),
        "scale": (1.0, 1.0),
        "flip": 0.0,
        "colour": 0.0,
        "fill": (124, 116, 104),
        "ignore_index": 255,
    }
    return Augmentation(**{**values, **changes})  # type: ignore[arg-type]


def scene(height: int, width: int, seed: int = 0) -> tuple[Bytes, Bytes]:
    """A smooth photo and blocky labels."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    photo = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    blocks = rng.integers(0, 7, (6, 6), dtype=np.uint8)
    labels = np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))
    return photo, labels


@given(
    height=st.integers(20, 90),
    width=st.integers(20, 90),
    scale=st.floats(0.4, 2.5),
    place=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
)
@settings(max_examples=60, deadline=None)
def test_cropping_while_scaling_equals_scaling_the_whole_photo_then_cropping(
    height: int, width: int, scale: float, place: tuple[float, float]
) -> None:
    photo, labels = scene(height, width)
    crop = (32, 48)
    part, (mask,), offset = scaled_crop(photo, [labels], scale, crop, np.array(place))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    whole = Image.fromarray(photo).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    whole_mask = Image.fromarray(labels).resize((size[1], size[0]), Image.Resampling.NEAREST)
    top, left = (int(p * (max(s - c, 0) + 1)) for p, s, c in zip(place, size, crop, strict=True))
    here = slice(top, top + part.shape[0]), slice(left, left + part.shape[1])
    assert part.shape[:2] == mask.shape == (min(size[0], crop[0]), min(size[1], crop[1]))
    assert all(0 <= o <= c - s for o, c, s in zip(offset, crop, mask.shape, strict=True))
    # A centre that falls on the edge between two source pixels may be rounded either way.
    clear = [
        np.abs(centre - centre.round()) > 1e-3
        for full, start, side, kept in zip(
            size, (top, left), (height, width), mask.shape, strict=True
        )
        for centre in [(start + np.arange(kept) + 0.5) * side / full]
    ]
    assert np.array_equal(mask[np.ix_(*clear)], np.asarray(whole_mask)[here][np.ix_(*clear)])
    inner = (slice(3, -3), slice(3, -3))
    difference = part.astype(int) - np.asarray(whole)[here].astype(int)
    assert np.abs(difference[inner]).max(initial=0) <= 2


def test_photo_and_labels_stay_on_top_of_each_other() -> None:
    labels = np.zeros((60, 80), np.uint8)
    labels[20:45, 30:60] = 1
    photo = np.repeat(labels[:, :, None] * np.uint8(200), 3, axis=2)
    for seed in range(20):
        view, mask, *_ = augment(
            photo,
            labels,
            how(scale=(0.5, 2.0), flip=0.5, fill=(0, 0, 0)),
            np.random.default_rng(seed),
        )
        inside, seen = mask == 1, view[:, :, 0] > 100
        # Bilinear blurs an edge over a pixel or two; elsewhere they agree.
        assert np.mean(inside != seen) < 0.05


def test_a_photo_smaller_than_the_crop_is_laid_on_mean_colour_with_ignored_labels() -> None:
    photo, labels = scene(20, 24)
    view, mask, *_ = augment(photo, labels, how(), np.random.default_rng(3))
    assert view.shape == (32, 48, 3)
    assert mask.shape == (32, 48)
    outside = mask == 255
    assert outside.sum() == 32 * 48 - 20 * 24
    assert (view[outside] == (124, 116, 104)).all()
    assert np.array_equal(view[~outside].reshape(20, 24, 3), photo)
    assert np.array_equal(mask[~outside].reshape(20, 24), labels)


def test_without_variation_and_at_the_crops_size_nothing_changes() -> None:
    photo, labels = scene(32, 48)
    view, mask, *_ = augment(photo, labels, how(), np.random.default_rng(0))
    assert np.array_equal(view, photo)
    assert np.array_equal(mask, labels)


def test_a_flip_mirrors_both() -> None:
    photo, labels = scene(32, 48)
    view, mask, *_ = augment(photo, labels, how(flip=1.0), np.random.default_rng(0))
    assert np.array_equal(view, photo[:, ::-1])
    assert np.array_equal(mask, labels[:, ::-1])


def test_turning_one_variation_off_leaves_the_others_as_they_were() -> None:
    photo, labels = scene(70, 90)
    settings = {"scale": (0.5, 2.0), "flip": 0.5}
    with_colour = augment(
        photo, labels, how(**settings, colour=0.4), np.random.default_rng(5)
    ).labels
    without = augment(photo, labels, how(**settings), np.random.default_rng(5)).labels
    assert np.array_equal(with_colour, without)


def test_labels_are_never_blended() -> None:
    photo, labels = scene(50, 60)
    for seed in range(10):
        mask = augment(photo, labels, how(scale=(0.5, 2.0)), np.random.default_rng(seed)).labels
        assert set(np.unique(mask)) <= {*np.unique(labels), 255}


@given(factors=st.tuples(*[st.floats(0.6, 1.4)] * 3), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_jitter_is_brightness_contrast_saturation_in_turn(
    factors: tuple[float, float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # Mid-range values: nothing clips, which each step alone would do on its own.
    photo = rng.integers(100, 140, (9, 11, 3), dtype=np.uint8)
    values = photo.astype(np.float64) * factors[0]
    gray = np.array([0.299, 0.587, 0.114])
    values = factors[1] * values + (1 - factors[1]) * (values @ gray).mean()
    values = factors[2] * values + (1 - factors[2]) * (values @ gray)[..., None]
    difference = jitter(photo, *factors).astype(np.float64) - np.clip(values, 0, 255)
    assert np.abs(difference).max() <= 1.0


def test_saturation_alone_is_what_pillow_calls_colour() -> None:
    photo, _ = scene(20, 30)
    expected = np.asarray(ImageEnhance.Color(Image.fromarray(photo)).enhance(0.5)).astype(int)
    assert np.abs(jitter(photo, 1.0, 1.0, 0.5).astype(int) - expected).max() <= 1


def test_jitter_by_ones_changes_nothing() -> None:
    photo, _ = scene(20, 30)
    assert np.array_equal(jitter(photo, 1.0, 1.0, 1.0), photo)
