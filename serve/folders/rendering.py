"""The classes of one photo as COCO's run lengths, in JSON."""

import json
import zipfile
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from srdeploy.errors import UserError
from srdeploy.imaging import (
    Pixels,
    encode_gray,
    encode_jpeg,
    encode_mask,
    encode_png,
    overlay,
    restore,
    strongest,
)
from srdeploy.regions import LabelRuns, label_runs
from srdeploy.runtimes.base import Logits, Runtime
from srdeploy.runtimes.views import AugmentedRuntime, TiledRuntime
from srdeploy.serve.folders.records import Photo
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.stores import Store
from srdeploy.serve.folders.walk import as_text
from srdeploy.spec import Spec


def encode_segments(name: str, labels: Pixels, spec: Spec) -> bytes:
    """Labels uint8 [H, W] as one segment for each class that occurs, by class id.

    `counts` are COCO's uncompressed run lengths, `bbox` is [x, y, width, height] in pixels; labels
    that are no class are left out. name: of the photo.
    """
    height, width = labels.shape
    head = {"photo": as_text(name), "size": [height, width], "classes": list(spec.classes)}
    # One by one: as Python's objects, the numbers of a large photo take many times their text.
    segments = [
        _json(_segment(runs, (height, width), spec))
        for runs in label_runs(labels)
        if runs.label < spec.class_count
    ]
    return f'{_json(head)[:-1]},"segments":[{",".join(segments)}]}}\n'.encode()


def _segment(runs: LabelRuns, size: tuple[int, int], spec: Spec) -> dict[str, Any]:
    return {
        "category_id": runs.label,
        "category": spec.classes[runs.label],
        "area": runs.area,
        "bbox": runs.box,
        "segmentation": {"size": size, "counts": runs.counts},
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# Probabilities of one photo's classes as an npz file.

Probabilities = npt.NDArray[np.float16]

LEVEL = 1
"""Of zlib. At 6, files get 5 % smaller and take twice as long (19 classes, half a megapixel)."""
BAND = 16
"""Rows that are worked on at a time: exponentials of a whole large photo are gigabytes."""


def encode_probabilities(logits: Logits, size: tuple[int, int], spec: Spec) -> bytes:
    """Logits float32 [K, h, w] as an npz file that `np.load` reads as it is.

    `probabilities` float16 [K, h, w], at the size that the network saw; `classes`, the K names;
    `photo_size`, (height, width) of the photo, `size`. Equal logits give equal bytes.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        "probabilities": softmax(logits),
        "classes": np.array(spec.classes),
        "photo_size": np.array(size, np.int64),
    }
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as archive:
        for name, array in arrays.items():
            large = array.nbytes >= zipfile.ZIP64_LIMIT // 2
            # Opened by name, entries get a fixed date: equal arrays are equal bytes.
            with archive.open(f"{name}.npy", "w", force_zip64=large) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return buffer.getvalue()


def softmax(logits: Logits) -> Probabilities:
    """Over the K classes of logits float32 [K, h, w], in float32; rounded to float16 at the end."""
    probabilities = np.empty(logits.shape, np.float16)
    for top in range(0, logits.shape[1], BAND):
        rows = logits[:, top : top + BAND]
        with np.errstate(invalid="ignore"):  # infinite logits: the file says NaN there
            powers = np.exp(rows - rows.max(axis=0))
            shares = powers / powers.sum(axis=0)
        probabilities[:, top : top + BAND] = to_half(shares)
    return probabilities


def to_half(values: npt.NDArray[np.float32]) -> Probabilities:
    """Values float32 of 0..1 as the nearest float16, as `astype` rounds them.

    Subnormal numbers, which most classes' probabilities are, take numpy ten times as long, for the
    processor's underflow is flagged at each. They are whole multiples of 2**-24, and these are
    their bits.
    """
    small = values < SMALLEST_NORMAL
    halves = np.where(small, SMALLEST_NORMAL, values).astype(np.float16)
    multiples = np.rint(np.where(small, values, 0) * np.float32(2**24)).astype(np.uint16)
    np.copyto(halves, multiples.view(np.float16), where=small)
    return halves


SMALLEST_NORMAL = np.finfo(np.float16).smallest_normal.astype(np.float32)


# What the ids and colours in an output folder mean.

CLASSES = "classes.json"
LEGEND = "legend.png"


def write_key(store: Store, spec: Spec) -> None:
    """Writes classes.json, which has a data set's form, so that masks can serve as labels, and
    legend.png. Raises OutputError."""
    values = spec.model_dump(
        mode="json", include={"palette", "ignore_index", "void_colour", "scored"}
    )
    table = {"names": list(spec.classes)} | values
    store.write(CLASSES, (json.dumps(table, indent=1, allow_nan=False) + "\n").encode())
    store.write(LEGEND, encode_png(draw_legend(spec)))


def draw_legend(spec: Spec) -> Pixels:
    """A picture of the class colours with ids and names, uint8 [H, W, 3]."""
    row, swatch = 24, 40
    font = ImageFont.load_default(14)
    lines = [f"{index}  {name}" for index, name in enumerate(spec.classes)]
    lines.append(f"{spec.ignore_index}  (not scored)")
    colours = [*spec.palette, spec.void_colour]
    width = swatch + 24 + int(max(font.getlength(line) for line in lines))
    picture = Image.new("RGB", (width, row * len(lines) + 8), "white")
    draw = ImageDraw.Draw(picture)
    for index, (line, colour) in enumerate(zip(lines, colours, strict=True)):
        top = 4 + index * row
        draw.rectangle((8, top + 3, swatch, top + row - 3), fill=colour, outline=(96, 96, 96))
        draw.text((swatch + 8, top + 3), line, fill="black", font=font)
    return np.array(picture)


# What is written of one photo, from the network's output.


@dataclass(frozen=True)
class Rendered:
    """The outputs of one photo, in memory."""

    files: dict[str, bytes]
    """Content by path below the output folder."""
    pixels: dict[int, int]
    """How many pixels of the mask have each label; labels that do not occur are left out."""


def needs_logits(settings: PredictSettings) -> bool:
    """Whether labels alone do not suffice."""
    return settings.probabilities


def needs_picture(settings: PredictSettings) -> bool:
    """Whether the photo itself is part of an output."""
    return settings.overlay


def render(
    photo: Photo,
    picture: Pixels | None,
    result: Pixels | Logits,
    size: tuple[int, int],
    spec: Spec,
    settings: PredictSettings,
) -> Rendered:
    """The outputs that `settings` ask for.

    picture: uint8 [H, W, 3], where `needs_picture` says so. result: labels uint8 [h, w], or logits
    float32 [K, h, w] where `needs_logits` says so. size: (H, W) of the photo, upright.
    """
    logits = np.asarray(result, np.float32) if needs_logits(settings) else None
    labels = np.asarray(result, np.uint8) if logits is None else strongest(logits)
    restored = restore(labels, size[0], size[1])
    files: dict[str, bytes] = {}
    if settings.mask == "palette":
        files[f"{photo.name}.png"] = encode_mask(restored, spec)
    elif settings.mask == "gray":
        files[f"{photo.name}.png"] = encode_gray(restored)
    if settings.overlay:
        assert picture is not None
        files[f"overlays/{photo.name}.jpg"] = encode_jpeg(overlay(picture, restored, spec))
    if logits is not None:
        files[f"probabilities/{photo.name}.npz"] = encode_probabilities(logits, size, spec)
    if settings.rle:
        files[f"rle/{photo.name}.json"] = encode_segments(photo.name, restored, spec)
    # Pillow counts bytes as they are, np.bincount makes each an int64 first.
    counts = Image.fromarray(restored).histogram()
    return Rendered(files, {label: count for label, count in enumerate(counts) if count})


# Runtimes that look at an image more than once, or piece by piece.


def with_views(runtime: Runtime, settings: PredictSettings, batch: int) -> Runtime:
    """`runtime` as `settings` ask for: inside an augmented and a tiled one; itself where they ask
    for neither. batch: tiles in one run, at most. Raises UserError where it can't be looked at so,
    or where it has no logits for probabilities."""
    if needs_logits(settings) and not runtime.gives_logits:
        raise UserError(
            f"{runtime.path} gives labels alone, and probabilities come from logits: export it "
            "with --output both"
        )
    if settings.augmented:
        runtime = AugmentedRuntime(runtime, settings.scales, settings.flip)
    if settings.tile is not None:
        runtime = TiledRuntime(runtime, settings.tile, settings.overlap, batch)
    return runtime
