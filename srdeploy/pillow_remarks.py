"""What Pillow says of broken and of large files, and what of that people are told."""

import ctypes
import logging
import re
import struct
import warnings

from PIL import Image, UnidentifiedImageError, _imaging

_SPOKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning)
"""Errors whose text is meant for people."""
_INTERNAL = (LookupError, struct.error)
"""Errors of Pillow's own code, which it passes on in others."""
_LONGEST = 160
"""Characters of a reason."""


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


def raise_pillows_limit(pixels: int) -> None:
    """Pillow's own limit of pixels is the whole process's: it is raised to ours and never lowered,
    so that threads need not take turns, as they would to silence its warning for one image."""
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = pixels


def ignore_remarks() -> None:
    """Silences what Pillow says of damaged files, for the whole process: strangers would write its
    log, and grow its list of warnings given. Call it once, before threads decode."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    _silence_libtiff()


def _silence_libtiff() -> None:
    """libtiff writes to the process's stderr by itself, and Pillow leaves it so. Nothing is done
    where Pillow has none, or hides it."""
    library = ctypes.CDLL(_imaging.__file__)  # finds also what it is linked with
    silence = getattr(library, "TIFFSetErrorHandler", None)
    if silence is not None:
        silence.argtypes = [ctypes.c_void_p]
        silence.restype = ctypes.c_void_p
        silence(None)
