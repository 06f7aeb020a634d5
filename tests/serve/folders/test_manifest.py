"""The manifest: what it takes for done, and what it survives."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srdeploy.errors import UserError
from srdeploy.serve.folders.manifest import ManifestHeader, open_manifest
from srdeploy.serve.folders.records import (
    OutputFile,
    Photo,
    Record,
    from_line,
    name_and_verdict,
    to_line,
)
from srdeploy.serve.folders.settings import PredictSettings
from srdeploy.serve.folders.stores import LocalStore, OutputError, open_store

HEADER = ManifestHeader(
    srdeploy="1.2.3",
    artifact="street.onnx",
    artifact_sha256="0" * 64,
    runtime="onnx",
    precision="fp32",
    settings=PredictSettings(),
)
ADDING = """
import sys
from tests.serve.folders.test_manifest import HEADER, record_of
from srdeploy.serve.folders.stores import open_store
from srdeploy.serve.folders.manifest import open_manifest
with open_manifest(open_store(sys.argv[1]), HEADER, False) as manifest:
    number = manifest.continued
    while True:
        manifest.add(record_of(f"photo {number}"))
        number += 1
        print(number, flush=True)
"""
ROOT = Path(__file__).parents[3]


def photo_of(name: str, bytes: int = 1000, changed_ns: int = 1764000000123456789) -> Photo:
    return Photo(f"/photos/{name}.jpg", name, bytes, changed_ns)


def record_of(name: str, error: str | None = None) -> Record:
    if error is not None:
        return Record(photo_of(name), error=error)
    outputs = {f"{name}.png": OutputFile(3, "b" * 64)}
    return Record(photo_of(name), "a" * 64, (2, 3), outputs, {0: 4, 7: 2})


def write_manifest(out: Path, *records: Record, outputs: bool = True) -> Path:
    """A manifest of the records, and their outputs; returns its path."""
    store = open_store(str(out))
    with open_manifest(store, HEADER, False) as manifest:
        for record in records:
            for path in record.outputs if outputs else ():
                store.write(path, b"png")
            manifest.add(record)
    return out / "manifest.jsonl"


def read_manifest(out: Path, header: ManifestHeader = HEADER) -> list[Record]:
    with open_manifest(open_store(str(out)), header, False) as manifest:
        return list(manifest.records())


@contextmanager
def file_size_limit(bytes: int) -> Iterator[None]:
    """No file may grow beyond `bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def start_adding(out: Path) -> "subprocess.Popen[str]":
    """A process that adds records until it is killed, and prints how many there are."""
    return subprocess.Popen(
        [sys.executable, "-c", ADDING, str(out)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_a_manifest_without_records_binds_nobody(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    with open_manifest(store, HEADER, False):
        pass
    other = HEADER.model_copy(update={"artifact_sha256": "f" * 64})
    with open_manifest(store, other, False) as manifest:
        assert manifest.continued == 0
    (tmp_path / "out" / "manifest.jsonl").write_text('{"some": "thing of the user"}\n')
    with pytest.raises(UserError, match="is no manifest"):
        open_manifest(store, HEADER, False)


def test_a_photo_is_done_once_it_is_recorded_and_its_outputs_are_there(tmp_path: Path) -> None:
    write_manifest(tmp_path / "out", record_of("a"), record_of("b", error="no photo"))
    with open_manifest(open_store(str(tmp_path / "out")), HEADER, False) as manifest:
        assert manifest.continued == 1
        assert manifest.is_done(photo_of("a"))
        assert not manifest.is_done(photo_of("b")), "it failed"
        assert not manifest.is_done(photo_of("c")), "it is new"
        assert not manifest.is_done(photo_of("a", bytes=1001)), "it grew"
        assert not manifest.is_done(photo_of("a", changed_ns=1764000000123456790)), "it changed"
        assert manifest.is_done(replace(photo_of("a"), path="./a.jpg")), "found another way"
        (tmp_path / "out" / "a.png").write_bytes(b"other size")
        assert not manifest.is_done(photo_of("a"))
        (tmp_path / "out" / "a.png").unlink()
        assert not manifest.is_done(photo_of("a"))


def test_the_last_record_of_a_name_is_in_force_in_the_order_of_names(tmp_path: Path) -> None:
    write_manifest(tmp_path / "out", record_of("b"), record_of("a", error="cut"), record_of("c"))
    store = open_store(str(tmp_path / "out"))
    with open_manifest(store, HEADER, False) as manifest:
        manifest.add(record_of("a"))
        manifest.add(record_of("c", error="gone"))
        expected = [record_of("a"), record_of("b"), record_of("c", error="gone")]
        assert list(manifest.records()) == expected
    assert read_manifest(tmp_path / "out") == expected


def test_records_come_page_by_page_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srdeploy.serve.folders.manifest.PAGE", 3)
    records = [record_of(f"{number:02}") for number in range(10)]
    write_manifest(tmp_path / "out", *records)
    assert read_manifest(tmp_path / "out") == records


def test_what_could_not_be_listed_is_kept_only_for_its_own_run(tmp_path: Path) -> None:
    unusable = [Record(Photo(f"/photos/{n}", "", 0, 0), error="no permission") for n in "xy"]
    with open_manifest(open_store(str(tmp_path)), HEADER, False) as manifest:
        for record in unusable:
            manifest.add(record)
        assert list(manifest.records()) == unusable
        assert not manifest.is_done(unusable[0].photo)
    assert read_manifest(tmp_path) == []


@given(cut=st.integers(min_value=0))
@settings(max_examples=40, deadline=None)
def test_a_manifest_that_ends_at_any_byte_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    out = tmp_path_factory.mktemp("cut")
    names = ["a", "ä\n", "c"]
    path = write_manifest(out, *map(record_of, names), outputs=False)
    whole = path.read_bytes()
    cut %= len(whole) + 1
    path.write_bytes(whole[:cut])
    kept = max(0, whole[:cut].count(b"\n") - 1)
    expected = sorted(names[:kept], key=os.fsencode)
    assert [record.photo.name for record in read_manifest(out)] == expected
    write_manifest(out, record_of("new"), outputs=False)
    assert len(read_manifest(out)) == kept + 1
    lines = path.read_bytes().splitlines()
    assert [json.loads(line).get("name") for line in lines] == [None, *names[:kept], "new"]


def test_what_was_added_before_kill_9_is_there_afterwards(tmp_path: Path) -> None:
    told = 0
    for lines in (1, 30, 200):
        with start_adding(tmp_path) as process:
            assert process.stdout is not None
            for _ in range(lines):
                told = int(process.stdout.readline())
            process.kill()
            rest = process.stdout.read().splitlines()
            told = max([told, *(int(line) for line in rest if line)])
        # Between the write and the print one more may have been added.
        assert len(read_manifest(tmp_path)) in (told, told + 1)


def test_a_second_run_into_a_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with start_adding(tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for force in (False, True):
            with pytest.raises(UserError, match="another prediction is writing there"):
                open_manifest(open_store(str(tmp_path)), HEADER, force)
        process.send_signal(signal.SIGKILL)
        process.stdout.read()
    assert read_manifest(tmp_path)


def test_file_systems_without_locks_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    write_manifest(tmp_path, record_of("a"))
    assert read_manifest(tmp_path) == [record_of("a")]


def test_a_damaged_line_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, record_of("a"), record_of("b"), record_of("c"))
    lines = path.read_bytes().splitlines(keepends=True)
    for damage in (b"\0" * 40 + b"\n", lines[2][20:], b"[]\n", b"7\n", b'{"name": 3}\n', b"\xff\n"):
        broken = b"".join([*lines[:2], damage, lines[3]])
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"manifest\.jsonl, line 3 is damaged"):
            read_manifest(tmp_path)
        assert path.read_bytes() == broken
    path.write_bytes(b"".join([*lines[:2], lines[3]]))  # as the message says
    assert [record.photo.name for record in read_manifest(tmp_path)] == ["a", "c"]


@pytest.mark.parametrize("line", [b"hello\n", b"{}\n", b"[1]\n", b'{"srdeploy": "1"}\n', b"\n"])
def test_a_file_of_that_name_that_is_no_manifest_is_left_alone(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(line)
    with pytest.raises(UserError, match="no manifest of predictions"):
        read_manifest(tmp_path)
    assert (tmp_path / "manifest.jsonl").read_bytes() == line


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"artifact_sha256": "1" * 64, "artifact": "b.onnx"}, r"by another artifact \(street"),
        ({"runtime": "openvino"}, "with runtime onnx, not openvino"),
        ({"precision": "int8"}, "with precision fp32, not int8"),
        ({"settings": PredictSettings(mask="gray")}, 'with mask "palette", not "gray"'),
        ({"settings": PredictSettings(tile=(64, 96))}, r"with tile null, not \[64, 96\]"),
    ],
)
def test_records_made_otherwise_are_refused_with_what_differs(
    tmp_path: Path, change: dict[str, object], text: str
) -> None:
    path = write_manifest(tmp_path, record_of("a"))
    before = path.read_bytes()
    with pytest.raises(UserError, match=text + ".*another --out, or .*--force"):
        read_manifest(tmp_path, HEADER.model_copy(update=change))
    assert path.read_bytes() == before


def test_another_version_warns_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_manifest(tmp_path, record_of("a"))
    lines = path.read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    del header["settings"]["flip"]  # as before there was one
    path.write_text("".join([json.dumps(header) + "\n", *lines[1:]]))
    newer = HEADER.model_copy(update={"srdeploy": "2.0"})
    assert read_manifest(tmp_path, newer) == [record_of("a")]
    assert "begun by srdeploy 1.2.3, this is 2.0" in capsys.readouterr().err


def test_what_does_not_change_an_output_may_differ(tmp_path: Path) -> None:
    write_manifest(tmp_path, record_of("a"))
    update = {"settings": PredictSettings(areas="jsonl", max_megapixels=500)}
    other = HEADER.model_copy(update=update)
    assert read_manifest(tmp_path, other) == [record_of("a")]


def test_force_begins_anew_whatever_is_there(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, record_of("a"))
    path.write_bytes(path.read_bytes() + b"damage\n")
    other = HEADER.model_copy(update={"runtime": "torch"})
    with open_manifest(open_store(str(tmp_path)), other, force=True) as manifest:
        assert (manifest.continued, manifest.is_done(photo_of("a"))) == (0, False)
        manifest.add(record_of("b"))
    assert read_manifest(tmp_path, other) == [record_of("b")]
    assert (tmp_path / "a.png").exists()


def test_a_folder_with_outputs_and_no_manifest_is_as_new(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    with open_manifest(open_store(str(tmp_path)), HEADER, False) as manifest:
        assert not manifest.is_done(photo_of("a"))


def test_leftovers_of_killed_writes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    write_manifest(tmp_path, record_of("sub/a"))
    code = (
        "import os, sys; from srdeploy.serve.folders.stores import open_store\n"
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "open_store(sys.argv[1]).write('sub/b.png', b'half')"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert died.returncode == -signal.SIGKILL
    (tmp_path / "sub" / ".hidden.part").write_bytes(b"theirs")
    assert len(list((tmp_path / "sub").iterdir())) == 3
    read_manifest(tmp_path)
    assert {p.name for p in (tmp_path / "sub").iterdir()} == {"a.png", ".hidden.part"}


def test_threads_add_whole_lines(tmp_path: Path) -> None:
    with open_manifest(open_store(str(tmp_path)), HEADER, False) as manifest:

        def add(thread: int) -> None:
            for number in range(100):
                manifest.add(record_of(f"{thread}/{number:03}"))
                assert not manifest.is_done(photo_of(f"{thread}/{number:03}"))

        threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = [record_of(f"{thread}/{number:03}") for thread in range(4) for number in range(100)]
    assert read_manifest(tmp_path) == expected


def test_a_line_that_the_disk_can_not_take_is_taken_back(tmp_path: Path) -> None:
    with open_manifest(open_store(str(tmp_path)), HEADER, False) as manifest:
        manifest.add(record_of("a"))
        size = (tmp_path / "manifest.jsonl").stat().st_size
        with file_size_limit(size + 100), pytest.raises(OutputError, match="manifest.jsonl"):
            manifest.add(record_of("b"))
        assert (tmp_path / "manifest.jsonl").stat().st_size == size
        manifest.add(record_of("c"))
        assert list(manifest.records()) == [record_of("a"), record_of("c")]
    assert read_manifest(tmp_path) == [record_of("a"), record_of("c")]


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a device"])
def test_a_manifest_that_is_no_ordinary_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "manifest.jsonl"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(UserError, match="not an ordinary file"):
        open_manifest(open_store(str(tmp_path)), HEADER, False)


NAMES = st.binary(min_size=1, max_size=20).map(lambda name: os.fsdecode(name.replace(b"\0", b"/")))


@given(name=NAMES, path=NAMES, odd=NAMES, error=st.none() | NAMES)
@settings(max_examples=150, deadline=None)
def test_any_bytes_in_names_come_back_from_lines_of_utf_8(
    name: str, path: str, odd: str, error: str | None
) -> None:
    outputs = {f"{name}.png": OutputFile(1, "c"), f"rle/{name}\\{name}.json": OutputFile(2, "d")}
    record = Record(Photo(path, name, 2**40, 2**62), "ab", (1, 2), outputs, {255: 9}, error)
    line = to_line(record)
    assert line.decode().count("\n") == 1
    assert line.endswith(b"\n")
    back = from_line(line)
    assert replace(back, error=None) == replace(record, error=None)
    assert (back.error is None) == (error is None)
    assert name_and_verdict(line) == (os.fsencode(name), error is None)


def test_an_odd_name_is_found_again(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff\\xff\n'")
    write_manifest(tmp_path, record_of(name), record_of("a\\xff"))
    with open_manifest(LocalStore(str(tmp_path)), HEADER, False) as manifest:
        assert manifest.is_done(photo_of(name))
        assert manifest.is_done(photo_of("a\\xff"))
