"""Checks the header of an untrusted image before Pillow decodes it.

Pillow bounds the pixels, but some small files ask for hours or gigabytes with few of them: a JPEG
of a million scans, a TIFF of a million strips. Numbers here are far above those of real photos.
"""

import re
import struct
from collections.abc import Callable
from typing import IO, Literal

from PIL import (
    BmpImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

Format = Literal["JPEG", "PNG", "WEBP", "BMP", "TIFF"]

MOST_SCANS = 100
"""Scans of a progressive JPEG, each a pass over all its pixels. Cameras and optimisers write 3 to
20."""
MOST_SEGMENTS = 10_000
"""Segments of a JPEG's header, each 4 bytes at least and many more in memory."""
MOST_CHUNKS = 100_000
"""Chunks of a PNG. Encoders put 8 KiB or more into each."""
MOST_STRIPS = 200_000
"""Strips or tiles of a TIFF, each an object in Pillow. 50 megapixels in tiles of 16x16 are
195,313."""
MOST_TAGS = 1_000
"""Tags of a TIFF."""
MOST_RUN_LENGTH = 1_000_000
"""Pixels, and bytes, of a run-length coded BMP: Pillow decodes that in Python, which took 10 s for
50 megapixels. Such files are drawings, not photos."""

_MARKER = re.compile(rb"\xff([^\x00\xff])")
_MARKER_AFTER_SCAN = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_END, _SCAN = 0xD9, 0xDA
_BARE_MARKERS = frozenset([0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)])
"""Those without a length, or for which Pillow reads none."""

_STRIP_OFFSETS, _TILE_OFFSETS = 273, 324


def format_of(content: bytes) -> Format | None:
    """The format that the first bytes tell, among those that are decoded."""
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "WEBP"
    if content.startswith(b"BM"):
        return "BMP"
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    return None


def opener(format: Format) -> Callable[[IO[bytes], str], ImageFile]:
    """Pillow's own reader of the format: Image.open warns of large images before their size can be
    asked for, and tries other formats. JPEG's reads MPO as well."""
    return _OPENERS[format]


_OPENERS: dict[Format, Callable[[IO[bytes], str], ImageFile]] = {
    "JPEG": JpegImagePlugin.jpeg_factory,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}


def check_header(content: bytes, format: Format) -> None:
    """Raises ValueError where the file asks for undue work; damage is left for Pillow to find."""
    if format == "JPEG":
        _check_jpeg(content)
    elif format == "PNG":
        _check_png(content)
    elif format == "TIFF":
        _check_tiff(content)
    elif format == "BMP":
        _check_bmp(content)


def webp_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) of a WebP's canvas; None where the header is damaged."""
    head, chunk = content[:30], content[12:16]
    if len(head) < 30:
        return None
    if chunk == b"VP8X":
        width, height = (int.from_bytes(head[place : place + 3], "little") for place in (24, 27))
        return width + 1, height + 1
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def _check_jpeg(content: bytes) -> None:
    """Walks the markers as libjpeg does, up to the end of the first image."""
    scans = segments = 0
    place = 0
    pattern = _MARKER
    while match := pattern.search(content, place):
        place = match.end()
        marker = match[1][0]
        if marker == _END and scans:
            return
        segments += 1
        scans += marker == _SCAN
        if scans > MOST_SCANS:
            raise ValueError(f"a JPEG of more than {MOST_SCANS} scans")
        if segments > MOST_SEGMENTS:
            raise ValueError(f"a JPEG of more than {MOST_SEGMENTS} segments")
        if marker in _BARE_MARKERS:
            continue
        place += max(2, int.from_bytes(content[place : place + 2], "big"))
        pattern = _MARKER_AFTER_SCAN if marker == _SCAN else _MARKER


def _check_png(content: bytes) -> None:
    place, chunks = 8, 0
    while place < len(content):
        chunks += 1
        if chunks > MOST_CHUNKS:
            raise ValueError(f"a PNG of more than {MOST_CHUNKS} chunks")
        place += 12 + int.from_bytes(content[place : place + 4], "big")


def _check_tiff(content: bytes) -> None:
    """Looks at the first directory, the only one that is decoded."""
    order = "<" if content.startswith(b"I") else ">"
    big = b"+" in content[:4]
    # Offset of the directory, number of its entries, and (tag, type, count) of each entry.
    offset_form, number_form, entry_form, entry_size = (
        (order + "8xQ", order + "Q", order + "HHQ", 20)
        if big
        else (order + "4xI", order + "H", order + "HHI", 12)
    )
    try:
        (offset,) = struct.unpack_from(offset_form, content)
        (number,) = struct.unpack_from(number_form, content, offset)
    except (struct.error, OverflowError):
        return
    if number > MOST_TAGS:
        raise ValueError(f"a TIFF of more than {MOST_TAGS} tags")
    first = offset + struct.calcsize(number_form)
    for index in range(number):
        try:
            tag, _, count = struct.unpack_from(entry_form, content, first + index * entry_size)
        except struct.error:
            return
        if tag in (_STRIP_OFFSETS, _TILE_OFFSETS) and count > MOST_STRIPS:
            raise ValueError(f"a TIFF of more than {MOST_STRIPS} strips or tiles")


def _check_bmp(content: bytes) -> None:
    if len(content) < 34:
        return
    width, height, compression = struct.unpack_from("<ii4xI", content, 18)
    coded = compression in (1, 2)
    if coded and max(abs(width * height), len(content)) > MOST_RUN_LENGTH:
        raise ValueError(f"a run-length coded BMP of more than {MOST_RUN_LENGTH} pixels or bytes")
