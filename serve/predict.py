"""Masks for folders of photos: decode, fit, run, restore, encode, write."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from srdeploy import console
from srdeploy.errors import UserError
from srdeploy.files import write_json, write_whole
from srdeploy.imaging import (
    Pixels,
    encode_jpeg,
    encode_mask,
    encode_png,
    fit,
    overlay,
    read_photo,
    restore,
)
from srdeploy.serve.photos import (
    CLASSES,
    LEGEND,
    Photo,
    find_photos,
    mask_path,
    overlay_path,
)
from srdeploy.serve.runtime import ImageShapeError, Runtime
from srdeploy.spec import Spec
from srdeploy.validation import Settings

WORKERS = 2
"""Threads that decode and encode while the network runs."""
WINDOW = 4
"""Photos decoded ahead, and masks waiting to be written, at most: it bounds the memory."""


class Skipped(Settings):
    """A photo without a mask."""

    photo: str
    reason: str


class PredictSummary(Settings):
    """What a prediction did. Times are in seconds; those of the stages overlap each other."""

    out: str
    images: int
    """Masks written."""
    skipped: tuple[Skipped, ...]
    seconds: float
    """From the first photo to the last mask."""
    images_per_s: float
    decode_s: float
    """Reading, decoding and fitting, summed over the threads."""
    run_s: float
    """In the runtime."""
    encode_s: float
    """Restoring, encoding and writing, summed over the threads."""


@dataclass(frozen=True)
class _Decoded:
    photo: Pixels
    fitted: Pixels
    seconds: float


def predict_folder(
    runtime: Runtime, sources: Sequence[Path], out: Path, overlays: bool = False
) -> PredictSummary:
    """Writes a palette PNG (pixel value = class id) of each photo's own size below `out`.

    Sub-folders are kept; see `find_photos` for the names. With `overlays`, out/overlays/ gets
    pictures as JPEG. classes.json and legend.png say what the ids mean. `runtime` must be open.
    Photos that can't be read, or that the network can't take, are reported and skipped.
    Raises UserError where there are no photos, where the graph takes none of their sizes, or where
    a file can't be written; masks written until then are whole.
    """
    photos = find_photos(sources, out)
    _write_key(runtime.spec, out)
    start = time.perf_counter()
    skipped: list[Skipped] = []
    refusals: list[ImageShapeError] = []
    writing: deque[Future[float]] = deque()
    decode_s = run_s = encode_s = 0.0
    pool = ThreadPoolExecutor(WORKERS, "codec")
    try:
        decoding = _decoded_ahead(pool, photos, runtime.spec)
        for photo, future in console.track(decoding, "predict", len(photos)):
            try:
                decoded = future.result()
            except UserError as error:
                skipped.append(_skip(photo, error))
                continue
            before = time.perf_counter()
            try:
                labels = runtime.run(decoded.fitted[None])[0]
            except ImageShapeError as error:
                refusals.append(error)
                skipped.append(_skip(photo, error))
                continue
            run_s += time.perf_counter() - before
            decode_s += decoded.seconds
            full = decoded.photo if overlays else None
            size = decoded.photo.shape[:2]
            writing.append(pool.submit(_write, photo, labels, size, full, runtime.spec, out))
            if len(writing) > WINDOW:
                encode_s += writing.popleft().result()
        encode_s += sum(future.result() for future in writing)
    finally:
        pool.shutdown(cancel_futures=True)
    if len(refusals) == len(photos):
        raise refusals[0]
    seconds = time.perf_counter() - start
    done = len(photos) - len(skipped)
    return PredictSummary(
        out=str(out),
        images=done,
        skipped=tuple(skipped),
        seconds=seconds,
        images_per_s=done / seconds,
        decode_s=decode_s,
        run_s=run_s,
        encode_s=encode_s,
    )


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


def _write_key(spec: Spec, out: Path) -> None:
    """What ids and colours mean; classes.json has a data set's form: masks can serve as labels."""
    values = spec.model_dump(
        mode="json", include={"palette", "ignore_index", "void_colour", "scored"}
    )
    write_json(out / CLASSES, {"names": list(spec.classes)} | values)
    write_whole(out / LEGEND, encode_png(draw_legend(spec)))


def _skip(photo: Photo, error: UserError) -> Skipped:
    reason = str(error).removeprefix(f"{photo.path}: ")
    console.warn(f"skipped {photo.path}: {reason}")
    return Skipped(photo=str(photo.path), reason=reason)


def _decoded_ahead(
    pool: ThreadPoolExecutor, photos: Sequence[Photo], spec: Spec
) -> Iterator[tuple[Photo, Future[_Decoded]]]:
    """The photos in order, each with its decoding, of which WINDOW run ahead."""
    pending: deque[tuple[Photo, Future[_Decoded]]] = deque()
    for photo in photos:
        pending.append((photo, pool.submit(_decode, photo.path, spec)))
        if len(pending) > WINDOW:
            yield pending.popleft()
    yield from pending


def _decode(path: Path, spec: Spec) -> _Decoded:
    before = time.perf_counter()
    photo = read_photo(path)
    fitted = fit(photo, spec)
    return _Decoded(photo, fitted, time.perf_counter() - before)


def _write(
    photo: Photo,
    labels: Pixels,
    size: tuple[int, ...],
    full: Pixels | None,
    spec: Spec,
    out: Path,
) -> float:
    """Writes the mask, and the overlay where the full photo is given; returns the seconds."""
    before = time.perf_counter()
    restored = restore(labels, size[0], size[1])
    write_whole(mask_path(out, photo), encode_mask(restored, spec))
    if full is not None:
        write_whole(overlay_path(out, photo), encode_jpeg(overlay(full, restored, spec)))
    return time.perf_counter() - before
