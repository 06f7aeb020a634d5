"""Photos that visitors of the page can try without having one at hand."""

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

MOST = 8
"""Samples of a user's folder, at most."""
LONGEST_SIDE = 1280
"""In pixels: what a page shows, and quick to send back and forth."""
MADE_UP = (("meadow", 1), ("river", 7), ("dusk", 10))
"""(name, number of the scene) of the samples where no folder is given."""
MADE_UP_SIZE = (480, 640)
"""(height, width) of the made-up scenes."""


class PageSample(Protocol):
    """One photo on offer."""

    @property
    def name(self) -> str:
        """Of the photo's file, without folders."""

    @property
    def jpeg(self) -> bytes:
        """At most LONGEST_SIDE pixels, upright, without the metadata of the original."""


@dataclass(frozen=True)
class PhotoSample:
    """A photo of the user's."""

    name: str
    jpeg: bytes


@dataclass(frozen=True)
class SyntheticSample:
    """A scene of `srdeploy data synth`, painted (in 0.1 s) when first asked for."""

    name: str
    number: int

    @cached_property
    def jpeg(self) -> bytes:
        """The same bytes on every run of the same Pillow and numpy."""
        from srdeploy.data.synth import scene  # scipy takes its time, and the start should not wait

        photo, _ = scene(np.random.default_rng([7, self.number]), *MADE_UP_SIZE)
        return encode_jpeg(photo)


def load_samples(folder: Path | None) -> list[PageSample]:
    """The first photos of `folder` by name, without those of its sub-folders; for None, made-up
    scenes.

    Photos that can't be read are reported and left out. Raises UserError where `folder` can't be
    listed or holds no photo that can be read.
    """
    if folder is None:
        return [SyntheticSample(f"{name}.jpg", number) for name, number in MADE_UP]
    samples: list[PageSample] = []
    for path in _photos_in(folder):
        try:
            samples.append(PhotoSample(path.name, encode_jpeg(_shrunk(read_photo(path)))))
        except UnreadableImageError as error:
            console.warn(f"no sample: {error}")
        if len(samples) == MOST:
            break
    if not samples:
        looked_for = ", ".join(sorted(PHOTO_SUFFIXES))
        raise UserError(f"no photos in {folder} for samples: {looked_for} are looked for")
    return samples


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


# The page at `/`: photos in, labels shown in the browser; one file that loads nothing else.


@functools.cache
def render_page() -> tuple[str, str]:
    """The page as HTML text, and the Content-Security-Policy that it must be sent with.

    The policy lets the browser run this very script and style, speak with this very server, and
    nothing else: what a class or a file is named can't become code, nor can a photo leave.
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


def _digest(page: str, tag: str) -> str:
    """The policy's name for the text of the page's one `tag`."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
