"""Decoding, fitting, restoring and encoding of images."""

from fractions import Fraction
from io import BytesIO
from math import floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageOps

from srdeploy import imaging
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, UnreadableImageError
from srdeploy.spec import InputPolicy, Spec

SPEC = Spec(classes=("a", "b", "c"), palette=((1, 2, 3), (200, 0, 0), (0, 0, 200)))
RED, CLEAR_BLUE = (255, 0, 0), (0, 0, 255, 0)


def masks(most: int = 255) -> st.SearchStrategy[Pixels]:
    """Label maps uint8 of 1..9 x 1..9 with values up to `most`."""
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
    return hnp.arrays(np.uint8, shapes, elements=st.integers(0, most))


def photo_of(rng: np.random.Generator, height: int, width: int) -> Pixels:
    return rng.integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
        ("LA", (7, 255), (7, 7, 7)),
        ("LA", (7, 0), (255, 255, 255)),
        ("RGB", RED, RED),
        ("RGBA", (*RED, 255), RED),
        ("RGBA", CLEAR_BLUE, (255, 255, 255)),
        ("I;16", 0xABCD, (0xAB,) * 3),
    ],
)
def test_a_png_of_any_mode_is_read_as_rgb(
    tmp_path: Path, mode: str, colour: tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    path = tmp_path / "photo.png"
    Image.new(mode, (3, 2), colour).save(path)
    photo = imaging.read_photo(path)
    assert photo.dtype == np.uint8
    assert photo.shape == (2, 3, 3)
    assert (photo == expected).all()


def test_a_palette_photo_shows_its_colours_and_transparent_entries_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=bytes([255, 0]))
    assert imaging.read_photo(tmp_path / "opaque.png").tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert imaging.read_photo(tmp_path / "clear.png").tolist() == [[[10, 20, 30], [255] * 3]]


def test_a_cmyk_jpeg_is_read_as_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    red, green, blue = imaging.read_photo(tmp_path / "print.jpg")[8, 8].tolist()
    assert red > 200
    assert max(green, blue) < 50


def test_32_bit_integers_are_read_as_16_bit_and_refused_beyond(tmp_path: Path) -> None:
    Image.new("I", (3, 2), 0xABCD).save(tmp_path / "fits.tif")
    Image.new("I", (3, 2), 0x10000).save(tmp_path / "beyond.tif")
    assert (imaging.read_photo(tmp_path / "fits.tif") == 0xAB).all()
    with pytest.raises(UnreadableImageError, match=r"beyond\.tif: .*outside 0\.\.65535"):
        imaging.read_photo(tmp_path / "beyond.tif")


def test_floating_point_photos_are_refused_because_their_range_is_unknown(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "depth.tif")
    with pytest.raises(UnreadableImageError, match=r"depth\.tif: .*floating-point"):
        imaging.read_photo(tmp_path / "depth.tif")


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_set_upright_as_pillow_does(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo_of(np.random.default_rng(0), 3, 5)).save(path, exif=exif)
    with Image.open(path) as file:
        expected = np.asarray(ImageOps.exif_transpose(file))
    np.testing.assert_array_equal(imaging.read_photo(path), expected)
    assert imaging.photo_size(path) == expected.shape[:2]
    np.testing.assert_array_equal(imaging.decode_photo(path.read_bytes(), "it"), expected)


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.webp", "photo.bmp"])
@pytest.mark.parametrize("kept", [0.0, 0.6])
def test_a_truncated_photo_is_unreadable_and_named(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    Image.fromarray(photo_of(np.random.default_rng(0), 40, 40)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UnreadableImageError, match=f"{name}: not a readable image"):
        imaging.read_photo(path)


@pytest.mark.filterwarnings("ignore")  # Pillow's own remarks on the damage
@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "TIFF", "WEBP", "GIF"])
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_a_damaged_photo_is_decoded_or_unreadable_never_another_error(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    buffer = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    source = Image.fromarray(photo_of(np.random.default_rng(0), 12, 20))
    source.save(buffer, suffix, **({} if suffix == "GIF" else {"exif": exif}))
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        # Headers are where damage is interesting.
        place = data.draw(st.integers(0, min(len(content) - 1, 150)))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    path.write_bytes(content)
    try:
        photo = imaging.read_photo(path)
    except UnreadableImageError:
        return
    assert photo.ndim == 3
    assert photo.dtype == np.uint8


def test_an_absent_photo_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match=r"no such file: .*gone\.jpg"):
        imaging.read_photo(tmp_path / "gone.jpg")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_gray_png_mask_of_few_bits_keeps_its_ids(tmp_path: Path, bits: int) -> None:
    ids = np.arange(2**bits, dtype=np.uint8)[None]
    path = tmp_path / "mask.png"
    path.write_bytes(gray_png(ids, bits))
    np.testing.assert_array_equal(imaging.read_labels(path), ids)


def gray_png(ids: Pixels, bits: int) -> bytes:
    """A grayscale PNG of 1, 2, 4 or 8 bits a pixel, packed by hand: Pillow writes no 2 or 4."""
    import struct
    import zlib

    rows = b""
    for row in ids:
        packed = "".join(f"{value:0{bits}b}" for value in row)
        packed += "0" * (-len(packed) % 8)
        rows += b"\0" + bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8))
    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        content += struct.pack(">I", len(body)) + kind + body + checksum
    return content


def test_a_mask_that_holds_colours_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "colours.png")
    with pytest.raises(UnreadableImageError, match=r"colours\.png: .*one class id per pixel.*RGB"):
        imaging.read_labels(tmp_path / "colours.png")


@settings(max_examples=30, deadline=None)
@given(labels=masks())
def test_an_encoded_mask_holds_the_ids_and_shows_the_palette(
    tmp_path_factory: pytest.TempPathFactory, labels: Pixels
) -> None:
    path = tmp_path_factory.getbasetemp() / "mask.png"
    path.write_bytes(imaging.encode_mask(labels, SPEC))
    np.testing.assert_array_equal(imaging.read_labels(path), labels)
    with Image.open(path) as file:
        shown = np.asarray(file.convert("RGB"))
    np.testing.assert_array_equal(shown, imaging.colour_table(SPEC)[labels])


def test_ids_without_a_class_show_the_void_colour() -> None:
    table = imaging.colour_table(SPEC)
    assert table[:3].tolist() == [list(colour) for colour in SPEC.palette]
    assert (table[3:] == SPEC.void_colour).all()


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 5000), width=st.integers(1, 5000), longest=st.integers(32, 2048))
def test_fitting_keeps_proportions_and_makes_the_longest_side_exact(
    height: int, width: int, longest: int
) -> None:
    fitted = imaging.scaled_size(height, width, longest)
    assert max(fitted) == longest
    scale = longest / max(height, width)
    assert fitted[0] == pytest.approx(max(1, height * scale), abs=0.5001)
    assert fitted[1] == pytest.approx(max(1, width * scale), abs=0.5001)
    assert imaging.scaled_size(*fitted, longest) == fitted
    assert imaging.scaled_size(height, width, None) == (height, width)


@settings(max_examples=30, deadline=None)
@given(labels=masks(), factor=st.integers(1, 4))
def test_restoring_by_a_whole_factor_repeats_every_label(labels: Pixels, factor: int) -> None:
    height, width = labels.shape
    restored = imaging.restore(labels, height * factor, width * factor)
    np.testing.assert_array_equal(restored, labels.repeat(factor, 0).repeat(factor, 1))


@settings(max_examples=30, deadline=None)
@given(labels=masks(), height=st.integers(1, 20), width=st.integers(1, 20))
def test_restoring_takes_the_label_under_each_pixels_centre(
    labels: Pixels, height: int, width: int
) -> None:
    restored = imaging.restore(labels, height, width)
    for row in range(height):
        for column in range(width):
            centre = Fraction(2 * row + 1, 2 * height), Fraction(2 * column + 1, 2 * width)
            under = floor(centre[0] * labels.shape[0]), floor(centre[1] * labels.shape[1])
            assert restored[row, column] == labels[under]


def test_a_photo_of_fitting_size_is_passed_on_as_it_is() -> None:
    photo = photo_of(np.random.default_rng(0), 40, 50)
    assert imaging.fit(photo, SPEC) is photo


def test_a_photo_is_scaled_to_the_policys_longest_side() -> None:
    spec = SPEC.model_copy(update={"input": InputPolicy(longest_side=64)})
    flat = np.full((128, 256, 3), 77, np.uint8)
    fitted = imaging.fit(flat, spec)
    assert fitted.shape == (32, 64, 3)
    assert (fitted == 77).all()


def test_a_photo_too_small_for_the_network_is_refused_with_both_sizes() -> None:
    with pytest.raises(UserError, match=r"image of 50x20 is too small: .* at least 32x32"):
        imaging.fit(np.zeros((20, 50, 3), np.uint8), SPEC)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_normalising_follows_the_formula_in_the_networks_colour_order(order: str) -> None:
    spec = Spec.model_validate({**SPEC.model_dump(), "colour_order": order})
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    expected = (images / 255 - np.array(spec.mean)) / np.array(spec.std)
    if order == "BGR":
        expected = expected[..., ::-1]
    values = imaging.normalise(images, spec)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected.transpose(0, 3, 1, 2), atol=2e-6)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_normalising_equals_the_deployed_graphs(order: str) -> None:
    import torch

    from srdeploy.deployable import Normalise

    spec = Spec.model_validate({**SPEC.model_dump(), "colour_order": order})
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    in_graph = Normalise(spec)(torch.from_numpy(every)).numpy()
    np.testing.assert_allclose(imaging.normalise(every, spec), in_graph, rtol=0, atol=5e-7)


def test_an_overlay_mixes_colours_and_leaves_ignored_pixels_as_they_are() -> None:
    photo = np.full((1, 2, 3), 100, np.uint8)
    mixed = imaging.overlay(photo, np.array([[1, 255]], np.uint8), SPEC, opacity=0.5)
    assert mixed.tolist() == [[[150, 50, 50], [100, 100, 100]]]


@pytest.mark.parametrize("opacity", [0.0, 0.25, 0.3, 0.5, 1.0])
def test_an_overlay_is_the_weighted_mean_rounded(opacity: float) -> None:
    rng = np.random.default_rng(0)
    photo, labels = photo_of(rng, 70, 80), rng.integers(0, 3, (70, 80), np.uint8)
    mean = photo * (1 - opacity) + imaging.colour_table(SPEC)[labels] * opacity
    mixed = imaging.overlay(photo, labels, SPEC, opacity)
    # Colours are weighed in float32: where a mean lies between two numbers, either is right.
    assert np.abs(mixed - mean).max() <= 0.5 + 1e-5


def test_a_tall_overlay_is_mixed_like_a_small_one() -> None:
    rng = np.random.default_rng(0)
    photo, labels = photo_of(rng, 200, 3), rng.integers(0, 4, (200, 3), np.uint8)
    mixed = imaging.overlay(photo, labels, SPEC, 0.3)
    for row in (0, 63, 64, 199):
        alone = imaging.overlay(photo[row : row + 1], labels[row : row + 1], SPEC, 0.3)
        np.testing.assert_array_equal(mixed[row : row + 1], alone)


def test_png_round_trips_and_jpeg_comes_close() -> None:
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    with Image.open(BytesIO(imaging.encode_png(smooth))) as file:
        np.testing.assert_array_equal(np.asarray(file), smooth)
    with Image.open(BytesIO(imaging.encode_jpeg(smooth))) as file:
        assert file.format == "JPEG"
        assert np.abs(np.asarray(file).astype(int) - smooth).mean() < 3


def test_a_picture_too_wide_for_jpeg_is_refused_with_what_to_ask_for() -> None:
    assert imaging.encode_jpeg(np.zeros((1, 65500, 3), np.uint8))
    with pytest.raises(UserError, match=r"65501x1 is too large for JPEG.*: ask for only the mask"):
        imaging.encode_jpeg(np.zeros((1, 65501, 3), np.uint8))
