"""The table of the classes' areas."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from srdeploy.errors import MissingPackageError
from srdeploy.serve.folders import rendering
from srdeploy.serve.folders.records import Photo, Record
from srdeploy.serve.folders.rendering import check_areas, write_areas
from srdeploy.serve.folders.stores import OutputError
from srdeploy.spec import Spec

SPEC = Spec(classes=("sky", "собака"), palette=((1, 2, 3), (200, 0, 0)))
ODD = b"\xff\xd0\xbd\n".decode("utf-8", "surrogateescape")


class FolderStore:
    """A plain folder, of which it is known how the table reached it."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder)
        self.folder = folder
        self.sources: list[Path] = []

    def write(self, path: str, content: bytes) -> None:
        raise AssertionError("the table may be larger than the memory")

    def write_file(self, path: str, source: Path) -> None:
        self.sources.append(source)
        (self.folder / path).write_bytes(source.read_bytes())

    def size(self, path: str) -> int | None:
        raise AssertionError("nothing else is looked at")


def some_records() -> list[Record]:
    first = Record(Photo("in/b.jpg", "b", 1, 1), "ab", (20, 30), pixels={1: 450, 0: 150})
    return [
        first,
        replace(first, photo=Photo("in/broken.jpg", "broken", 1, 1), error="not a readable image"),
        Record(Photo("in/gone", "", 0, 0), error="no such file"),
        Record(Photo(f"in/{ODD}.jpg", ODD, 1, 1), "ab", (1, 4), pixels={0: 3, 255: 1}),
    ]


EXPECTED = [
    ["in/b.jpg", "b", 20, 30, 150, 0.25, 450, 0.75],
    ["in/\\xffн\n.jpg", "\\xffн\n", 1, 4, 3, 0.75, 0, 0.0],
]
COLUMNS = ["photo", "name", "height", "width"]
COLUMNS += ["sky_pixels", "sky_share", "собака_pixels", "собака_share"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs pyarrow")
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_each_photo_with_outputs_has_a_row(
    kind: Literal["jsonl", "parquet"], tmp_path: Path
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    write_areas(FolderStore(tmp_path), iter(some_records()), SPEC, kind)
    rows = read_rows(tmp_path / f"areas.{kind}")
    assert [list(row) for row in rows] == [COLUMNS, COLUMNS]
    assert [list(row.values()) for row in rows] == EXPECTED


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_job_without_outputs_has_a_table_without_rows(
    kind: Literal["jsonl", "parquet"], tmp_path: Path
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    write_areas(FolderStore(tmp_path), iter([]), SPEC, kind)
    assert read_rows(tmp_path / f"areas.{kind}") == []


def test_parquet_is_written_group_by_group_as_records_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs pyarrow")
    monkeypatch.setattr(rendering, "CELLS", 10 * len(COLUMNS))
    store = FolderStore(tmp_path)
    write_areas(store, numbered(25), SPEC, "parquet")
    with parquet.ParquetFile(tmp_path / "areas.parquet") as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        names = file.read(columns=["name"]).column("name").to_pylist()
    assert groups == [10, 10, 5]
    assert names == [str(number) for number in range(25)]


def test_the_temporary_table_is_gone_afterwards(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    write_areas(store, numbered(3), SPEC, "jsonl")
    (source,) = store.sources
    assert not source.parent.exists()


def test_a_disk_that_is_full_ends_the_job_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    target = tmp_path / "full"
    target.mkdir()
    (target / "areas.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr("tempfile.mkdtemp", lambda *_, **__: str(target))
    with pytest.raises(OutputError, match=r"no space left .*areas\.jsonl: free some space"):
        write_areas(FolderStore(tmp_path), numbered(3), SPEC, "jsonl")


def test_parquet_without_its_package_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendering, "find_spec", lambda _: None)
    check_areas("none")
    check_areas("jsonl")
    with pytest.raises(MissingPackageError, match=r"pip install pyarrow"):
        check_areas("parquet")


def numbered(count: int) -> Iterator[Record]:
    for number in range(count):
        photo = Photo(f"in/{number}.jpg", str(number), 1, 1)
        yield Record(photo, "ab", (2, 2), pixels={0: 4})
