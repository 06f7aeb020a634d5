"""The work of one photo: decoded, segmented, and answered as a mask, an overlay or JSON."""

import re
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

from srdeploy.errors import UserError
from srdeploy.imaging import (
    OversizedImageError,
    Pixels,
    decode_photo,
    encode_jpeg,
    encode_mask,
    fit,
    fitted_size,
    overlay,
    restore,
)
from srdeploy.regions import border_length, class_areas, label_runs, polygons
from srdeploy.serve.server.admission import BadRequest, TooLarge
from srdeploy.serve.server.config import ServerLimits
from srdeploy.spec import Spec

Output = Literal["mask", "overlay", "json"]
Regions = Literal["none", "rle", "polygons"]

MOST_BORDER = 1_000_000
"""Pixels along the borders of regions that are described in JSON: tens of MiB. Photos of streets at
12 megapixels have a tenth of that, noise has more."""
MOST_POLYGON_PIXELS = 20_000_000
"""Of a photo whose regions are outlined, which takes some 600 MB of memory."""
LONGEST_NAME = 80
"""Characters of an upload's file name that are used."""

SUFFIXES = {"mask": ".png", "overlay": ".jpg"}
MEDIA_TYPES = {"mask": "image/png", "overlay": "image/jpeg", "json": "application/json"}
ZIP = "application/zip"


@dataclass(frozen=True)
class SegmentOptions:
    """How a request wants its photos answered."""

    output: Output = "mask"
    regions: Regions = "none"
    """In JSON."""
    opacity: float = 0.5
    """Of the class colours in overlays, 0..1."""
    zipped: bool = False
    """Whether one mask or overlay comes in a zip too; several always do."""


@dataclass(frozen=True)
class PhotoAnswer:
    """What one photo became."""

    content: bytes | None
    """The mask or overlay as a file; None for JSON."""
    media_type: str
    entry: dict[str, Any]
    """name, width and height; for JSON also classes and ignored_pixels."""


class SegmentTask:
    """One photo of a request; see `srdeploy.serve.scheduling.scheduler.Task`."""

    def __init__(
        self,
        content: bytes,
        name: str | None,
        spec: Spec,
        limits: ServerLimits,
        wanted: SegmentOptions,
        number: int | None = None,
    ) -> None:
        """content: the encoded image. name: the upload's file name. number: the photo's place among
        several in a request, from 1; None where it is alone."""
        self._content: bytes | None = content
        # Names may hold halves of characters, which no JSON can.
        self._name = name and name.encode("utf-8", "replace").decode()
        self._spec = spec
        self._limits = limits
        self._wanted = wanted
        self._called = _called(name, number)
        self._size = (0, 0)
        self._photo: Pixels | None = None

    def prepare(self) -> Pixels:
        """The photo as the network sees it, uint8 [1, h, w, 3]. Raises BadRequest and TooLarge."""
        content = self._content
        assert content is not None
        try:
            photo = decode_photo(content, self._called, self._limits.pixels)
        except OversizedImageError as error:
            raise TooLarge(str(error)) from error
        except UserError as error:
            raise BadRequest(str(error)) from error
        self._content = None  # memory that waiting tasks need not hold
        height, width = photo.shape[:2]
        self._size = (height, width)
        self._check_network_takes(height, width)
        try:
            fitted = fit(photo, self._spec)
        except UserError as error:
            raise BadRequest(f"{self._called}: {error}") from error
        if self._wanted.output == "overlay":
            self._photo = photo
        return fitted[None]

    def finish(self, labels: Pixels) -> PhotoAnswer:
        """The answer from labels uint8 [1, h, w]. Raises TooLarge where JSON would be huge."""
        height, width = self._size
        restored = restore(labels[0], height, width)
        output = self._wanted.output
        content = None
        entry: dict[str, Any] = {"name": self._name, "width": width, "height": height}
        if output == "mask":
            content = encode_mask(restored, self._spec)
        elif output == "overlay":
            assert self._photo is not None
            mixed = overlay(self._photo, restored, self._spec, self._wanted.opacity)
            self._photo = None
            content = encode_jpeg(mixed)
        else:
            entry |= self._described(restored)
        return PhotoAnswer(content, MEDIA_TYPES[output], entry)

    def _check_network_takes(self, height: int, width: int) -> None:
        policy = self._spec.input
        fitted = fitted_size(height, width, self._spec)
        most = self._limits.network_pixels(self._spec)
        if policy.longest_side is None and fitted[0] * fitted[1] > most:
            raise TooLarge(
                f"{self._called}: an image of {width}x{height} is too large: the network takes up "
                f"to {most / 1e6:.3g} megapixels here: scale it down"
            )

    def _described(self, labels: Pixels) -> dict[str, Any]:
        """classes and ignored_pixels of an image's entry."""
        spec, regions = self._spec, self._wanted.regions
        areas = class_areas(labels, spec)
        if regions != "none":
            self._check_regions(labels)
        counts = {}
        if regions == "rle":
            counts = {runs.label: runs.counts for runs in label_runs(labels)}
        classes = []
        for area in areas.classes:
            described: dict[str, Any] = {
                "id": area.id,
                "name": spec.classes[area.id],
                "colour": list(spec.palette[area.id]),
                "pixels": area.pixels,
                "share": round(area.share, 6),
            }
            if regions == "rle":
                described["rle"] = {"size": list(self._size), "counts": counts[area.id]}
            elif regions == "polygons":
                described["polygons"] = polygons(labels == area.id)
            classes.append(described)
        return {"classes": classes, "ignored_pixels": areas.ignored}

    def _check_regions(self, labels: Pixels) -> None:
        if self._wanted.regions == "polygons" and labels.size > MOST_POLYGON_PIXELS:
            raise TooLarge(
                f"{self._called}: polygons are drawn for up to {MOST_POLYGON_PIXELS / 1e6:g} "
                f"megapixels, it has {labels.size / 1e6:.1f}: ask for regions=rle"
            )
        length = border_length(labels)
        if length > MOST_BORDER:
            raise TooLarge(
                f"{self._called}: its regions have borders of {length} pixels, {MOST_BORDER} are "
                "described: ask for output=mask"
            )


def pack(answers: Sequence[PhotoAnswer], wanted: SegmentOptions) -> tuple[bytes, str]:
    """(content, media type) of a request's masks or overlays: one as it is, several in a zip."""
    if len(answers) == 1 and not wanted.zipped:
        (answer,) = answers
        assert answer.content is not None
        return answer.content, answer.media_type
    names = entry_names([answer.entry["name"] for answer in answers], SUFFIXES[wanted.output])
    buffer = BytesIO()
    # Stored: PNG and JPEG don't shrink. Of a fixed date: equal answers are equal bytes.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, answer in zip(names, answers, strict=True):
            assert answer.content is not None
            archive.writestr(zipfile.ZipInfo(name), answer.content)
    return buffer.getvalue(), ZIP


def entry_names(names: Sequence[str | None], suffix: str) -> list[str]:
    """Harmless file names for a zip, no two alike even where case does not count: from the clients'
    file names where they have any letter or digit, else image-0001 and so on."""
    taken: set[str] = set()
    given = []
    for number, name in enumerate(names, start=1):
        stem = _harmless_stem(name or "") or f"image-{number:04d}"
        unique, again = stem, 1
        while unique.casefold() in taken:
            again += 1
            unique = f"{stem[: LONGEST_NAME - len(str(again)) - 1]}-{again}"
        taken.add(unique.casefold())
        given.append(unique + suffix)
    return given


def _harmless_stem(name: str) -> str:
    """The stem of a file name's last component in letters, digits, dots, - and _; maybe empty."""
    last = unicodedata.normalize("NFC", name).replace("\\", "/").rsplit("/", 1)[-1]
    stem = last.rsplit(".", 1)[0] if "." in last.lstrip(".") else last
    stem = re.sub(r"[^\w.-]", "_", stem).lstrip("._-")[:LONGEST_NAME]
    while len(stem.encode()) > _MOST_BYTES:
        stem = stem[:-1]
    stem = stem.rstrip("._-")
    return f"image-{stem}" if stem.split(".")[0].upper() in _DEVICES else stem


_MOST_BYTES = 200
"""Of a stem: file systems take names of 255."""
_DEVICES = frozenset(
    ["CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(1, 10))]
)
"""File names that mean devices on Windows, whatever their suffix."""


def _called(name: str | None, number: int | None) -> str:
    """What messages call a photo: image 2 ('night.jpg')."""
    called = "the image" if number is None else f"image {number}"
    if not name:
        return called
    shown = "".join(c if c.isprintable() else "?" for c in name)
    if len(shown) > LONGEST_NAME:
        shown = shown[: LONGEST_NAME - 3] + "..."
    return f"{called} ('{shown}')"
