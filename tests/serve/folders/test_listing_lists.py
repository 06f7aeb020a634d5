"""Photos named by lists, and on remote file systems."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from srdeploy.errors import UserError
from srdeploy.serve.folders.listing import find_photos
from srdeploy.serve.folders.records import Photo, Unusable


def listed(
    *sources: str, out: str = "out", list_file: str | None = None, stdin: bytes = b""
) -> tuple[list[Photo], list[Unusable]]:
    """Photos and what can't be used."""
    with find_photos(sources, out, list_file, io.BytesIO(stdin)) as listing:
        return list(listing), list(listing.unusable())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a few files, and the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ("p/a.jpg", "p/sub/b.dat", "p/#c.jpg", "p/new\nline.jpg", "q/a.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"photo")
    return tmp_path


@pytest.fixture
def memory() -> Iterator[str]:
    """An empty folder on fsspec's file system in memory."""
    files = fsspec.filesystem("memory")
    files.pipe({f"/bucket/{name}": b"1234" for name in ("a.jpg", "s/b.PNG", "s/.h.jpg", "n.txt")})
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def test_listed_files_are_named_below_their_common_folder(here: Path) -> None:
    text = f"p/a.jpg\r\n\np/q/../sub/b.dat\n{here}/p/#c.jpg\np/absent.jpg\np/sub\n"
    (here / "list.txt").write_text("\ufeff" + text.replace("q/../", "sub/../"))
    photos, unusable = listed(list_file="list.txt")
    assert [photo.name for photo in photos] == ["#c", "a", "sub/b"]
    assert photos[1].path == "p/a.jpg"
    assert [one.path for one in unusable] == ["p/absent.jpg", "p/sub"]
    assert unusable[0].reason.startswith("no such file")
    assert unusable[1].reason.startswith("a folder where a file is expected")


def test_a_list_on_stdin_is_ended_by_lines_or_by_zero_bytes() -> None:
    photos, _ = listed("-", stdin=b"p/a.jpg\np/sub/b.dat")
    assert [photo.name for photo in photos] == ["a", "sub/b"]
    photos, unusable = listed("-", stdin=b"p/new\nline.jpg\0p/a.jpg\0")
    assert [photo.name for photo in photos] == ["a", "new\nline"]
    assert not unusable


def test_lists_that_climb_out_of_their_folder_give_no_names_that_do() -> None:
    photos, _ = listed(
        "-", stdin=b"../../../../../../../../../" + os.fsencode(Path("q/a.jpg").resolve())
    )
    assert [photo.name for photo in photos] == ["a"]
    photos, _ = listed("-", stdin=b"p/../q/a.jpg\np/a.jpg\n")
    assert [photo.name for photo in photos] == ["p/a", "q/a"]


def test_lists_and_folders_with_one_name_are_told_apart() -> None:
    photos, _ = listed("q", "-", stdin=b"p/a.jpg\n")
    assert [photo.name for photo in photos] == ["p/a", "q/a"]


def test_lists_of_garbage_end_and_are_told(here: Path) -> None:
    garbage = b"p/a.jpg\n" + b"x" * 300_000 + b"\n\xff\xfe\n" + b"y\0y\n" * 3
    photos, unusable = listed("-", stdin=garbage.replace(b"\0", b"") + b"z" * 70_000 + b"\0z\n")
    assert [photo.name for photo in photos] == ["p/a"]
    assert len(unusable) == 4
    with pytest.raises(UserError, match="zero is no ordinary file"):
        listed(list_file="/dev/zero")
    with pytest.raises(UserError, match="no such file or folder: absent"):
        listed(list_file="absent")
    with pytest.raises(UserError, match=r"no photos in the list on stdin: gone\.jpg: no such file"):
        listed("-", stdin=b"gone.jpg\n")


def test_folders_and_globs_on_remote_file_systems_are_listed(memory: str) -> None:
    photos, _ = listed(memory)
    assert [photo.name for photo in photos] == ["a", "s/b"]
    assert (photos[1].path, photos[1].bytes) == ("memory:///bucket/s/b.PNG", 4)
    assert photos[1].changed_ns > 0
    assert [photo.name for photo in listed(f"{memory}/**/*.PNG")[0]] == ["s/b"]
    assert [photo.name for photo in listed(f"{memory}/n.txt")[0]] == ["n"]
    assert [photo.name for photo in listed(memory, out=f"{memory}/s")[0]] == ["a"]
    text = f"{memory}/a.jpg\n{memory}/s/b.PNG\n{memory}/absent.jpg\n".encode()
    photos, unusable = listed("-", stdin=text)
    assert [photo.name for photo in photos] == ["a", "s/b"]
    assert [one.reason for one in unusable] == ["no such file or folder"]


def test_a_remote_source_that_can_not_be_used_is_an_error_of_one_line(memory: str) -> None:
    with pytest.raises(UserError, match="memory://absent: no such file or folder"):
        listed("memory://absent")
    with pytest.raises(UserError, match="nosuch://x can't be opened: .*nosuch"):
        listed("nosuch://x")
    with pytest.raises(UserError, match="holds the photos"):
        listed(memory, out=f"{memory}/")
    fsspec.filesystem("memory").pipe("/bucket/m.png", b"1")
    with pytest.raises(UserError, match="would replace a photo"):
        listed(f"{memory}/m.png", out=memory)


def test_file_urls_are_local_paths(here: Path) -> None:
    assert [photo.path for photo in listed(f"file://{here}/q")[0]] == [f"{here}/q/a.jpg"]
