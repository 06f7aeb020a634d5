"""Masks for folders of photos: decode, fit, run, restore, encode, write."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from queue import SimpleQueue

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
from srdeploy.serve.runtime import ImageShapeError, Runtime, parse_device
from srdeploy.serve.scheduling.cores import usable_cores
from srdeploy.serve.scheduling.job import Job
from srdeploy.serve.scheduling.lanes import Lanes
from srdeploy.serve.scheduling.plan import Layout, Plan
from srdeploy.serve.scheduling.scheduler import Scheduler
from srdeploy.serve.scheduling.sessions import Source, open_sessions
from srdeploy.spec import Spec
from srdeploy.validation import Settings

WINDOW = 8
"""Photos under way for each session, at most; few of them are decoded. It bounds the memory."""
FEW = 4
"""Photos for each core, below which one session with all cores is done sooner."""


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


def predict_photos(
    source: Source,
    photos: Sequence[Path],
    out: Path,
    overlays: bool = False,
    threads: int | None = None,
) -> PredictSummary:
    """`predict_folder`, with sessions side by side where there are photos enough: on a CPU, one
    thread each, which does more in a second than all threads at one photo.

    threads: of each session; None: as said, or all cores for a few photos. Raises as open_runtime
    and predict_folder.
    """
    found = find_photos(photos, out)
    cores = usable_cores()
    runtime = source.runtime_of(threads)
    layout = Layout(sessions=1, threads=threads)
    on_cpu = parse_device(runtime.device)[0] == "cpu" and runtime.backend != "torch"
    if on_cpu and len(found) >= FEW * cores:
        each = threads or 1
        layout = Layout(sessions=max(1, cores // each), threads=each)
    with open_sessions(source, layout) as sessions:
        return _predict(sessions, layout, found, out, overlays)


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
    return _predict([runtime], Layout(sessions=1), find_photos(sources, out), out, overlays)


def _predict(
    sessions: Sequence[Runtime],
    layout: Layout,
    photos: Sequence[Photo],
    out: Path,
    overlays: bool,
) -> PredictSummary:
    spec = sessions[0].spec
    _write_key(spec, out)
    start = time.perf_counter()
    tally = _Tally()
    done: SimpleQueue[Job] = SimpleQueue()
    scheduler = Scheduler(codec_threads=max(2, usable_cores()))
    lanes = Lanes(scheduler, sessions, Plan(lone=None, shared=layout, batch=1, max_wait_ms=0))
    under_way = 0
    try:
        for photo in console.track(photos, "predict", len(photos)):
            if under_way == WINDOW * len(sessions):
                tally.take(done.get())
                under_way -= 1
            task = _PhotoFile(photo, spec, out, overlays)
            scheduler.submit(lanes.queue, task, inf, done.put)
            under_way += 1
        for _ in range(under_way):
            tally.take(done.get())
    finally:
        lanes.close()  # what is under way is finished, also after Ctrl-C
        scheduler.stop()
    if len(tally.refusals) == len(photos):
        raise tally.refusals[0]
    seconds = time.perf_counter() - start
    return PredictSummary(
        out=str(out),
        images=tally.images,
        skipped=tuple(tally.skipped),
        seconds=seconds,
        images_per_s=tally.images / seconds,
        decode_s=tally.decode_s,
        run_s=tally.run_s,
        encode_s=tally.encode_s,
    )


@dataclass
class _Tally:
    """What became of the photos so far."""

    images: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    refusals: list[ImageShapeError] = field(default_factory=list)
    decode_s: float = 0.0
    run_s: float = 0.0
    encode_s: float = 0.0

    def take(self, job: Job) -> None:
        """Counts one job. Raises what concerns more than its photo."""
        assert isinstance(job.task, _PhotoFile)
        self.decode_s += job.timing.decode / 1000
        self.encode_s += job.timing.encode / 1000
        if job.timing.batch:
            self.run_s += job.timing.compute / 1000 / job.timing.batch
        if job.error is None:
            self.images += 1
            return
        if job.task.decoded and not isinstance(job.error, ImageShapeError):
            raise job.error  # a full disk, a label that is no class: the next photo fares no better
        if not isinstance(job.error, UserError):
            raise job.error
        if isinstance(job.error, ImageShapeError):
            self.refusals.append(job.error)
        self.skipped.append(_skip(job.task.photo, job.error))


@dataclass(eq=False)
class _PhotoFile:
    """One photo: read and fitted, and its mask written; see `srdeploy.serve.scheduling.task`."""

    photo: Photo
    spec: Spec
    out: Path
    overlays: bool
    decoded: bool = False
    size: tuple[int, ...] = ()
    full: Pixels | None = None
    """The photo itself, where an overlay needs it."""

    def prepare(self) -> Pixels:
        """uint8 [1, h, w, 3]. Raises UserError where it can't be read or is too small."""
        picture = read_photo(self.photo.path)
        fitted = fit(picture, self.spec)
        self.size = picture.shape[:2]
        self.full = picture if self.overlays else None
        self.decoded = True
        return fitted[None]

    def finish(self, labels: Pixels) -> None:
        """Writes the mask, and the overlay, from labels uint8 [1, h, w]. Raises UserError."""
        restored = restore(labels[0], self.size[0], self.size[1])
        # Not synced: a million waits for the disk take hours, and each file is whole or absent.
        mask = encode_mask(restored, self.spec)
        write_whole(mask_path(self.out, self.photo), mask, sync=False)
        if self.full is not None:
            picture = encode_jpeg(overlay(self.full, restored, self.spec))
            write_whole(overlay_path(self.out, self.photo), picture, sync=False)
            self.full = None


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
