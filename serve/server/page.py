"""The page at `/`, and the sample photos that its visitors can try.

The page shows labels in the browser; it is one file that loads nothing else.
"""

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from srdeploy import console
from srdeploy.errors import UserError
from srdeploy.files import explain_os_error
from srdeploy.imaging import (
    PHOTO_SUFFIXES,
    Pixels,
    UnreadableImageError,
    encode_jpeg,
    read_photo,
    scaled_size,
)
from srdeploy.pages import report

MAX_SAMPLES = 8
"""Most samples from a user's folder."""
LONGEST_SIDE = 1280
"""Pixels of a sample's longest side: as large as a page shows, and quick to transfer."""
SCENES = (("meadow", 1), ("river", 7), ("dusk", 10))
"""(name, number) of the synthetic scenes that are the samples if no folder is given."""
SCENE_SIZE = (480, 640)
"""(height, width) of the synthetic scenes."""


class PageSample(Protocol):
    """One sample photo."""

    @property
    def name(self) -> str:
        """The photo's file name, without folders."""

    @property
    def jpeg(self) -> bytes:
        """JPEG of at most LONGEST_SIDE pixels, upright, without the original's metadata."""


@dataclass(frozen=True)
class PhotoSample:
    """A photo from the user's folder."""

    name: str
    jpeg: bytes


@dataclass(frozen=True)
class SyntheticSample:
    """A scene of `srdeploy data synth`, painted (in 0.1 s) on first use."""

    name: str
    number: int

    @cached_property
    def jpeg(self) -> bytes:
        """The same bytes on every run of the same Pillow and numpy."""
        from srdeploy.data.synth import scene  # scipy imports slowly

        photo, _ = scene(np.random.default_rng([7, self.number]), *SCENE_SIZE)
        return encode_jpeg(photo)


def load_samples(folder: Path | None) -> list[PageSample]:
    """The first photos of `folder` by name, without sub-folders; None: synthetic scenes.

    Unreadable photos are reported and skipped. Raises UserError if `folder` can't be listed or has
    no readable photo.
    """
    if folder is None:
        return [SyntheticSample(f"{name}.jpg", number) for name, number in SCENES]
    samples: list[PageSample] = []
    for path in _photos_in(folder):
        try:
            samples.append(PhotoSample(path.name, encode_jpeg(_shrunk(read_photo(path)))))
        except UnreadableImageError as error:
            console.warn(f"no sample: {error}")
        if len(samples) == MAX_SAMPLES:
            break
    if not samples:
        looked_for = ", ".join(sorted(PHOTO_SUFFIXES))
        raise UserError(f"no photos in {folder} for samples: {looked_for} are looked for")
    return samples


@functools.cache
def render_page() -> tuple[str, str]:
    """The page as HTML text, and the Content-Security-Policy that it must be sent with.

    The policy allows only this script and style, and requests only to this server: the name of a
    class or file can't become code, and no photo can leak.
    """
    page = report.render_page("srdeploy.serve.server", "page.html")
    rules = (
        "default-src 'none'",
        f"script-src {_digest(page, 'script')}",
        f"style-src {_digest(page, 'style')}",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return page, "; ".join(rules)


def _photos_in(folder: Path) -> Sequence[Path]:
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".")
        )
    except OSError as error:
        raise explain_os_error(error, folder) from error


def _shrunk(photo: Pixels) -> Pixels:
    if max(photo.shape) <= LONGEST_SIDE:
        return photo
    height, width = scaled_size(photo.shape[0], photo.shape[1], LONGEST_SIDE)
    image = Image.fromarray(photo).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _digest(page: str, tag: str) -> str:
    """The policy's digest of the text in the page's only element `tag`."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
