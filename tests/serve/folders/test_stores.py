"""Output folders, local and remote, and reading photos from anywhere."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from srdeploy.errors import UserError
from srdeploy.serve.folders import stores, worker
from srdeploy.serve.folders.manifest import open_manifest
from srdeploy.serve.folders.stores import LocalStore, OutputError, RemoteStore, Store, open_store
from srdeploy.serve.folders.worker import read_bytes
from tests.serve.folders.test_manifest import HEADER, file_size_limit, photo_of, record_of

ROOT = Path(__file__).parents[3]


class DriveFileSystem(MemoryFileSystem):  # type: ignore[misc]  # fsspec carries no annotations
    """A remote file system with folders and moves, whose files appear while they are written."""

    protocol = "drive"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    moves: list[tuple[str, str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.removeprefix("drive://")))

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        self.moves.append((path1, path2))
        if self.exists(path2):
            raise FileExistsError(path2)  # as SMB does
        super().mv(path1, path2, **options)


@pytest.fixture(autouse=True)
def fresh_memory() -> None:
    fsspec.register_implementation("drive", DriveFileSystem, clobber=True)
    for system in (MemoryFileSystem, DriveFileSystem):
        system.store.clear()
        system.pseudo_dirs[:] = [""]
    DriveFileSystem.moves.clear()


@pytest.fixture(params=["local", "file", "memory", "drive"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An output folder of each kind that is not there yet."""
    places = {"local": f"{tmp_path}/out", "file": f"file://{tmp_path}/out"}
    return open_store(places.get(request.param, f"{request.param}://bucket/out"))


def test_files_are_written_and_replaced_whole_below_new_folders(
    store: Store, tmp_path: Path
) -> None:
    assert store.size("a/b c/ä.png") is None
    store.write("a/b c/ä.png", b"first and longer")
    store.write("a/b c/ä.png", b"second")
    assert store.size("a/b c/ä.png") == 6
    assert store.size("a/b c") is None
    assert store.size("a/b c/ä.png/x") is None
    (tmp_path / "source").write_bytes(b"from a file")
    store.write_file("a/b c/ä.png", tmp_path / "source")
    store.write_file("top.png", tmp_path / "source")
    assert (store.size("a/b c/ä.png"), store.size("top.png")) == (11, 11)
    where = f"{tmp_path}/out" if isinstance(store, LocalStore) else store.root
    assert read_bytes(f"{where}/a/b c/ä.png") == b"from a file"


def test_nothing_but_the_files_is_left(store: Store) -> None:
    store.write("a/b.png", b"1")
    store.write("a/b.png", b"12")
    store.write("c.png", b"123")
    if isinstance(store, RemoteStore):
        assert dict(store.sizes()) == {"a/b.png": 2, "c.png": 3}
    else:
        assert isinstance(store, LocalStore)
        below = [path for path in Path(store.folder).rglob("*") if path.is_file()]
        assert {path.name for path in below} == {"b.png", "c.png"}


def test_a_folder_in_the_way_is_the_fault_of_one_photo(store: Store) -> None:
    store.write("a.png/b.png", b"1")
    if store.root.startswith("memory"):
        return  # keys, as in buckets: both may be there
    with pytest.raises(UserError, match=r"a\.png: .*in the way") as caught:
        store.write("a.png", b"1")
    assert not isinstance(caught.value, OutputError)


def test_a_file_where_a_folder_should_be_is_the_fault_of_one_photo(store: Store) -> None:
    store.write("a.png", b"1")
    with pytest.raises(UserError, match=r"a\.png/b\.png: a file ") as caught:
        store.write("a.png/b.png", b"1")
    assert not isinstance(caught.value, OutputError)


def test_threads_write_side_by_side(store: Store) -> None:
    def write(thread: int) -> None:
        for number in range(20):
            store.write(f"{number}/{thread}.png", bytes(thread))
            store.write("same.png", bytes(1000))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(20):
        assert [store.size(f"{number}/{thread}.png") for thread in range(4)] == [0, 1, 2, 3]
    assert store.size("same.png") == 1000


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    fsspec.filesystem("memory").pipe_file("/bucket/file", b"1")
    for out in (f"{tmp_path}/file", "/dev/null", "memory://bucket/file"):
        with pytest.raises(UserError, match="is a file"):
            open_store(out)


def test_names_of_255_bytes_are_written_and_longer_ones_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    name = "ä" * 125 + "a.png"
    assert len(name.encode()) == 255
    store.write(name, b"1")
    assert store.size(name) == 1
    with pytest.raises(UserError, match="too long for the file system") as caught:
        store.write(f"a{name}", b"1")
    assert not isinstance(caught.value, OutputError)
    assert store.size(f"a{name}") is None
    assert os.listdir(tmp_path) == [name]


def test_names_of_any_bytes_are_written(tmp_path: Path) -> None:
    store = open_store(os.fsdecode(os.fsencode(tmp_path) + b"/o\xff"))
    for raw in (b"\xff\xfe.png", b"-rf.png", b"a\nb.png", b"\\.png", b" .png"):
        store.write(os.fsdecode(raw), b"1")
        assert os.path.exists(os.fsencode(tmp_path) + b"/o\xff/" + raw)


def test_messages_have_one_line_whatever_the_names(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out\n\udcff"))
    store.write("a\n\udcff.png/b", b"1")
    with pytest.raises(UserError) as caught:
        store.write("a\n\udcff.png", b"1")
    shown = f"{tmp_path}/out\\n\\udcff/a\\n\\udcff.png"
    assert str(caught.value) == f"{shown}: a folder of that name is in the way"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "larger than"),
        (errno.EROFS, "takes no writes"),
        (errno.EACCES, "no permission"),
        (errno.EIO, "Input/output error"),
        (errno.EMFILE, "Too many open files"),
    ],
)
@pytest.mark.parametrize("call", ["open", "write", "close", "replace"])
def test_what_the_next_file_would_meet_too_ends_the_job_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, text: str, call: str
) -> None:
    store = open_store(str(tmp_path))
    store.write("a.png", b"old")
    real: Callable[..., Any] = getattr(os, call)

    def failing(*arguments: Any) -> None:
        if call == "close":
            real(*arguments)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(OutputError, match=text) as caught:
            store.write("a.png", b"new")
    assert str(tmp_path / "a.png") in str(caught.value)
    assert ".part" not in str(caught.value)
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_file_beyond_the_limit_leaves_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    (tmp_path / "source").write_bytes(bytes(5000))
    with file_size_limit(4096):
        with pytest.raises(OutputError, match=r"a\.png is larger than"):
            store.write("a.png", bytes(5000))
        with pytest.raises(OutputError, match=r"a\.png is larger than"):
            store.write_file("a.png", tmp_path / "source")
        store.write("b.png", bytes(4096))
    assert sorted(os.listdir(tmp_path)) == ["b.png", "source"]


def test_folders_that_vanish_meanwhile_are_made_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    store.write("a/b.png", b"1")
    (tmp_path / "out/a/b.png").unlink()
    (tmp_path / "out/a").rmdir()
    store.write("a/b.png", b"12")
    assert store.size("a/b.png") == 2


def test_files_are_whole_after_kill_9(tmp_path: Path) -> None:
    code = (
        "import sys; from srdeploy.serve.folders.stores import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "while True:\n"
        "    for number in range(10):\n"
        "        store.write(f'{number}.png', bytes(1_000_000)); print(flush=True)"
    )
    for lines in (3, 20, 41):
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout is not None
            for _ in range(lines):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            process.stdout.read()
        sizes = [path.stat().st_size for path in tmp_path.glob("[0-9].png")]
        assert set(sizes) == {1_000_000}


def test_written_files_have_the_usual_mode(tmp_path: Path) -> None:
    open_store(str(tmp_path)).write("a.png", b"1")
    (tmp_path / "plain").write_bytes(b"1")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_only_where_puts_are_not_whole_files_are_moved(tmp_path: Path) -> None:
    open_store("memory://bucket/out").write("a/b.png", b"1")
    open_store("drive://bucket/out").write("a/b.png", b"1")
    [(before, after)] = DriveFileSystem.moves
    assert (Path(before).parent, after) == (Path("/bucket/out/a"), "/bucket/out/a/b.png")
    assert Path(before).name.startswith(".srdeploy.")


def test_leftovers_of_killed_writes_on_a_remote_side_are_removed() -> None:
    store = open_store("drive://bucket/out")
    with open_manifest(store, HEADER, False) as manifest:
        manifest.add(record_of("a"))
    files = fsspec.filesystem("drive")
    files.pipe_file("/bucket/out/deep/.srdeploy.0123456789ab.1f.part", b"half")
    files.pipe_file("/bucket/out/deep/.hidden.part", b"theirs")
    with open_manifest(store, HEADER, False):
        pass
    assert files.find("/bucket/out") == [
        "/bucket/out/deep/.hidden.part",
        "/bucket/out/manifest.jsonl",
    ]


def test_a_size_that_is_known_saves_asking_the_remote_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/a.jpg", b"1234")
    asked: list[str] = []
    monkeypatch.setattr(MemoryFileSystem, "info", lambda _, path: asked.append(path))
    assert read_bytes("memory://bucket/a.jpg", 4) == b"1234"
    with pytest.raises(UserError, match=r"3\.0 GB is too large"):
        read_bytes("memory://bucket/a.jpg", 3 * 10**9)
    assert not asked


class LostFileSystem(MemoryFileSystem):  # type: ignore[misc]  # fsspec carries no annotations
    """Its other side is gone."""

    protocol = "lost"

    def pipe_file(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("connection\nreset")

    cat_file = put_file = pipe_file


def test_a_remote_side_that_is_gone_ends_the_job_in_one_line(tmp_path: Path) -> None:
    fsspec.register_implementation("lost", LostFileSystem, clobber=True)
    store = open_store("lost://bucket/out")
    (tmp_path / "source").write_bytes(b"1")
    with pytest.raises(OutputError, match=r"^lost://bucket/out/a\.png: connection reset$"):
        store.write("a.png", b"1")
    with pytest.raises(OutputError, match=r"^lost://bucket/out/a\.png: connection reset$"):
        store.write_file("a.png", tmp_path / "source")


def test_urls_without_a_driver_or_file_system_are_refused_in_one_line() -> None:
    for call in (open_store, read_bytes):
        with pytest.raises(UserError, match="^nosuch://a/b can't be opened: Protocol not known"):
            call("nosuch://a/b")


@pytest.mark.parametrize("scheme", ["memory", "drive"])
def test_a_remote_manifest_goes_on_where_it_was(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"{scheme}://bucket/out")
    with open_manifest(store, HEADER, False) as manifest:
        for name in ("a", "deep/b", "c"):
            store.write(f"{name}.png", b"png")
            manifest.add(record_of(name))
    store.write("c.png", b"other size")
    asked: list[str] = []
    monkeypatch.setattr(RemoteStore, "size", lambda _, path: asked.append(path))
    with open_manifest(store, HEADER, False) as manifest:
        assert manifest.continued == 3
        done = {name: manifest.is_done(photo_of(name)) for name in ("a", "deep/b", "c", "d")}
        manifest.add(record_of("d"))
    assert done == {"a": True, "deep/b": True, "c": False, "d": False}
    assert not asked, "a million requests, one by one, take a night"
    lines = read_bytes(f"{scheme}://bucket/out/manifest.jsonl").splitlines()
    assert [json.loads(line).get("name") for line in lines] == [None, "a", "deep/b", "c", "d"]
    with open_manifest(store, HEADER, force=True) as manifest:
        assert not manifest.is_done(photo_of("a"))
    assert len(read_bytes(f"{scheme}://bucket/out/manifest.jsonl").splitlines()) == 1


def test_a_remote_manifest_is_uploaded_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "EVERY_S", 0.01)
    monkeypatch.setattr(stores, "SHARE", 0)
    renewed = threading.Event()
    store = open_store("memory://bucket/out")
    real = RemoteStore.write_file

    def seen(store: RemoteStore, path: str, source: Path) -> None:
        real(store, path, source)
        if len(read_bytes("memory://bucket/out/manifest.jsonl").splitlines()) == 2:
            renewed.set()

    monkeypatch.setattr(RemoteStore, "write_file", seen)
    with open_manifest(store, HEADER, False) as manifest:
        manifest.add(record_of("a"))
        assert renewed.wait(60)


def test_a_refused_remote_manifest_stays_as_it_is() -> None:
    store = open_store("memory://bucket/out")
    with open_manifest(store, HEADER, False) as manifest:
        manifest.add(record_of("a"))
    before = read_bytes("memory://bucket/out/manifest.jsonl")
    with pytest.raises(UserError, match="by another artifact"):
        open_manifest(store, HEADER.model_copy(update={"artifact_sha256": "2" * 64}), False)
    assert read_bytes("memory://bucket/out/manifest.jsonl") == before


def test_an_upload_that_fails_at_the_end_hides_no_other_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store("memory://bucket/out")

    def gone(store: RemoteStore, path: str, source: Path) -> None:
        raise OutputError("the other side is gone")

    def fail(error: Exception | None) -> None:
        with open_manifest(store, HEADER, True) as manifest:
            monkeypatch.setattr(RemoteStore, "write_file", gone)
            manifest.add(record_of("a"))
            if error is not None:
                raise error

    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())
    assert "the other side is gone" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(OutputError, match="the other side is gone"):
        fail(None)


def test_reading_refuses_what_is_no_photo_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    (tmp_path / "file").write_bytes(b"1")
    fsspec.filesystem("memory").pipe_file("/bucket/folder/a.jpg", b"1")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{tmp_path}/s.jpg")
        for path, reason in {
            f"{tmp_path}/fifo.jpg": "not an ordinary file",
            f"{tmp_path}/s.jpg": "not an ordinary file",
            "/dev/zero": "not an ordinary file",
            f"{tmp_path}/folder.jpg": "is a folder",
            f"{tmp_path}/gone.jpg": "no such file",
            f"{tmp_path}/circle.jpg": "its links lead in a circle",
            f"{tmp_path}/absent.jpg": "no such file",
            f"file://{tmp_path}/absent.jpg": "no such file",
            f"{tmp_path}/file/a.jpg": "no such file",
            f"{tmp_path}/{'a' * 300}": "can't be read (File name too long)",
            "a\0b": "no name that a file can have",
            "memory://bucket/absent.jpg": "no such file or folder",
            "memory://bucket/folder": "is a folder",
        }.items():
            with pytest.raises(UserError) as caught:
                read_bytes(path)
            assert str(caught.value) == f"{path}: {reason}"


def test_reading_without_permission_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"1")

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may read all
    with pytest.raises(UserError, match=r"a\.jpg: no permission to read it"):
        read_bytes(str(tmp_path / "a.jpg"))


def test_files_too_large_for_photos_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "hole.jpg").open("wb") as file:
        file.truncate(10**13)  # takes no room on the disk
    with pytest.raises(UserError, match=r"hole\.jpg: 10000\.0 GB is too large for a photo"):
        read_bytes(str(tmp_path / "hole.jpg"))
    monkeypatch.setattr(worker, "MAX_BYTES", 3)
    fsspec.filesystem("memory").pipe_file("/bucket/a.jpg", b"1234")
    with pytest.raises(UserError, match="is too large for a photo"):
        read_bytes("memory://bucket/a.jpg")


def test_photos_are_read_from_any_place_byte_for_byte(tmp_path: Path) -> None:
    content = bytes(range(256)) * 3
    path = os.fsencode(tmp_path) + b"/\xff\n.jpg"
    Path(os.fsdecode(path)).write_bytes(content)
    (tmp_path / "empty.jpg").write_bytes(b"")
    fsspec.filesystem("memory").pipe_file("/bucket/a b.jpg", content)
    assert read_bytes(os.fsdecode(path)) == content
    assert read_bytes("file://" + os.fsdecode(path)) == content
    assert read_bytes("memory://bucket/a b.jpg") == content
    assert read_bytes(str(tmp_path / "empty.jpg")) == b""
