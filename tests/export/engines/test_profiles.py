"""Optimisation profiles: from the spec, from photos, from text."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from srdeploy.artifacts.artifact import Profile
from srdeploy.errors import UserError
from srdeploy.export.engines.profiles import parse_profile, photo_sizes, profiles_of
from srdeploy.spec import InputPolicy, Spec

AXES = st.tuples(*[st.lists(st.integers(1, 4096), min_size=3, max_size=3).map(sorted)] * 3)


def with_policy(spec: Spec, **values: object) -> Spec:
    return spec.model_copy(update={"input": InputPolicy.model_validate(values)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five photos (width x height): twice 64x48, once 80x40, 40x80 on its side, and 160x120."""
    sizes = {"a.png": (64, 48), "b.jpg": (64, 48), "c.png": (80, 40), "sub/d.png": (160, 120)}
    for name, (width, height) in sizes.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)
    turned = Image.fromarray(np.zeros((40, 80, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "photos" / "e.jpg", exif=exif)
    (tmp_path / "photos" / "notes.txt").write_text("no photo")
    return tmp_path / "photos"


def test_the_spec_gives_smallest_usual_and_largest(spec: Spec) -> None:
    assert [one.text() for one in profiles_of(spec)] == ["1x32x32,1x48x64,1x64x80"]
    assert [one.text() for one in profiles_of(spec, batch=4)] == ["1x32x32,1x48x64,4x64x80"]


def test_a_fixed_size_stays_fixed(spec: Spec, folder: Path) -> None:
    fixed = with_policy(spec, smallest=(48, 64), usual=(48, 64), largest=(48, 64))
    assert profiles_of(fixed, folder)[0].text() == "1x48x64,1x48x64,1x48x64"


def test_photos_give_the_sizes_that_the_network_sees(spec: Spec, folder: Path) -> None:
    free = with_policy(spec, smallest=(32, 32), usual=(512, 512), largest=(2048, 2048))
    assert photo_sizes(folder, free) == ((40, 40), (48, 64), (120, 160))
    assert profiles_of(free, folder, 2)[0].text() == "1x40x40,1x48x64,2x120x160"


def test_photos_are_fitted_as_for_the_network(spec: Spec, folder: Path) -> None:
    scaled = with_policy(spec, longest_side=80)
    assert photo_sizes(folder, scaled) == ((40, 40), (60, 80), (80, 80))


def test_a_photo_that_is_too_small_is_named(spec: Spec, folder: Path) -> None:
    with pytest.raises(UserError, match=r"(c.png|e.jpg): .* too small: .* at least 48x48"):
        profiles_of(with_policy(spec, smallest=(48, 48)), folder)


def test_a_folder_without_photos_is_refused(spec: Spec, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no photos"):
        profiles_of(spec, tmp_path / "empty")
    with pytest.raises(UserError, match="no such folder of photos"):
        profiles_of(spec, tmp_path / "absent")


@given(AXES)
def test_a_profile_survives_being_written_and_parsed(axes: tuple[list[int], ...]) -> None:
    smallest, usual, largest = zip(*axes, strict=True)
    profile = Profile(smallest=smallest, usual=usual, largest=largest)
    assert parse_profile(profile.text()) == profile
    assert parse_profile(profile.text().replace(",", " , ").upper()) == profile


@given(st.text("0123456789x,- .٣", max_size=30))
def test_any_text_is_a_profile_or_one_clear_line(text: str) -> None:
    try:
        profile = parse_profile(text)
    except UserError as error:
        told = str(error)
    else:
        told = f"profile '{text}': {profile.text()}"
        assert parse_profile(profile.text()) == profile
    assert told.startswith(f"profile '{text}': ")
    assert "\n" not in told


def test_one_shape_stands_for_all_three() -> None:
    assert parse_profile("2x360x480").text() == "2x360x480,2x360x480,2x360x480"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("360x480", "'360x480' is no shape: batch x height x width is needed, e.g. 1x32x32,"),
        ("1x32x32,1x64", "'1x64' is no shape"),
        ("1x32x32,1x64x64", "one or three shapes are needed (smallest, usual, largest), not 2"),
        ("1x0x32", "'1x0x32' is no shape"),
        ("1x-3x32", "'1x-3x32' is no shape"),
        ("", "'' is no shape"),
        ("1x64x64,1x32x64,1x96x96", "its shapes must grow from 1 on"),
    ],
)
def test_what_is_no_profile_is_told(text: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        parse_profile(text)
    assert told in str(error.value)
