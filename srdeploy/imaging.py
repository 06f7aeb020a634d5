"""Photos in, masks out: the one place where images are decoded, fitted, restored, coloured and
encoded.

Arrays are uint8: photos RGB [H, W, 3], masks and labels [H, W].
"""

import ctypes
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError, _imaging

from srdeploy.errors import UserError
from srdeploy.image_header import check_header, format_of, opener, webp_size
from srdeploy.spec import Spec

Pixels = npt.NDArray[np.uint8]

PHOTO_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"])

_SPOKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning)
"""Errors whose text is meant for people."""
_INTERNAL = (LookupError, struct.error)
"""Errors of Pillow's own code, which it passes on in others."""
_LONGEST = 160
"""Characters of a reason."""


class UnreadableImageError(UserError):
    """A file that can't be decoded as an image; the message names it."""


class OversizedImageError(UnreadableImageError):
    """An image of more pixels than are allowed, as its header says; the message names both."""


def read_photo(path: Path) -> Pixels:
    """Decodes a photo to RGB uint8 [H, W, 3], upright as its EXIF orientation says.

    Gray, gray + alpha, palette, RGBA, CMYK and 16-bit files are handled: alpha is laid over white,
    16 bits keep their upper byte (values are not stretched). The array may be read-only. Raises
    UnreadableImageError.
    """
    with _opened(path, "image") as file:
        return _upright(file)


def decode_photo(content: bytes, name: str, pixels: int | None = None) -> Pixels:
    """An image in memory, decoded as `read_photo` does a file, RGB uint8 [H, W, 3].

    For untrusted images: only the formats of PHOTO_SUFFIXES are opened, recognised by their first
    bytes, and headers that ask for excessive work are refused. name: what messages call the image.
    pixels: the most that are decoded, whatever Pillow's own limit is; None: any number. Threads may
    decode at once. Raises UnreadableImageError, or OversizedImageError before any pixel is decoded.
    """
    with _said_of(name, "image"):
        format = format_of(content)
        if format is None:
            raise ValueError("unknown format: give JPEG, PNG, WebP, BMP or TIFF")
        check_header(content, format)
        if pixels is not None:
            increase_pixel_limit(pixels)
            # libwebp takes the memory of the whole canvas when it is given the file.
            declared = webp_size(content) if format == "WEBP" else None
            if declared is not None:
                _check_pixels(declared, name, pixels)
        with opener(format)(BytesIO(content), "") as file:
            if pixels is not None:
                _check_pixels(file.size, name, pixels)
            if format == "JPEG" and file.mode == "RGB" and _orientation(file) == 1:
                quick = _quick_jpeg(content)
                if quick is not None:
                    return quick
            return _upright(file)


def photo_size(path: Path) -> tuple[int, int]:
    """(height, width) as of `read_photo`, from the header. Raises UnreadableImageError."""
    with _opened(path, "image") as file:
        width, height = file.size
        if isinstance(file, TiffImagePlugin.TiffImageFile):
            # Some versions of Pillow have turned the size already, others turn it with the pixels.
            width, height = (
                file.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength)
            )
        return (width, height) if _orientation(file) >= 5 else (height, width)


def to_rgb(image: Image.Image) -> Pixels:
    """Any Pillow image as RGB uint8 [H, W, 3], which may be read-only. Raises ValueError for more
    than 16 bits a pixel."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and not 0 <= values.min() <= values.max() <= 65535:
            raise ValueError("32-bit pixels outside 0..65535: save it with 8 or 16 bits")
        gray = (values.astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown: save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layered)
    # Copies cost as much as decoding does: the memory is fresh each time.
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_labels(path: Path) -> Pixels:
    """Decodes a label mask (gray or palette, class id per pixel) to uint8 [H, W].

    Colours are not read. Masks of 1, 2 and 4 bits, as PNG optimisers write them, keep their ids.
    Raises UnreadableImageError, also where the file holds colours instead of ids.
    """
    with _opened(path, "mask") as file:
        if file.mode not in ("L", "P", "1"):
            raise UnreadableImageError(
                f"{path}: a label mask holds one class id per pixel (8-bit gray or palette PNG), "
                f"this file is {file.mode}"
            )
        # Pillow spreads gray of few bits over 0..255 while decoding; ids must come back as stored.
        raw_mode = None
        if isinstance(file, PngImagePlugin.PngImageFile) and file.tile:
            raw_mode = file.tile[0].args
        labels = np.array(file, np.uint8)
    return labels // np.uint8(_SPREAD.get(raw_mode, 1))


def read_gray(path: Path, what: str) -> Pixels:
    """Decodes a gray PNG to its grays, uint8 [H, W]. what: what messages call it.

    Of 8 bits, or fewer where a PNG optimiser needs no more for the same grays. Raises
    UnreadableImageError, also where the file is anything else.
    """
    with _opened(path, what) as file:
        if file.format != "PNG" or file.mode not in ("L", "1"):
            raise UnreadableImageError(
                f"{path}: a {what} is an 8-bit gray PNG, this file is {file.format}, {file.mode}"
            )
        return np.array(file.convert("L"))


_SPREAD: dict[object, int] = {"L;2": 85, "L;4": 17}
"""Factor by which Pillow multiplies gray of 2 and 4 bits, by the raw mode of the PNG's tile."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets an image upright, by its EXIF orientation; 5 and above swap height and width."""


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Image.Image]:
    """The file opened by Pillow; whatever goes wrong in the block is said of the file."""
    with _said_of(path, what), Image.open(path) as file:
        yield file


@contextmanager
def _said_of(name: object, what: str) -> Iterator[None]:
    """Whatever goes wrong in the block is said of the image."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UnreadableImageError(f"no such file: {name}") from error
    # Broken files raise nearly everything, by format and version: none may pass as a bug of ours.
    except Exception as error:
        raise UnreadableImageError(f"{name}: not a readable {what} ({reason_of(error)})") from error


def _upright(file: Image.Image) -> Pixels:
    """The pixels as the EXIF orientation says."""
    file.load()  # first: this sets a TIFF upright, and takes the orientation off it
    turn = _TURNS.get(_orientation(file))
    return to_rgb(file if turn is None else file.transpose(turn))


def _quick_jpeg(content: bytes) -> Pixels | None:
    """What Pillow gives, in less time: it decodes into the array itself. None where the file is
    damaged in any way, so that only Pillow says what is and what is not an image."""
    try:
        return cast(Pixels, simplejpeg.decode_jpeg(content, "RGB"))
    except (ValueError, MemoryError):
        return None


def _orientation(file: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none or the EXIF block is broken, as viewers do."""
    try:
        value = file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_pixels(size: tuple[int, int], name: str, most: int) -> None:
    """Raises OversizedImageError. size: (width, height)."""
    count = size[0] * size[1]
    if count > most:
        raise OversizedImageError(
            f"{name}: the image has {size[0]}x{size[1]} = {count / 1e6:.1f} megapixels, "
            f"{most / 1e6:g} are allowed"
        )


def fitted_size(height: int, width: int, spec: Spec) -> tuple[int, int]:
    """(height, width) at which the network sees a photo of the given size, as the spec's policy
    says."""
    if spec.input.fixed:
        return spec.input.largest
    return scaled_size(height, width, spec.input.longest_side)


def scaled_size(height: int, width: int, longest_side: int | None) -> tuple[int, int]:
    """(height, width) in proportion, the longer one `longest_side`; unchanged for None."""
    if longest_side is None:
        return height, width
    scale = longest_side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def fit(photo: Pixels, spec: Spec) -> Pixels:
    """The photo at the size that the network sees, uint8 [h, w, 3]. Raises UserError where it is
    too small."""
    height, width = fitted_size(photo.shape[0], photo.shape[1], spec)
    least = spec.input.smallest
    if height < least[0] or width < least[1]:
        raise UserError(
            f"an image of {width}x{height} is too small: the network needs at least "
            f"{least[1]}x{least[0]} (width x height)"
        )
    if (height, width) == photo.shape[:2]:
        return photo
    return np.asarray(Image.fromarray(photo).resize((width, height), Image.Resampling.BILINEAR))


def restore(labels: Pixels, height: int, width: int) -> Pixels:
    """Labels uint8 [h, w] at the photo's own size: each pixel takes the label under its centre."""
    if labels.shape == (height, width):
        return labels
    # In whole numbers: Pillow's sums of fractions go astray where a centre meets a border.
    rows = (2 * np.arange(height) + 1) * labels.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * labels.shape[1] // (2 * width)
    restored: Pixels = labels.take(rows, axis=0).take(columns, axis=1)
    return restored


def normalise(images: Pixels, spec: Spec) -> npt.NDArray[np.float32]:
    """uint8 [N, H, W, 3] RGB to the network's float32 [N, 3, H, W]: for graphs that leave this
    to the client.

    Equal to `srdeploy.deployable.Normalise` (a test holds them together).
    """
    scale = 1.0 / (255.0 * np.asarray(spec.std, np.float64))
    offset = -np.asarray(spec.mean, np.float64) / np.asarray(spec.std, np.float64)
    values = images.astype(np.float32) * scale.astype(np.float32) + offset.astype(np.float32)
    if spec.colour_order == "BGR":
        values = values[..., ::-1]
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def colour_table(spec: Spec) -> Pixels:
    """uint8 [256, 3]: the RGB colour of every label; ids without a class get the void colour."""
    table = np.empty((256, 3), np.uint8)
    table[:] = spec.void_colour
    table[: spec.class_count] = spec.palette
    return table


def encode_mask(labels: Pixels, spec: Spec) -> bytes:
    """Labels uint8 [H, W] as a palette PNG: the pixel value is the class id, viewers show the
    colour."""
    image = Image.fromarray(labels, mode="L")
    image.putpalette(colour_table(spec).tobytes())
    return _mask_png(image)


def encode_gray(labels: Pixels) -> bytes:
    """Labels uint8 [H, W] as an 8-bit gray PNG of the class ids, without colours."""
    return _mask_png(Image.fromarray(labels, mode="L"))


def _mask_png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    # Masks are runs: to look for nothing else is quickest, and street scenes get a quarter smaller.
    image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def overlay(photo: Pixels, labels: Pixels, spec: Spec, opacity: float = 0.5) -> Pixels:
    """The photo with the class colours laid over it, uint8 [H, W, 3]; ignored pixels show the
    photo."""
    # Looked up: arithmetic on each pixel takes three times as long.
    values, table = np.arange(256, dtype=np.uint8), colour_table(spec).astype(np.float32)
    mixtures = (values * (1 - opacity) + table[:, :, None] * opacity).round().astype(np.uint8)
    mixtures[spec.class_count :] = values
    starts = np.arange(mixtures.size, step=256).reshape(256, 3)  # by label and channel
    mixed = np.empty_like(photo)
    for top in range(0, len(photo), _BAND):
        rows = slice(top, top + _BAND)
        places = starts.take(labels[rows], axis=0)
        places += photo[rows]
        mixtures.take(places, out=mixed[rows], mode="clip")  # else numpy copies first
    return mixed


_BAND = 64
"""Rows that are mixed at a time: the places of a whole large photo are gigabytes."""


def encode_png(image: Pixels) -> bytes:
    """RGB uint8 [H, W, 3] as PNG."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def encode_jpeg(image: Pixels, quality: int = 90) -> bytes:
    """RGB uint8 [H, W, 3] as JPEG. Raises UserError where a side is longer than JPEG allows."""
    height, width = image.shape[:2]
    if max(height, width) > _LONGEST_JPEG_SIDE:
        raise UserError(
            f"a picture of {width}x{height} is too large for JPEG, which has up to "
            f"{_LONGEST_JPEG_SIDE} pixels a side: ask for only the mask"
        )
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


_LONGEST_JPEG_SIDE = 65500
"""libjpeg's JPEG_MAX_DIMENSION."""


def strongest(logits: npt.NDArray[np.float32]) -> Pixels:
    """Labels uint8 [h, w] of logits float32 [K, h, w]: the class of the largest, the first of
    equals, as ArgMax in the graph."""
    # Plane by plane: np.argmax over the first axis takes several times as long, and 8 bytes a
    # pixel.
    best = logits[0].copy()
    labels = np.zeros(best.shape, np.uint8)
    for label in range(1, len(logits)):
        larger = logits[label] > best
        np.copyto(best, logits[label], where=larger)
        labels[larger] = label
    return labels


def first_photos(folder: Path, count: int) -> list[Pixels]:
    """The first `count` photos of `folder` by name, decoded. Raises UserError where there are
    none."""
    if not folder.is_dir():
        raise UserError(f"no such folder of photos: {folder}")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES)
    if not files:
        raise UserError(f"{folder} has no photos: give a folder with .jpg or .png files")
    return [read_photo(file) for file in files[:count]]


def reason_of(error: Exception) -> str:
    """Why an image could not be decoded: a short line without addresses of objects."""
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"
    if isinstance(error, MemoryError):
        return "more memory than there is"
    unspoken = not isinstance(error, _SPOKEN) or isinstance(error.__cause__, _INTERNAL)
    if unspoken or not str(error).strip():
        return "damaged data"
    line = "".join(c if c.isprintable() else "?" for c in str(error).strip().splitlines()[0])
    return re.sub(r"<[^<>]* at 0x[^<>]*>", "the image", line)[:_LONGEST]


def increase_pixel_limit(pixels: int) -> None:
    """Raises Pillow's limit of pixels, which holds for the whole process, to at least `pixels`.

    It is never lowered: threads would otherwise have to take turns.
    """
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = pixels


def ignore_pillow_warnings() -> None:
    """Silences Pillow's warnings about damaged files, for the whole process.

    Untrusted files would otherwise fill the log and grow Python's list of warnings already given.
    Call it once, before threads decode.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    _silence_libtiff()


def _silence_libtiff() -> None:
    """Stops libtiff from writing to the process's stderr, which Pillow does not do. Does nothing
    where Pillow was built without libtiff or hides it."""
    library = ctypes.CDLL(_imaging.__file__)  # finds also what it is linked with
    silence = getattr(library, "TIFFSetErrorHandler", None)
    if silence is not None:
        silence.argtypes = [ctypes.c_void_p]
        silence.restype = ctypes.c_void_p
        silence(None)
