"""Photos in, masks out. The one place where images are decoded, fitted, restored, coloured and
encoded.

Images in memory are RGB uint8 [H, W, 3]; labels are uint8 [H, W]. H height, W width, N batch, K
classes.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from srdeploy.errors import UserError
from srdeploy.spec import Spec

Pixels = npt.NDArray[np.uint8]

PHOTO_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"])


class UnreadableImageError(UserError):
    """A file that can't be decoded as an image; the message names it."""


def read_photo(path: Path) -> Pixels:
    """Decodes a photo to RGB uint8 [H, W, 3], upright as its EXIF orientation says.

    Gray, gray + alpha, palette, RGBA, CMYK and 16-bit files are handled: alpha is laid over
    white, 16 bits
    keep their upper byte (a 16-bit file that holds 0..65535; values are not stretched).
    Raises UnreadableImageError.
    """
    try:
        with Image.open(path) as file:
            return to_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError as error:
        raise UnreadableImageError(f"no such file: {path}") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
    ) as error:
        raise UnreadableImageError(f"{path}: not a readable image ({_reason(error)})") from error


def to_rgb(image: Image.Image) -> Pixels:
    """Any Pillow image as RGB uint8 [H, W, 3]."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F":
            values = np.nan_to_num(values)
        # Pillow opens 16-bit PNG and TIFF as I;16 or I: both hold 0..65535.
        gray = (np.clip(values, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layered)
    return np.array(image.convert("RGB"))


def read_labels(path: Path) -> Pixels:
    """Decodes a label mask (8-bit gray or palette, class id per pixel) to uint8 [H, W]; colours
    are not read.

    Raises UnreadableImageError, also where the file holds colours instead of ids.
    """
    try:
        with Image.open(path) as file:
            if file.mode not in ("L", "P", "1"):
                raise UnreadableImageError(
                    f"{path}: a label mask holds one class id per pixel (8-bit gray or palette "
                    f"PNG), this file is {file.mode}"
                )
            return np.array(file if file.mode != "1" else file.convert("L"))
    except FileNotFoundError as error:
        raise UnreadableImageError(f"no such file: {path}") from error
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise UnreadableImageError(f"{path}: not a readable mask ({_reason(error)})") from error


def fitted_size(height: int, width: int, spec: Spec) -> tuple[int, int]:
    """(height, width) at which the network sees a photo of the given size, as the spec's policy
    says."""
    longest = spec.input.longest_side
    if longest is None:
        return height, width
    scale = longest / max(height, width)
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
    """Labels uint8 [h, w] at the photo's own size, by nearest neighbour."""
    if labels.shape == (height, width):
        return labels
    return np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))


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
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def overlay(photo: Pixels, labels: Pixels, spec: Spec, opacity: float = 0.5) -> Pixels:
    """The photo with the class colours laid over it, uint8 [H, W, 3]; ignored pixels show the
    photo."""
    colours = colour_table(spec)[labels].astype(np.float32)
    mixed = photo * (1 - opacity) + colours * opacity
    mixed = np.where((labels < spec.class_count)[..., None], mixed, photo)
    return mixed.round().astype(np.uint8)


def encode_png(image: Pixels) -> bytes:
    """RGB uint8 [H, W, 3] as PNG."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def encode_jpeg(image: Pixels, quality: int = 90) -> bytes:
    """RGB uint8 [H, W, 3] as JPEG."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
