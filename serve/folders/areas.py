"""One table of the classes' areas in all photos of a job."""

import json
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from srdeploy.errors import MissingPackageError
from srdeploy.files import explain_os_error
from srdeploy.serve.folders.record import Record
from srdeploy.serve.folders.store import OutputError, Store
from srdeploy.serve.folders.text import as_text
from srdeploy.spec import Spec

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
