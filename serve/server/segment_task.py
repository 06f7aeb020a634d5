"""One photo of a request: decoded, segmented, and answered as a mask, an overlay or JSON."""

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

MAX_BORDER = 1_000_000
"""Most border pixels of regions in JSON, some tens of MiB. Street photos of 12 megapixels have
a tenth of that, noise has more."""
MAX_POLYGON_PIXELS = 20_000_000
"""Most pixels of a photo whose regions are outlined, which takes about 600 MB of memory."""
MAX_NAME = 80
"""Characters of an upload's file name that are kept."""

SUFFIXES = {"mask": ".png", "overlay": ".jpg"}
MEDIA_TYPES = {"mask": "image/png", "overlay": "image/jpeg", "json": "application/json"}
ZIP = "application/zip"

_MAX_STEM_BYTES = 200
"""Most bytes of a stem: file systems take names of 255."""
_DEVICES = frozenset(
    ["CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(1, 10))]
)
"""File names that mean devices on Windows, whatever their suffix."""


@dataclass(frozen=True)
class SegmentOptions:
    """The form in which a request wants its photos answered."""

    output: Output = "mask"
    regions: Regions = "none"
    """How JSON describes regions."""
    opacity: float = 0.5
    """Opacity of the class colours in overlays, 0..1."""
    zipped: bool = False
    """Whether a single mask or overlay comes in a zip too; several always do."""


@dataclass(frozen=True)
class PhotoAnswer:
    """The answer for one photo."""

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
        options: SegmentOptions,
        number: int | None = None,
    ) -> None:
        """content: the encoded image. name: the upload's file name. number: the photo's position
        among several in a request, from 1; None for a single photo."""
        self._content: bytes | None = content
        # Names may contain lone surrogates, which JSON can't.
        self._name = name and name.encode("utf-8", "replace").decode()
        self._spec = spec
        self._limits = limits
        self._options = options
        self._label = _photo_name(name, number)
        self._size = (0, 0)
        self._photo: Pixels | None = None

    def prepare(self) -> Pixels:
        """The photo as the network sees it, uint8 [1, h, w, 3]. Raises BadRequest and TooLarge."""
        content = self._content
        assert content is not None
        try:
            photo = decode_photo(content, self._label, self._limits.pixels)
        except OversizedImageError as error:
            raise TooLarge(str(error)) from error
        except UserError as error:
            raise BadRequest(str(error)) from error
        self._content = None  # frees memory while the task waits
        height, width = photo.shape[:2]
        self._size = (height, width)
        self._check_network_takes(height, width)
        try:
            fitted = fit(photo, self._spec)
        except UserError as error:
            raise BadRequest(f"{self._label}: {error}") from error
        if self._options.output == "overlay":
            self._photo = photo
        return fitted[None]

    def finish(self, labels: Pixels) -> PhotoAnswer:
        """The answer from labels uint8 [1, h, w]. Raises TooLarge if the JSON would be huge."""
        height, width = self._size
        restored = restore(labels[0], height, width)
        output = self._options.output
        content = None
        entry: dict[str, Any] = {"name": self._name, "width": width, "height": height}
        if output == "mask":
            content = encode_mask(restored, self._spec)
        elif output == "overlay":
            assert self._photo is not None
            mixed = overlay(self._photo, restored, self._spec, self._options.opacity)
            self._photo = None
            content = encode_jpeg(mixed)
        else:
            entry |= self._describe(restored)
        return PhotoAnswer(content, MEDIA_TYPES[output], entry)

    def _check_network_takes(self, height: int, width: int) -> None:
        policy = self._spec.input
        fitted = fitted_size(height, width, self._spec)
        most = self._limits.network_pixels(self._spec)
        if policy.longest_side is None and fitted[0] * fitted[1] > most:
            raise TooLarge(
                f"{self._label}: an image of {width}x{height} is too large: the network takes up "
                f"to {most / 1e6:.3g} megapixels here: scale it down"
            )

    def _describe(self, labels: Pixels) -> dict[str, Any]:
        """The fields classes and ignored_pixels of the photo's entry."""
        spec, regions = self._spec, self._options.regions
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
        if self._options.regions == "polygons" and labels.size > MAX_POLYGON_PIXELS:
            raise TooLarge(
                f"{self._label}: polygons are drawn for up to {MAX_POLYGON_PIXELS / 1e6:g} "
                f"megapixels, it has {labels.size / 1e6:.1f}: ask for regions=rle"
            )
        length = border_length(labels)
        if length > MAX_BORDER:
            raise TooLarge(
                f"{self._label}: its regions have borders of {length} pixels, at most "
                f"{MAX_BORDER} are described: ask for output=mask"
            )


def pack(answers: Sequence[PhotoAnswer], options: SegmentOptions) -> tuple[bytes, str]:
    """(content, media type) of a request's masks or overlays: one as it is, several in a zip."""
    if len(answers) == 1 and not options.zipped:
        (answer,) = answers
        assert answer.content is not None
        return answer.content, answer.media_type
    names = entry_names([answer.entry["name"] for answer in answers], SUFFIXES[options.output])
    buffer = BytesIO()
    # Stored, since PNG and JPEG don't shrink; dated alike, so that equal answers are equal bytes.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, answer in zip(names, answers, strict=True):
            assert answer.content is not None
            archive.writestr(zipfile.ZipInfo(name), answer.content)
    return buffer.getvalue(), ZIP


def entry_names(names: Sequence[str | None], suffix: str) -> list[str]:
    """Safe file names for a zip, unique even without regard to case: from the clients' file names
    if they have any letter or digit, else image-0001 and so on."""
    taken: set[str] = set()
    given = []
    for number, name in enumerate(names, start=1):
        stem = _safe_stem(name or "") or f"image-{number:04d}"
        unique, again = stem, 1
        while unique.casefold() in taken:
            again += 1
            unique = f"{stem[: MAX_NAME - len(str(again)) - 1]}-{again}"
        taken.add(unique.casefold())
        given.append(unique + suffix)
    return given


def _safe_stem(name: str) -> str:
    """The stem of a file name's last component in letters, digits, dots, - and _; maybe empty."""
    last = unicodedata.normalize("NFC", name).replace("\\", "/").rsplit("/", 1)[-1]
    stem = last.rsplit(".", 1)[0] if "." in last.lstrip(".") else last
    stem = re.sub(r"[^\w.-]", "_", stem).lstrip("._-")[:MAX_NAME]
    while len(stem.encode()) > _MAX_STEM_BYTES:
        stem = stem[:-1]
    stem = stem.rstrip("._-")
    return f"image-{stem}" if stem.split(".")[0].upper() in _DEVICES else stem


def _photo_name(name: str | None, number: int | None) -> str:
    """The name of a photo in messages: image 2 ('night.jpg')."""
    position = "the image" if number is None else f"image {number}"
    if not name:
        return position
    shown = "".join(c if c.isprintable() else "?" for c in name)
    if len(shown) > MAX_NAME:
        shown = shown[: MAX_NAME - 3] + "..."
    return f"{position} ('{shown}')"
