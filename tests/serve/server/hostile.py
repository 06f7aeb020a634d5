"""Damaged and hostile images, reproducible by seed, for decoders of untrusted files."""

import struct
import time
import zlib
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 32
PHOTO_FORMATS: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "JPEG"},
    "progressive": {"format": "JPEG", "progressive": True},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP"},
    "lossless": {"format": "WEBP", "lossless": True},
    "bmp": {"format": "BMP"},
    "tiff": {"format": "TIFF"},
    "lzw": {"format": "TIFF", "compression": "tiff_lzw"},
    "deflate": {"format": "TIFF", "compression": "tiff_adobe_deflate"},
    "packbits": {"format": "TIFF", "compression": "packbits"},
    "in-tiff": {"format": "TIFF", "compression": "jpeg"},
    "bigtiff": {"format": "TIFF", "big_tiff": True},
    "mpo": {"format": "MPO", "save_all": True},
}
OTHER_FORMATS = ("GIF", "ICO", "TGA", "PPM", "PDF", "EPS", "JPEG2000", "SGI", "PCX", "IM", "DDS")
STAMPS = {"PDF": dict.fromkeys(("creationDate", "modDate"), time.gmtime(0))}
"""Options of the formats that would otherwise note the second in which they were written."""


def corpus(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` pairs (description, file): first all handmade files, then randomly damaged ones."""
    rng = np.random.default_rng(seed)
    yield from islice(_endless(rng), count)


def _endless(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    whole = dict(_whole(rng))
    yield from whole.items()
    yield from _bodies(rng)
    yield from _pngs()
    yield from _tiffs()
    yield from _loops(whole["jpeg"])
    yield from _declared(whole)
    names = sorted(whole)
    while True:
        for name in names:
            how = int(rng.integers(len(_DAMAGES)))
            other = whole[names[int(rng.integers(len(names)))]]
            damage = _DAMAGES[how]
            yield f"{name}, {damage.__name__.strip('_')}", damage(whole[name], other, rng)


def _truncated(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(len(content)))]


def _flipped(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A few bits, most of them in the header."""
    damaged = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        reach = len(content) if rng.random() < 0.3 else min(len(content), 200)
        damaged[int(rng.integers(reach))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def _overwritten(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Four bytes that overflow what adds or multiplies them, or count backwards."""
    place = int(rng.integers(min(len(content), 300)))
    value = [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0"]
    return content[:place] + value[int(rng.integers(5))] + content[place + 4 :]


def _spliced(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """The header of one file before the middle of another."""
    head, tail = int(rng.integers(4, 120)), int(rng.integers(len(other)))
    return content[:head] + other[tail:]


def _repeated(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A part again and again."""
    start, size = int(rng.integers(len(content))), int(rng.integers(1, 40))
    return content[:start] + content[start : start + size] * 50 + content[start:]


def _removed(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    start, size = int(rng.integers(len(content))), int(rng.integers(1, 20))
    return content[:start] + content[start + size :]


def _disguised(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Another format's first bytes."""
    return other[:12] + content[12:]


_DAMAGES = (_truncated, _flipped, _flipped, _overwritten, _spliced, _repeated, _removed, _disguised)


def _whole(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Sound files: of each format, mode and shape that decoders treat differently."""
    coarse = rng.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), np.uint8)
    photo = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, options in PHOTO_FORMATS.items():
        carries = options["format"] not in ("BMP", "MPO")
        yield name, _saved(photo, **options | ({"exif": exif} if carries else {}))
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16", "I", "F", "CMYK", "YCbCr", "LAB"):
        turned = Image.new(mode, photo.size) if mode == "LAB" else _in_mode(photo, mode)
        for format in ("PNG", "TIFF", "JPEG", "BMP"):
            try:
                yield f"{format} {mode}", _saved(turned, format=format)
            except (OSError, ValueError):  # no such mode there
                continue
    more = [photo.transpose(Image.Transpose.ROTATE_180), photo.convert("L").convert("RGB")]
    for format in ("PNG", "WEBP", "TIFF", "GIF"):
        film = _saved(photo, format=format, save_all=True, append_images=more)
        yield f"film of {format}", film
    for width, height in ((1, 1), (1, 70_000), (70_000, 1), (1, 300)):
        for format in ("PNG", "TIFF", "BMP"):
            yield f"{format} {width}x{height}", _saved(Image.new("L", (width, height)), format)
    yield "clear palette", _saved(photo.convert("P"), format="PNG", transparency=bytes(range(256)))
    for format in OTHER_FORMATS:
        yield format, _saved(photo, format=format, **STAMPS.get(format, {}))


def _in_mode(photo: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(photo.convert("L"), np.uint16) * 257)
    return photo.convert(mode)


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _bodies(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """What is no image at all."""
    yield "nothing", b""
    yield "one byte", b"\xff"
    for size in (16, 1000, 100_000):
        yield f"{size} zeros", bytes(size)
        yield f"{size} random bytes", rng.bytes(size)
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "PSD", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, HEIGHT, WIDTH, 8, 3) + bytes(99)
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd)(r)file\n"
    yield "JSON", b'{"inputs": [{"name": "images"}]}'
    yield "HTML", b"<!DOCTYPE html><script>alert(1)</script>"
    yield "gzip", b"\x1f\x8b\x08" + bytes(40)
    for magic in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"MM\0+"):
        yield f"{magic!r} alone", magic
        yield f"{magic!r} and zeros", magic + bytes(200)
        yield f"{magic!r} and ones", magic + b"\xff" * 200
        yield f"{magic!r} and noise", magic + rng.bytes(400)
    for kind in (b"VP8 ", b"VP8L", b"VP8X"):
        for size in (0, 10, 2**32 - 1):
            head = b"RIFF" + struct.pack("<I", size) + b"WEBP" + kind + struct.pack("<I", size)
            yield f"WebP {kind!r} of {size}", head + rng.bytes(30)


def _png(*chunks: tuple[bytes, bytes], bad_checksums: bool = False) -> bytes:
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        checksum = zlib.crc32(kind + body) ^ bad_checksums
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
    return content


def _pngs() -> Iterator[tuple[str, bytes]]:
    header = b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)
    pixels = b"IDAT", zlib.compress(bytes(HEIGHT * (1 + 3 * WIDTH)))
    bomb = zlib.compress(bytes(8 * 2**20), 9)
    end = b"IEND", b""
    yield "bad checksums", _png(header, pixels, end, bad_checksums=True)
    yield "pixels that unfold a thousandfold", _png(header, (b"IDAT", bomb), end)
    yield "a profile that unfolds", _png(header, (b"iCCP", b"x\0\0" + bomb), pixels, end)
    yield "a text that unfolds", _png(header, (b"zTXt", b"x\0\0" + bomb), pixels, end)
    after = b"iTXt", b"x\0\1\0\0\0" + bomb
    yield "a text that unfolds behind the pixels", _png(header, pixels, after, end)
    yield "many texts", _png(header, *[(b"zTXt", b"x\0\0" + bomb)] * 20, pixels, end)
    yield "too few pixels", _png(header, (b"IDAT", zlib.compress(b"\0" * 50)), end)
    yield "no pixels", _png(header, end)
    yield "no header", _png(pixels, end)
    yield "two headers", _png(header, (b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 0, 0, 0, 0)), end)
    yield "a palette of one byte", _png(header, (b"PLTE", b"\0"), pixels, end)
    yield "empty pixel chunks", _png(header, *[(b"IDAT", b"")] * 3000, pixels, end)
    yield "many chunks", _png(header, *[(b"prVt", b"")] * 3000, pixels, end)
    for depth, colours, interlace in ((3, 2, 0), (8, 9, 0), (16, 3, 0), (8, 2, 1), (8, 2, 9)):
        odd = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colours, 0, 0, interlace)
        yield f"{depth} bits of kind {colours}", _png((b"IHDR", odd), pixels, end)
    frames = b"acTL", struct.pack(">II", 2**31, 0)
    place = b"fcTL", struct.pack(">IIIIIHHBB", 0, WIDTH, HEIGHT, 2**30, 2**30, 0, 0, 0, 0)
    yield "two thousand million frames", _png(header, frames, place, pixels, end)


def _tiff(*entries: tuple[int, int, int, int], more: int = 0, pixels: int = 3000) -> bytes:
    """A directory of (tag, type, count, value), from which `more` points on."""
    content = b"II*\0" + struct.pack("<IH", 8, len(entries))
    content += b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return content + struct.pack("<I", more) + bytes(pixels)


def _tiffs() -> Iterator[tuple[str, bytes]]:
    size = (256, 3, 1, WIDTH), (257, 3, 1, HEIGHT)
    gray = (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)
    strip = (273, 4, 1, 200), (278, 3, 1, HEIGHT), (279, 4, 1, WIDTH * HEIGHT)
    yield "plain directory", _tiff(*size, *gray, *strip)
    yield "a directory that follows itself", _tiff(*size, *gray, *strip, more=8)
    for tag in (330, 34665, 34853, 40965, 37500):  # directories below this one, all the same
        for kind in (3, 4, 13, 5, 2):
            content = _tiff(*size, *gray, *strip, (tag, kind, 1, 8), more=8)
            yield f"tag {tag} of type {kind} points back", content
    for value in (0, 1, 65_535, 2**31, 2**32 - 1):
        for tag in (256, 257, 258, 259, 262, 273, 277, 278, 279, 317, 320, 338, 339, 512, 530):
            known = [entry for entry in (*size, *gray, *strip) if entry[0] != tag]
            yield f"tag {tag} is {value}", _tiff(*sorted([*known, (tag, 4, 1, value)]))
            yield f"tag {tag} of {value} values", _tiff(*sorted([*known, (tag, 4, value, 8)]))
        tiles = (322, 4, 1, value), (323, 4, 1, value), (324, 4, 1, 200), (325, 4, 1, 9)
        yield f"tiles of {value}", _tiff(*size, *gray, *tiles)
        for squeezed in (2, 3, 4, 5, 6, 7, 8, 32773, 34712, 34925, 50000, 50001):
            entries = (*size, gray[0], (259, 3, 1, squeezed), gray[2], *strip[:1])
            yield f"compression {squeezed}, {value}", _tiff(*entries, (278, 4, 1, value), strip[2])
    tiny = (322, 4, 1, 1), (323, 4, 1, 1), (324, 4, WIDTH * HEIGHT, 8), (325, 4, 1, 1)
    yield "a tile for each pixel", _tiff(*size, *gray, *tiny)
    yield "a million strips", _tiff(*size, *gray, (273, 4, 2**20, 8), pixels=2**22)
    yield "one tag a thousand times", _tiff(*size, *gray, *strip, *[(305, 2, 9, 8)] * 900)


def _loops(jpeg: bytes) -> Iterator[tuple[str, bytes]]:
    """EXIF whose directories contain each other, and nonsense in it."""
    for tag in (34665, 34853, 40965, 330):
        for value in (0, 7, 8, 2**32 - 1):
            inner = _tiff((tag, 4, 1, value), (0x0112, 3, 1, 6), more=8, pixels=0)
            body = b"Exif\0\0" + inner
            segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
            yield f"EXIF tag {tag} points to {value}", jpeg[:2] + segment + jpeg[2:]
    for kind in range(16):
        body = b"Exif\0\0" + _tiff((0x0112, kind, 2**31, 6), pixels=0)
        segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
        yield f"an orientation of type {kind}", jpeg[:2] + segment + jpeg[2:]
    multi = b"MPF\0" + _tiff((45056, 7, 4, 0), (45057, 4, 1, 2**31), (45058, 7, 32, 8), pixels=0)
    segment = b"\xff\xe2" + struct.pack(">H", len(multi) + 2) + multi
    yield "MPO of two thousand million photos", jpeg[:2] + segment + jpeg[2:]
    yield "a JPEG of many segments", jpeg[:2] + b"\xff\xe1\0\2" * 20_000 + jpeg[2:]
    last = jpeg.rindex(b"\xff\xda")
    yield "a JPEG of many scans", jpeg[:last] + jpeg[last:-2] * 300 + jpeg[last:]


def _declared(whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Sizes in the header that the file does not have."""
    for width, height in ((65_535, 65_535), (12_000, 9_000), (0, 0), (WIDTH, 0), (1_000, 1_100)):
        jpeg = bytearray(whole["jpeg"])
        frame = jpeg.index(b"\xff\xc0")
        struct.pack_into(">HH", jpeg, frame + 5, height, width)
        yield f"JPEG that says {width}x{height}", bytes(jpeg)
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        pixels = zlib.compress(bytes(1000))
        yield f"PNG that says {width}x{height}", _png((b"IHDR", header), (b"IDAT", pixels))
        bmp = bytearray(whole["bmp"])
        for sign in (1, -1):
            struct.pack_into("<ii", bmp, 18, width, sign * height)
            yield f"BMP that says {width}x{sign * height}", bytes(bmp)
        webp = bytearray(whole["webp"])
        webp[24:30] = (max(width, 1) - 1).to_bytes(3, "little") + b"\xff\xff\0"
        yield f"WebP that says {width}x65536", bytes(webp)
    huge = _png((b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)))
    yield "PNG that says 2147483647x2147483647", huge
