"""Samples for the page: a user's photos, or synthetic scenes."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srdeploy.errors import UserError
from srdeploy.serve.server.page import LONGEST_SIDE, MAX_SAMPLES, PageSample, load_samples


def decoded(sample: PageSample) -> Image.Image:
    return Image.open(io.BytesIO(sample.jpeg), formats=["JPEG"])


def test_synthetic_scenes_are_different_and_the_same_every_time() -> None:
    first, second = load_samples(None), load_samples(None)
    assert [sample.name for sample in first] == ["meadow.jpg", "river.jpg", "dusk.jpg"]
    assert [decoded(sample).size for sample in first] == [(640, 480)] * 3
    assert len({sample.jpeg for sample in first}) == 3
    assert first[0].jpeg == second[0].jpeg


def test_the_first_photos_of_a_folder_are_taken_by_name(tmp_path: Path) -> None:
    for index in range(MAX_SAMPLES + 2):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{index:02d}.png")
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / ".hidden.png").write_bytes(b"no photo")
    assert [sample.name for sample in load_samples(tmp_path)] == [f"{i:02d}.png" for i in range(8)]


def test_large_photos_shrink_stand_upright_and_lose_their_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    Image.new("RGB", (2560, 640), "red").save(tmp_path / "a.jpg", exif=exif)
    (sample,) = load_samples(tmp_path)
    image = decoded(sample)
    assert image.size == (320, LONGEST_SIDE)
    assert not image.getexif()
    assert np.abs(np.asarray(image).mean(axis=(0, 1)) - (255, 0, 0)).max() < 3


def test_a_photo_that_cannot_be_read_is_named_and_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no photo")
    Image.new("RGB", (40, 30)).save(tmp_path / "b.png")
    assert [sample.name for sample in load_samples(tmp_path)] == ["b.png"]
    assert "a.jpg: not a readable image" in capfd.readouterr().err


def test_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no photos in .* for samples: .*jpeg"):
        load_samples(tmp_path)
    with pytest.raises(UserError, match="no such file or folder: .*missing"):
        load_samples(tmp_path / "missing")
