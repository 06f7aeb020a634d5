"""Decoding of images in memory, which strangers may have made."""

import logging
import struct
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srdeploy import imaging
from srdeploy.imaging import UnreadableImageError, ignore_pillow_warnings, reason_of


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "MPO"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16"])
def test_a_photo_in_memory_is_decoded_as_its_file_is(
    tmp_path: Path, suffix: str, mode: str
) -> None:
    path = tmp_path / "photo"
    rng = np.random.default_rng(0)
    source = Image.fromarray(rng.integers(0, 256, (12, 20, 3), np.uint8))
    source = Image.new(mode, (20, 12), 0xABCD) if mode == "I;16" else source.convert(mode)
    try:
        source.save(path, suffix)
    except OSError:
        return  # the format has no such mode
    photo = imaging.decode_photo(path.read_bytes(), "it", 20 * 12)
    assert photo.dtype == np.uint8
    np.testing.assert_array_equal(photo, imaging.read_photo(path))


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_pixels_are_counted_before_they_are_decoded_whatever_pillows_own_limit_is(
    monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    content = saved(Image.new("RGB", (40, 30)), suffix)
    for pillows in (30, 900):  # it would raise an error, and warn
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        with pytest.raises(
            imaging.OversizedImageError,
            match=r"^it: the image has 40x30 = 0\.0 megapixels, 0\.001199 are allowed$",
        ):
            # Half of the file will do: the header has the size.
            imaging.decode_photo(content[: max(700, len(content) // 2)], "it", 40 * 30 - 1)
        assert imaging.decode_photo(content, "it", 40 * 30).shape == (30, 40, 3)


def test_an_image_beyond_the_limit_is_told_in_megapixels() -> None:
    content = bytearray(saved(Image.new("L", (8, 8)), "BMP"))
    struct.pack_into("<ii", content, 18, 12000, 9000)
    words = "it: the image has 12000x9000 = 108.0 megapixels, 50 are allowed"
    with pytest.raises(imaging.OversizedImageError, match=words):
        imaging.decode_photo(bytes(content), "it", 50_000_000)


@pytest.mark.parametrize("suffix", ["GIF", "EPS", "PDF", "PPM", "ICO", "TGA", "JPEG2000"])
def test_formats_beyond_those_of_photos_are_not_opened_from_memory(suffix: str) -> None:
    with pytest.raises(UnreadableImageError, match=r"^it: not a readable image \(unknown format"):
        imaging.decode_photo(saved(Image.new("RGB", (32, 32)), suffix), "it")


def saved(image: Image.Image, suffix: str) -> bytes:
    buffer = BytesIO()
    image.save(buffer, suffix)
    return buffer.getvalue()


def test_a_jpeg_of_needlessly_many_scans_or_segments_is_refused() -> None:
    buffer = BytesIO()
    Image.new("L", (16, 16)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content.rindex(b"\xff\xda")
    scan = content[last : content.rindex(b"\xff\xd9")]
    trailer = b"\xff\xda" * 200  # as in the films that phones put behind their photos
    for more in (50, 95):
        longer = content[:last] + scan * more + content[last:]
        if more == 50:
            assert imaging.decode_photo(longer + trailer, "it").shape == (16, 16, 3)
            continue
        with pytest.raises(UnreadableImageError, match="a JPEG of more than 100 scans"):
            imaging.decode_photo(longer, "it")
    for segment in (b"\xff\xe1\0\2", b"\xff\xd9", b"\xff\xf0"):
        with pytest.raises(UnreadableImageError, match="a JPEG of more than 10000 segments"):
            imaging.decode_photo(content[:2] + segment * 10_000 + content[2:], "it")


def test_a_png_of_needlessly_many_chunks_is_refused() -> None:
    content = saved(Image.new("L", (8, 8)), "PNG")
    empty = bytes(4) + b"prVt" + bytes(4)
    with pytest.raises(UnreadableImageError, match="a PNG of more than 100000 chunks"):
        imaging.decode_photo(content[:33] + empty * 100_000 + content[33:], "it")


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_needlessly_many_strips_or_tags_is_refused(order: str, big: bool) -> None:
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "H", 43 if big else 42)
    if big:
        head += struct.pack(order + "HHQ", 8, 0, 16)
        number, entry = order + "Q", struct.pack(order + "HHQQ", 273, 4, 300_000, 0)
    else:
        head += struct.pack(order + "I", 8)
        number, entry = order + "H", struct.pack(order + "HHII", 273, 4, 300_000, 0)
    with pytest.raises(UnreadableImageError, match="more than 200000 strips or tiles"):
        imaging.decode_photo(head + struct.pack(number, 1) + entry, "it")
    with pytest.raises(UnreadableImageError, match="more than 1000 tags"):
        imaging.decode_photo(head + struct.pack(number, 1001) + entry * 1001, "it")


def run_length_bmp(width: int, height: int, runs: bytes) -> bytes:
    """8 bits a pixel, coded, with a gray palette."""
    palette = b"".join(bytes([value] * 3 + [0]) for value in range(256))
    start = 14 + 40 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    head = b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start)
    return head + info + palette + runs


def test_a_large_run_length_coded_bmp_is_refused_and_a_small_one_decoded() -> None:
    small = imaging.decode_photo(run_length_bmp(3, 2, b"\3\7\0\0\3\x09\0\1"), "it")
    assert small[..., 0].tolist() == [[9] * 3, [7] * 3]
    for hostile in (
        run_length_bmp(10_000, 5_000, b"\1\7\0\0" * 5_000),
        run_length_bmp(100, 100, bytes(1_000_000)),
    ):
        with pytest.raises(UnreadableImageError, match="run-length coded BMP of more than 1000000"):
            imaging.decode_photo(hostile, "it")


def test_reasons_are_short_lines_without_addresses_or_pillows_own_errors() -> None:
    assert reason_of(OSError(f"no {object()} here\nsecond line")) == "no the image here"
    assert reason_of(ValueError("x" * 1000)) == "x" * 160
    assert reason_of(ValueError("a\x1b[31m\u202eb")) == "a?[31m?b"
    passed_on = SyntaxError("320")
    passed_on.__cause__ = KeyError(320)
    for error in (passed_on, KeyError("x"), AttributeError("y"), ZeroDivisionError(), OSError()):
        assert reason_of(error) == "damaged data"
    assert reason_of(MemoryError()) == "more memory than there is"


def test_remarks_on_damaged_files_can_be_silenced_for_the_whole_process() -> None:
    content = saved(Image.new("L", (8, 8)), "TIFF").replace(
        struct.pack("<HHI", 278, 4, 1), struct.pack("<HHI", 278, 4, 2)
    )
    with warnings.catch_warnings():
        with pytest.raises(UnreadableImageError, match="Metadata Warning"):
            imaging.decode_photo(content, "it")  # warnings are errors here
        ignore_pillow_warnings()
        try:
            assert imaging.decode_photo(content, "it").shape == (8, 8, 3)
        finally:
            logging.getLogger("PIL").setLevel(logging.NOTSET)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    quality=st.integers(5, 100),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    progressive=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_jpeg_decoded_quickly_is_what_pillow_decodes(
    height: int, width: int, quality: int, subsampling: str, progressive: bool, seed: int
) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    options: dict[str, Any] = {"quality": quality, "subsampling": subsampling}
    buffer = BytesIO()
    picture.save(buffer, "JPEG", progressive=progressive, **options)
    photo = imaging.decode_photo(buffer.getvalue(), "it")
    np.testing.assert_array_equal(photo, np.asarray(Image.open(buffer)))
