"""One photo of a request: decoded within limits, answered as a mask, an overlay or JSON."""

import json
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srdeploy import imaging
from srdeploy.imaging import Pixels
from srdeploy.regions import polygons
from srdeploy.runtimes.registry import open_runtime
from srdeploy.serve.folders.predict import predict_photos
from srdeploy.serve.scheduling.planner import ModelSource
from srdeploy.serve.scheduling.scheduler import Task
from srdeploy.serve.server import segment_task
from srdeploy.serve.server.admission import BadRequest, TooLarge
from srdeploy.serve.server.config import ServerLimits
from srdeploy.serve.server.segment_task import (
    PhotoAnswer,
    Regions,
    SegmentOptions,
    SegmentTask,
    entry_names,
    pack,
)
from srdeploy.spec import InputPolicy, Spec

SPEC = Spec(
    classes=("field", "box", "disc"),
    palette=((40, 160, 60), (200, 60, 40), (40, 70, 200)),
    input=InputPolicy(longest_side=64, smallest=(16, 16), usual=(48, 64)),
)
NAMED = SegmentOptions(output="json")


def photo_file(height: int = 90, width: int = 120, format: str = "JPEG") -> bytes:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    buffer = BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, format)
    return buffer.getvalue()


def labels_for(images: Pixels) -> Pixels:
    """Every class, and one id that is none."""
    labels = np.asarray(images.argmax(-1), np.uint8)
    labels[:, :4, :5] = 255
    return labels


def answered(wanted: SegmentOptions, spec: Spec = SPEC) -> tuple[PhotoAnswer, Pixels, Pixels]:
    """The answer, the photo, and its labels at its own size."""
    content = photo_file()
    task: Task[PhotoAnswer] = SegmentTask(content, "a/b.jpg", spec, ServerLimits(), wanted)
    labels = labels_for(task.prepare())
    photo = imaging.decode_photo(content, "it")
    return task.finish(labels), photo, imaging.restore(labels[0], *photo.shape[:2])


def test_a_photo_is_prepared_as_predict_fits_it() -> None:
    content = photo_file()
    images = SegmentTask(content, None, SPEC, ServerLimits(), SegmentOptions()).prepare()
    assert images.shape == (1, 48, 64, 3)
    fitted = imaging.fit(imaging.decode_photo(content, "it"), SPEC)
    np.testing.assert_array_equal(images[0], fitted)


def test_a_mask_is_byte_for_byte_what_predict_writes(
    tmp_path: Path, make_graph: Any, tiny_data: Path
) -> None:
    photos = sorted((tiny_data / "images" / "val").iterdir())
    graph = make_graph()
    predict_photos(
        ModelSource("colour", graph), [str(one) for one in photos], str(tmp_path / "out")
    )
    with open_runtime(graph) as runtime:
        for photo in photos:
            task = SegmentTask(
                photo.read_bytes(), photo.name, runtime.spec, ServerLimits(), SegmentOptions()
            )
            answer = task.finish(runtime.run(task.prepare()))
            assert answer.media_type == "image/png"
            assert answer.content == (tmp_path / "out" / f"{photo.stem}.png").read_bytes()


def test_an_overlay_has_the_photos_size_and_the_wanted_opacity() -> None:
    answer, photo, labels = answered(SegmentOptions(output="overlay", opacity=0.25))
    assert answer.media_type == "image/jpeg"
    assert answer.content == imaging.encode_jpeg(imaging.overlay(photo, labels, SPEC, 0.25))


@pytest.mark.parametrize("regions", ["none", "rle", "polygons"])
def test_json_lists_the_classes_that_occur_with_the_wanted_regions(regions: Regions) -> None:
    answer, photo, labels = answered(SegmentOptions(output="json", regions=regions))
    assert answer.content is None
    assert answer.media_type == "application/json"
    entry = json.loads(json.dumps(answer.entry))
    assert (entry["name"], entry["width"], entry["height"]) == ("a/b.jpg", 120, 90)
    assert entry["ignored_pixels"] == (labels == 255).sum() > 0
    assert [found["pixels"] for found in entry["classes"]] == sorted(
        ((labels == id).sum() for id in range(3)), reverse=True
    )
    for found in entry["classes"]:
        mask = labels == found["id"]
        assert found["name"] == SPEC.classes[found["id"]]
        assert found["colour"] == list(SPEC.palette[found["id"]])
        assert found["share"] == pytest.approx(mask.mean(), abs=1e-6)
        assert found.keys() - {"id", "name", "colour", "pixels", "share"} == {regions} - {"none"}
        if regions == "rle":
            counts = found["rle"]["counts"]
            drawn = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
            np.testing.assert_array_equal(drawn.reshape(mask.shape, order="F"), mask)
            assert found["rle"]["size"] == [90, 120]
        if regions == "polygons":
            assert found["polygons"] == polygons(mask)


@pytest.mark.parametrize(
    ("name", "number", "called"),
    [
        (None, None, "the image: "),
        ("night.jpg", None, "the image ('night.jpg'): "),
        (None, 2, "image 2: "),
        ("night.jpg", 2, "image 2 ('night.jpg'): "),
        ("a\nb\x1b[31m\u202e", 2, "image 2 ('a?b?[31m?'): "),
        ("x" * 300, 2, f"image 2 ('{'x' * 77}...'): "),
    ],
)
def test_an_unreadable_image_is_a_bad_request_that_calls_it_by_number_and_name(
    name: str | None, number: int | None, called: str
) -> None:
    task = SegmentTask(b"no image", name, SPEC, ServerLimits(), SegmentOptions(), number)
    with pytest.raises(BadRequest) as refusal:
        task.prepare()
    assert str(refusal.value).startswith(called + "not a readable image (unknown format")


def test_an_image_of_too_many_pixels_is_refused_with_the_limit() -> None:
    task = SegmentTask(
        photo_file(300, 400), None, SPEC, ServerLimits(megapixels=0.1), SegmentOptions()
    )
    with pytest.raises(TooLarge, match=r"has 400x300 = 0\.1 megapixels, 0\.1 are allowed"):
        task.prepare()


def test_an_image_too_small_for_the_network_is_a_bad_request() -> None:
    task = SegmentTask(photo_file(10, 400), "slit.jpg", SPEC, ServerLimits(), SegmentOptions())
    with pytest.raises(BadRequest, match=r"^the image \('slit\.jpg'\): .* too small: .* 16x16"):
        task.prepare()


def test_an_image_beyond_the_networks_largest_size_is_too_large_unless_it_is_scaled() -> None:
    policy = {"smallest": (16, 16), "usual": (64, 64), "largest": (64, 128)}
    own_size = SPEC.model_copy(update={"input": InputPolicy.model_validate(policy)})
    limits = ServerLimits(network_megapixels=0.001)  # the network's own largest size is larger
    words = "image of 120x90 is too large: .* up to 0.00819 megapixels here: scale it down$"
    with pytest.raises(TooLarge, match=words):
        SegmentTask(photo_file(), None, own_size, limits, SegmentOptions()).prepare()
    assert (
        SegmentTask(photo_file(), None, own_size, ServerLimits(), SegmentOptions()).prepare().size
        == 32400
    )
    # As many pixels in another shape.
    tall = SegmentTask(photo_file(200, 40), None, own_size, limits, SegmentOptions()).prepare()
    assert tall.shape == (1, 200, 40, 3)
    scaled = SPEC.model_copy(
        update={"input": InputPolicy.model_validate(policy | {"longest_side": 100})}
    )
    assert (
        SegmentTask(photo_file(), None, scaled, ServerLimits(), SegmentOptions()).prepare().shape[1]
        == 75
    )


def test_regions_that_would_fill_the_memory_are_refused_with_what_to_ask_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segment_task, "MAX_BORDER", 100)
    with pytest.raises(
        TooLarge, match=r"borders of \d+ pixels, at most 100 are described: ask for output=mask"
    ):
        answered(SegmentOptions(output="json", regions="rle"))
    assert answered(SegmentOptions(output="json"))[0].entry["classes"]
    monkeypatch.setattr(segment_task, "MAX_POLYGON_PIXELS", 1000)
    with pytest.raises(TooLarge, match=r"polygons are drawn for up to .*: ask for regions=rle"):
        answered(SegmentOptions(output="json", regions="polygons"))


def test_one_answer_is_packed_as_it_is_and_several_in_a_zip() -> None:
    mask, *_ = answered(SegmentOptions())
    assert mask.content is not None
    assert pack([mask], SegmentOptions()) == (mask.content, "image/png")
    for wanted, count in ((SegmentOptions(zipped=True), 1), (SegmentOptions(), 3)):
        content, media_type = pack([mask] * count, wanted)
        assert media_type == "application/zip"
        with zipfile.ZipFile(BytesIO(content)) as archive:
            assert archive.namelist() == ["b.png", "b-2.png", "b-3.png"][:count]
            assert archive.testzip() is None
            assert archive.read("b.png") == mask.content
    assert pack([mask] * 3, SegmentOptions()) == pack([mask] * 3, SegmentOptions())


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("night.jpg", "night"),
        ("C:\\Users\\me\\night drive.JPG", "night_drive"),
        ("../../etc/passwd", "passwd"),
        ("..", "image-0001"),
        (".htaccess", "htaccess"),
        ("a.tar.gz", "a.tar"),
        ("a\0b\n.png", "a_b"),
        ("snow ❄.jpg", "snow"),
        ("фото.jpg", "фото"),
        ("nul.png", "image-nul"),
        ("", "image-0001"),
        (None, "image-0001"),
    ],
)
def test_entries_are_named_after_the_uploads_made_harmless(name: str | None, entry: str) -> None:
    assert entry_names([name], ".png") == [f"{entry}.png"]


@settings(max_examples=200, deadline=None)
@given(
    names=st.lists(
        st.none() | st.text(max_size=120) | st.text("aA./\\-_ 2ß\u0301\ud800", max_size=100),
        max_size=8,
    )
)
def test_entries_of_any_names_are_harmless_and_unique(names: list[str | None]) -> None:
    entries = entry_names(names, ".png")
    assert len({entry.casefold() for entry in entries}) == len(names)
    for entry in entries:
        stem = entry.removesuffix(".png")
        assert 1 <= len(stem) <= 80
        assert len(entry.encode()) < 255
        assert not stem.startswith((".", "-"))
        assert all(c.isalnum() or c in "._-" for c in stem)


def test_the_name_of_an_entry_can_be_written_as_json_whatever_the_client_sent() -> None:
    task = SegmentTask(photo_file(), "half \ud83d.jpg", SPEC, ServerLimits(), NAMED)
    answer = task.finish(labels_for(task.prepare()))
    assert json.dumps(answer.entry, ensure_ascii=False).encode()
