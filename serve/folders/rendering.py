"""What is written of photos: masks, overlays, probabilities, run lengths, areas, and their key."""

import json
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from srdeploy.errors import MissingPackageError, UserError
from srdeploy.files import explain_os_error
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
from srdeploy.serve.folders.paths import as_text
from srdeploy.serve.folders.records import Photo, Record
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.stores import OutputError, Store
from srdeploy.spec import Spec

CLASSES = "classes.json"
LEGEND = "legend.png"
LEVEL = 1
"""zlib level. At 6, files are 5 % smaller and take twice as long (19 classes, half a megapixel)."""
BAND = 16
"""Rows that are processed at a time: exponentials of a whole large photo are gigabytes."""
CELLS = 250_000
"""Cells of a parquet row group: they are Python objects in memory, tens of MB."""
Probabilities = npt.NDArray[np.float16]
SMALLEST_NORMAL = np.finfo(np.float16).smallest_normal.astype(np.float32)


@dataclass(frozen=True)
class Rendered:
    """The outputs of one photo, in memory."""

    files: dict[str, bytes]
    """Content by path below the output folder."""
    pixels: dict[int, int]
    """How many pixels of the mask have each label; labels that do not occur are left out."""


def needs_logits(settings: PredictSettings) -> bool:
    """Whether labels are not enough."""
    return settings.probabilities


def needs_picture(settings: PredictSettings) -> bool:
    """Whether the photo itself is part of an output."""
    return settings.overlay


def with_views(runtime: Runtime, settings: PredictSettings, batch: int) -> Runtime:
    """`runtime` inside an augmented and a tiled one, as `settings` ask for. batch: most tiles in a
    run. Raises UserError if the artifact can't be run like that, or has no logits for
    probabilities."""
    if needs_logits(settings) and not runtime.gives_logits:
        raise UserError(
            f"{runtime.path} gives only labels, and probabilities come from logits: export it "
            "with --output both"
        )
    if settings.augmented:
        runtime = AugmentedRuntime(runtime, settings.scales, settings.flip)
    if settings.tile is not None:
        runtime = TiledRuntime(runtime, settings.tile, settings.overlap, batch)
    return runtime


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

    Subnormal numbers, which most classes' probabilities are, take numpy ten times as long, because
    each underflow is flagged. They are whole multiples of 2**-24, and these are their bits.
    """
    small = values < SMALLEST_NORMAL
    halves = np.where(small, SMALLEST_NORMAL, values).astype(np.float16)
    multiples = np.rint(np.where(small, values, 0) * np.float32(2**24)).astype(np.uint16)
    np.copyto(halves, multiples.view(np.float16), where=small)
    return halves


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


def check_areas(kind: Literal["none", "jsonl", "parquet"]) -> None:
    """Raises MissingPackageError if such a table can't be written: better known before the job than
    after it."""
    if kind == "parquet" and find_spec("pyarrow") is None:
        raise MissingPackageError("pyarrow", "parquet", "a table of areas as parquet")


def write_areas(
    store: Store, records: Iterable[Record], spec: Spec, kind: Literal["jsonl", "parquet"]
) -> None:
    """Writes areas.jsonl or areas.parquet: one row for each photo that has outputs.

    Columns are photo, name, height, width, and for each class CLASS_pixels, and CLASS_share of all
    pixels, 0..1. Rows are as `records` come; few are in memory at a time. Raises OutputError, and
    MissingPackageError where parquet has no pyarrow.
    """
    check_areas(kind)
    rows = (area_row(record, spec) for record in records if record.size and not record.error)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"areas.{kind}"
        try:
            if kind == "jsonl":
                _write_jsonl(path, rows)
            else:
                _write_parquet(path, rows, spec)
        except OSError as error:
            raise OutputError(str(explain_os_error(error, path))) from error
        store.write_file(path.name, path)


def area_row(record: Record, spec: Spec) -> dict[str, Any]:
    """The row of a photo that has outputs, by column."""
    assert record.size is not None
    height, width = record.size
    row: dict[str, Any] = {
        "photo": as_text(record.photo.path),
        "name": as_text(record.photo.name),
        "height": height,
        "width": width,
    }
    for label, name in enumerate(spec.classes):
        pixels = record.pixels.get(label, 0)
        row[f"{name}_pixels"] = pixels
        row[f"{name}_share"] = pixels / (height * width)
    return row


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], spec: Spec) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [("photo", pa.string()), ("name", pa.string())]
    columns += [("height", pa.int64()), ("width", pa.int64())]
    for name in spec.classes:
        columns += [(f"{name}_pixels", pa.int64()), (f"{name}_share", pa.float64())]
    schema = pa.schema(columns)
    length = max(1, CELLS // len(columns))
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, length)):
            writer.write_table(pa.Table.from_pylist(group, schema))


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
