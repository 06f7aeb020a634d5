"""What is written of one photo."""

import json
import zipfile
from io import BytesIO
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from srdeploy.imaging import Pixels, encode_jpeg, encode_mask, overlay, restore, strongest
from srdeploy.runtimes.base import Logits
from srdeploy.serve.folders.records import Photo
from srdeploy.serve.folders.rendering import (
    Rendered,
    encode_segments,
    needs_logits,
    needs_picture,
    render,
    softmax,
    to_half,
)
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.spec import Spec

PHOTO = Photo("in/deep/a b.jpg", "deep/a b", 100, 5)
SPEC = Spec(classes=("sky", "road, wet", "собака"), palette=((1, 2, 3), (200, 0, 0), (0, 0, 200)))
SIZE = (50, 60)
ALL = PredictSettings(overlay=True, probabilities=True, rle=True)


def some_logits(height: int = 33, width: int = 40, seed: int = 0) -> Logits:
    """float32 [3, height, width], with equals among them."""
    values = np.random.default_rng(seed).normal(scale=4, size=(3, height, width))
    return np.asarray(values.round(), np.float32)


def some_picture() -> Pixels:
    return np.random.default_rng(1).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def rendered(settings: PredictSettings, logits: Logits | None = None) -> Rendered:
    """Of the logits, or their labels where they are not asked for."""
    values = some_logits() if logits is None else logits
    result = values if needs_logits(settings) else np.asarray(values.argmax(0), np.uint8)
    picture = some_picture() if needs_picture(settings) else None
    return render(PHOTO, picture, result, SIZE, SPEC, settings)


def expected_labels() -> Pixels:
    return restore(np.asarray(some_logits().argmax(0), np.uint8), *SIZE)


def test_each_kind_of_output_has_its_folder_and_nothing_else_is_written() -> None:
    paths = {
        "mask": "deep/a b.png",
        "overlay": "overlays/deep/a b.jpg",
        "probabilities": "probabilities/deep/a b.npz",
        "rle": "rle/deep/a b.json",
    }
    for count in range(1, 5):
        for kinds in combinations(paths, count):
            wanted = PredictSettings(
                mask="palette" if "mask" in kinds else "none",
                overlay="overlay" in kinds,
                probabilities="probabilities" in kinds,
                rle="rle" in kinds,
            )
            assert set(rendered(wanted).files) == {paths[kind] for kind in kinds}
    assert rendered(PredictSettings(mask="none", areas="jsonl")).files == {}


def test_logits_and_the_photo_are_requested_only_where_they_are_needed() -> None:
    assert not needs_logits(PredictSettings(overlay=True, rle=True, areas="jsonl"))
    assert needs_logits(PredictSettings(probabilities=True))
    assert not needs_picture(PredictSettings(probabilities=True, rle=True, areas="jsonl"))
    assert needs_picture(PredictSettings(overlay=True))


def test_mask_and_overlay_are_those_of_the_server() -> None:
    files = rendered(ALL).files
    assert files["deep/a b.png"] == encode_mask(expected_labels(), SPEC)
    mixed = overlay(some_picture(), expected_labels(), SPEC)
    assert files["overlays/deep/a b.jpg"] == encode_jpeg(mixed)


def test_a_gray_mask_has_the_pixels_of_the_palette_mask() -> None:
    for settings, mode in (
        (PredictSettings(mask="palette"), "P"),
        (PredictSettings(mask="gray"), "L"),
    ):
        content = rendered(settings).files["deep/a b.png"]
        with Image.open(BytesIO(content)) as image:
            assert (image.format, image.mode) == ("PNG", mode)
            np.testing.assert_array_equal(np.asarray(image), expected_labels())
        assert content[24] == 8  # bits of a pixel, as the header says


def test_labels_and_the_logits_that_they_come_from_give_equal_outputs() -> None:
    from_labels = rendered(ALL.model_copy(update={"probabilities": False}))
    from_logits = rendered(ALL)
    assert from_logits.files.items() > from_labels.files.items()
    assert from_logits.pixels == from_labels.pixels


def test_pixels_are_counted_in_the_mask_of_the_photos_size() -> None:
    labels = np.full((4, 6), 2, np.uint8)
    labels[0, 0] = 255
    counted = render(PHOTO, None, labels, (40, 60), SPEC, PredictSettings()).pixels
    assert counted == {2: 2300, 255: 100}
    assert all(type(number) is int for pair in counted.items() for number in pair)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    logits=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6),
        elements=st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 2.0, np.inf]),
    )
)
def test_the_strongest_class_is_the_first_of_equals(logits: Logits) -> None:
    labels = strongest(logits)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, logits.argmax(0))


def test_probabilities_are_the_softmax_at_the_size_that_the_network_saw() -> None:
    content = rendered(ALL).files["probabilities/deep/a b.npz"]
    with np.load(BytesIO(content), allow_pickle=False) as arrays:
        assert set(arrays) == {"probabilities", "classes", "photo_size"}
        found = arrays["probabilities"]
        assert tuple(arrays["classes"].tolist()) == SPEC.classes
        assert tuple(arrays["photo_size"].tolist()) == SIZE
    powers = np.exp(some_logits().astype(np.float64))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, powers / powers.sum(0), rtol=1e-3, atol=2**-24)


def test_large_logits_do_not_overflow_and_infinite_ones_are_not_hidden() -> None:
    logits = np.zeros((3, 40, 2), np.float32)
    logits[1] = 3e38
    logits[2, 30, 1] = np.inf
    found = softmax(logits)
    assert found[:, 0, 0].tolist() == [0, 1, 0]
    assert np.isnan(found[2, 30, 1])
    assert np.isfinite(found).sum() == found.size - 3


def test_every_probability_is_rounded_as_numpy_does() -> None:
    one = int(np.float32(1).view(np.uint32))
    values = np.arange(0, one + 1, 997, dtype=np.uint32).view(np.float32)
    halfway = (np.arange(0, 4096, dtype=np.float32) + np.float32(0.5)) / np.float32(2**25)
    for tried in (values, halfway, np.nextafter(halfway, np.float32(0)), np.ones(1, np.float32)):
        expected = tried.astype(np.float16)
        np.testing.assert_array_equal(to_half(tried).view(np.uint16), expected.view(np.uint16))


def test_equal_results_give_equal_bytes_whatever_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    first = rendered(ALL).files
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert rendered(ALL).files == first
    with zipfile.ZipFile(BytesIO(first["probabilities/deep/a b.npz"])) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    labels=hnp.arrays(
        np.uint8,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
        elements=st.sampled_from([0, 1, 2, 3, 255]),
    )
)
def test_segments_draw_the_classes_of_the_mask_again(labels: Pixels) -> None:
    content = json.loads(encode_segments("a", labels, SPEC))
    height, width = labels.shape
    assert (content["photo"], content["size"]) == ("a", [height, width])
    assert tuple(content["classes"]) == SPEC.classes
    drawn = np.full(labels.shape, 255, np.uint8)
    for segment in content["segments"]:
        counts = segment["segmentation"]["counts"]
        assert sum(counts) == labels.size
        ones = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        mask = ones.reshape((height, width), order="F")
        rows, columns = np.nonzero(mask)
        x, y, w, h = segment["bbox"]
        assert (x, y, x + w - 1, y + h - 1) == (
            columns.min(),
            rows.min(),
            columns.max(),
            rows.max(),
        )
        assert segment["area"] == mask.sum()
        assert segment["segmentation"]["size"] == [height, width]
        assert segment["category"] == SPEC.classes[segment["category_id"]]
        drawn[mask] = segment["category_id"]
    np.testing.assert_array_equal(drawn, np.where(labels < 3, labels, 255))
    ids = [segment["category_id"] for segment in content["segments"]]
    assert ids == sorted(set(ids))


def test_names_that_are_no_text_are_written_as_text() -> None:
    name = b"d/\xff\xd0\xbd\n".decode("utf-8", "surrogateescape")
    content = encode_segments(name, np.zeros((2, 3), np.uint8), SPEC)
    assert json.loads(content.decode("utf-8"))["photo"] == "d/\\xffн\n"
