"""One table of the classes' areas in all photos of a job."""

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from srdeploy import console
from srdeploy.errors import MissingPackageError
from srdeploy.files import explain_os_error
from srdeploy.serve.folders.records import Record
from srdeploy.serve.folders.stores import OutputError, Store
from srdeploy.serve.folders.walk import as_text, printable
from srdeploy.spec import Spec
from srdeploy.validation import Settings

CELLS = 250_000
"""Of a parquet row group: they lie in memory as Python objects, tens of MB."""


def check_areas(kind: Literal["none", "jsonl", "parquet"]) -> None:
    """Raises MissingPackageError where such a table can't be written: better known before the
    night than after it."""
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


# What a prediction did, counted while it goes on.

MOST_LISTED = 1000
"""Skipped photos that a summary lists; the manifest has all of them."""
MOST_WARNED = 20
"""Skipped photos that are told of while the job runs."""


class Skipped(Settings):
    """A photo without outputs."""

    photo: str
    reason: str


class Summary(Settings):
    """What a prediction did. Times are in seconds; those of the steps overlap each other."""

    out: str
    engine: str
    images: int
    """Photos whose outputs were written."""
    done_before: int
    """Photos that an earlier run had done."""
    skipped_count: int
    skipped: tuple[Skipped, ...]
    """The first `MOST_LISTED` of them."""
    left: int
    """Photos that were not reached, because the job was told to stop."""
    seconds: float
    """From the first photo to the last output."""
    images_per_s: float
    decode_s: float
    """Reading, decoding and fitting, summed over the threads."""
    run_s: float
    """In the runtime, summed over the sessions."""
    encode_s: float
    """Restoring, encoding and writing, summed over the threads."""
    sessions: int
    threads: int | None
    """CPU threads of each session; None: the runtime's own choice."""
    batch: int
    """Photos in one run, at most."""

    @property
    def network_busy(self) -> float:
        """Share of the sessions' time in which they ran."""
        return self.run_s / (self.seconds * self.sessions) if self.seconds else 0.0


@dataclass
class Tally:
    """What became of the photos so far."""

    images: int = 0
    done_before: int = 0
    skipped_count: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    decode_ms: float = 0.0
    run_ms: float = 0.0
    encode_ms: float = 0.0
    began: float | None = None
    """When the first photo was asked for; the network is loaded by then."""

    def begin(self) -> None:
        """The first photo is asked for."""
        if self.began is None:
            self.began = time.perf_counter()

    def take(self, record: Record) -> None:
        """Counts one photo, and tells of it where it was skipped."""
        self.decode_ms += record.times.decode
        self.run_ms += record.times.run
        self.encode_ms += record.times.encode
        if record.error is None:
            self.images += 1
            return
        self.skipped_count += 1
        if len(self.skipped) < MOST_LISTED:
            self.skipped.append(Skipped(photo=printable(record.photo.path), reason=record.error))
        if self.skipped_count <= MOST_WARNED:
            console.warn(f"skipped {printable(record.photo.path)}: {record.error}")
        elif self.skipped_count == MOST_WARNED + 1:
            console.warn("more photos are skipped: all of them, and why, are in the manifest")

    @property
    def handled(self) -> int:
        """Photos that need no more work."""
        return self.images + self.done_before + self.skipped_count

    @property
    def seconds(self) -> float:
        """Since the first photo was asked for."""
        return 0.0 if self.began is None else time.perf_counter() - self.began

    @property
    def images_per_s(self) -> float:
        """Written by this run."""
        return self.images / self.seconds if self.images else 0.0


# How far a long job is: a bar on terminals, a line now and then elsewhere.

LINE_EVERY_S = 60.0
"""Where stderr is no terminal."""


class Meter:
    """Shows photos done, images/s and the time left, on stderr. A context manager."""

    def __init__(self, total: int, tally: Tally) -> None:
        self._total = total
        self._tally = tally
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._bar = stack.enter_context(console.progress("{task.fields[rate]}"))
            self._task = self._bar.add_task("predict", total=self._total, rate="")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def move(self) -> None:
        """After each photo that was tallied."""
        tally = self._tally
        rate = f"{tally.images_per_s:.1f} images/s"
        self._bar.update(self._task, completed=tally.handled, rate=rate)
        if self._bar.disable and time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            done = tally.images + tally.skipped_count
            left_s = (self._total - tally.handled) * tally.seconds / done
            console.say(
                f"{tally.handled:,} of {self._total:,} photos, {rate}, about "
                f"{_duration(left_s)} left"
            )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
