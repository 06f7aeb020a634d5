"""Which photos int8 is calibrated on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srdeploy.errors import UserError
from srdeploy.export.precision.int8 import calibration_pictures
from srdeploy.imaging import Pixels, fit, read_photo
from srdeploy.spec import InputPolicy, Spec


def write(folder: Path, count: int, size: tuple[int, int] = (40, 36), start: int = 0) -> list[Path]:
    """Photos in one gray each, which tells them apart."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{start + index:03}.png" for index in range(count)]
    for index, file in enumerate(files):
        pixels = np.full((*size, 3), start + index, np.uint8)
        Image.fromarray(pixels).save(file)
    return files


def grays(pictures: Sequence[Pixels]) -> list[int]:
    return [int(picture[0, 0, 0]) for picture in pictures]


def test_photos_are_spread_evenly_over_the_folder_and_always_the_same(
    tmp_path: Path, spec: Spec
) -> None:
    write(tmp_path / "a", 12)
    write(tmp_path / "b" / "c", 12, start=12)
    first, again = (calibration_pictures(tmp_path, spec, 8) for _ in range(2))
    assert grays(first) == [0, 3, 6, 9, 12, 15, 18, 21]
    assert grays(again) == grays(first)


def test_photos_are_fitted_by_the_spec(tmp_path: Path, spec: Spec) -> None:
    file = write(tmp_path, 8, size=(100, 50))[5]
    policy = InputPolicy(smallest=(32, 32), usual=(48, 64), largest=(64, 80), longest_side=80)
    small = spec.model_copy(update={"input": policy})
    pictures = calibration_pictures(tmp_path, small, 8)
    assert {picture.shape for picture in pictures} == {(80, 40, 3)}
    np.testing.assert_array_equal(pictures[5], fit(read_photo(file), small))


def test_photos_of_several_sizes_keep_them(tmp_path: Path, spec: Spec) -> None:
    write(tmp_path, 4, size=(40, 50))
    write(tmp_path, 4, size=(60, 33), start=4)
    shapes = [picture.shape for picture in calibration_pictures(tmp_path, spec, 8)]
    assert shapes == [(40, 50, 3)] * 4 + [(60, 33, 3)] * 4


def test_of_a_data_set_the_photos_of_train_are_taken_and_never_masks(
    tmp_path: Path, spec: Spec
) -> None:
    write(tmp_path / "images" / "train", 8)
    write(tmp_path / "images" / "val", 8, start=100)
    write(tmp_path / "labels" / "train", 8, start=200)
    assert grays(calibration_pictures(tmp_path, spec, 8)) == list(range(8))


def test_of_cityscapes_layout_the_photos_of_train_are_taken_with_masks_and_without(
    tmp_path: Path, spec: Spec
) -> None:
    for index in range(8):
        town = tmp_path / "leftImg8bit" / "train" / "ulm"
        masks = tmp_path / "gtFine" / "train" / "ulm"
        for folder in (town, masks):
            folder.mkdir(parents=True, exist_ok=True)
        name = f"ulm_{index:06}_000019"
        pixels = np.full((40, 36, 3), index, np.uint8)
        Image.fromarray(pixels).save(town / f"{name}_leftImg8bit.png")
        if index % 3:
            Image.fromarray(pixels[:, :, 0]).save(masks / f"{name}_gtFine_labelIds.png")
    assert grays(calibration_pictures(tmp_path, spec, 64)) == list(range(8))


def test_a_data_set_without_train_asks_for_a_folder_of_photos(tmp_path: Path, spec: Spec) -> None:
    write(tmp_path / "images" / "val", 8)
    with pytest.raises(UserError, match="without the split train .it has val.: give the folder"):
        calibration_pictures(tmp_path, spec, 8)


def test_all_photos_are_used_where_there_are_fewer_than_asked_for_with_a_warning(
    tmp_path: Path, spec: Spec, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 9)
    assert grays(calibration_pictures(tmp_path, spec, 64)) == list(range(9))
    assert "has 9 photos to calibrate int8 on, not 64: all are used" in capsys.readouterr().err
    calibration_pictures(tmp_path, spec, 9)
    assert capsys.readouterr().err == ""


def test_too_few_photos_are_refused_unless_so_few_were_asked_for(
    tmp_path: Path, spec: Spec
) -> None:
    write(tmp_path, 3)
    with pytest.raises(UserError, match="has 3 photos, too few .*: 64 are recommended, 8 at least"):
        calibration_pictures(tmp_path, spec, 64)
    assert grays(calibration_pictures(tmp_path, spec, 2)) == [0, 1]


def test_a_folder_without_photos_says_what_is_looked_for(tmp_path: Path, spec: Spec) -> None:
    with pytest.raises(UserError, match=r"has no photos .*\.jpg.*64 photos"):
        calibration_pictures(tmp_path, spec, 8)
    with pytest.raises(UserError, match="no such folder of photos: .*absent"):
        calibration_pictures(tmp_path / "absent", spec, 8)


def test_a_photo_that_is_too_small_is_named_by_its_size(tmp_path: Path, spec: Spec) -> None:
    write(tmp_path, 8, size=(20, 36))
    with pytest.raises(UserError, match="36x20 is too small"):
        calibration_pictures(tmp_path, spec, 8)
