"""Which photos are found, and what their outputs are called."""

import glob
import os
import random
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srdeploy.errors import UserError
from srdeploy.serve.folders.listing import find_photos
from srdeploy.serve.folders.naming import KINDS, OWN_FILES
from srdeploy.serve.folders.paths import GlobPattern


def put(folder: Path, *names: str) -> Path:
    """Files of a few bytes; a listing does not open them."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"photo")
    return folder


def names(*sources: Path | str, out: Path | str, **lists: object) -> list[str]:
    """Names of the photos, by name."""
    with find_photos([str(s) for s in sources], str(out), **lists) as listing:  # type: ignore[arg-type]  # passed on
        found = [photo.name for photo in listing]
        assert len(listing) == len(found)
    return found


def reasons(source: Path, out: Path) -> dict[str, str]:
    """Why what can't be used; by path below the source."""
    with find_photos([str(source)], str(out)) as listing:
        unusable = list(listing.unusable())
        assert listing.unusable_count == len(unusable)
    return {os.path.relpath(one.path, source): one.reason for one in unusable}


def test_photos_carry_their_size_and_time(tmp_path: Path) -> None:
    put(tmp_path, "in/sub/A.JPG", "in/notes.txt")
    with find_photos([str(tmp_path / "in")], str(tmp_path / "out")) as listing:
        (photo,) = listing
    status = (tmp_path / "in/sub/A.JPG").stat()
    assert (photo.path, photo.name) == (str(tmp_path / "in/sub/A.JPG"), "sub/A")
    assert (photo.bytes, photo.changed_ns) == (5, status.st_mtime_ns)


def test_photos_that_differ_only_in_their_suffix_keep_it(tmp_path: Path) -> None:
    put(tmp_path / "in", "a.png", "a.bmp", "b.png", "legend.png", "sub/a.png", "sub/legend.jpg")
    found = names(tmp_path / "in", out=tmp_path / "out")
    assert found == ["a.bmp", "a.png", "b", "legend.png", "sub/a", "sub/legend"]


def test_files_and_folders_mix_and_repeats_count_once(tmp_path: Path) -> None:
    put(tmp_path, "in/a.png", "in/b.png", "elsewhere/c.dat")
    (tmp_path / "in" / "again.png").symlink_to("a.png")
    sources = [tmp_path / "in", tmp_path / "elsewhere/c.dat", tmp_path / "in/a.png"]
    assert names(*sources, out=tmp_path / "out") == ["a", "b", "c"]


def test_outputs_of_an_earlier_run_and_hidden_files_are_no_photos(tmp_path: Path) -> None:
    put(tmp_path / "in", "a.png", "masks/a.png", ".thumbs/a.png", "._a.png", "notes.txt")
    (tmp_path / "in" / "link").symlink_to("masks")
    assert names(tmp_path / "in", out=tmp_path / "in" / "masks") == ["a"]


def test_sources_that_share_a_name_get_their_folders_in_front(tmp_path: Path) -> None:
    put(tmp_path, "one/a.png", "two/a.png", "x/one/a.png", "three/z.png")
    sources = [tmp_path / "one", tmp_path / "two", tmp_path / "x/one", tmp_path / "three"]
    assert names(*sources, out=tmp_path / "out") == ["one/a", "one/a-2", "two/a", "z"]


def test_single_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path, "one/a.png", "two/a.jpg")
    sources = [tmp_path / "one/a.png", tmp_path / "two/a.jpg"]
    assert names(*sources, out=tmp_path / "out") == ["one/a", "two/a"]


def test_outputs_never_replace_the_photos(tmp_path: Path) -> None:
    put(tmp_path, "in/a.png", "in/overlays/a.jpg", "legend.png", "far/b.bmp")
    (tmp_path / "in" / "b.png").symlink_to("../far/b.bmp")
    for photo in ("in/a.png", "in/b.png"):
        with pytest.raises(UserError, match="would replace a photo, .*: give another folder than"):
            names(tmp_path / photo, out=tmp_path / "in")
    with pytest.raises(UserError, match="would replace a photo"):
        names(tmp_path / "in/overlays/a.jpg", out=tmp_path / "in")
    with pytest.raises(UserError, match="would replace a photo"):
        names(tmp_path / "legend.png", out=tmp_path)


def test_outputs_never_go_among_the_photos_where_the_next_run_would_find_them(
    tmp_path: Path,
) -> None:
    put(tmp_path, "in/a.bmp", "in/in/b.bmp")
    (tmp_path / "link").symlink_to("in")
    for out in ("in", "link", "in/sub/.."):
        with pytest.raises(UserError, match="holds the photos, and masks among them"):
            names(tmp_path / "in", out=f"{tmp_path}/{out}")
    with pytest.raises(UserError, match="holds the photos"):
        names(tmp_path / "in", out=tmp_path)  # in/in/b.bmp would give in/b.png
    assert names(tmp_path / "in/a.bmp", out=tmp_path / "in") == ["a"]  # named by itself: no harm


def test_sources_without_photos_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no such file or folder: .*absent"):
        names(tmp_path / "absent", out=tmp_path / "out")
    with pytest.raises(UserError, match=r"no photos in .*empty: \.bmp, \.jpeg"):
        names(tmp_path / "empty", out=tmp_path / "out")
    with pytest.raises(UserError, match=r"no photos in .*\*\.jpg"):
        names(tmp_path / "empty" / "*.jpg", out=tmp_path / "out")
    with pytest.raises(UserError, match="no photos are named"):
        names(out=tmp_path / "out")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: a named pipe"):
        names(tmp_path / "pipe", out=tmp_path / "out")
    with pytest.raises(UserError, match="is no path"):
        names("a\0b", out=tmp_path / "out")


def test_a_hostile_folder_is_listed_and_everything_wrong_in_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(tmp_path / "in", "good.jpg", "sub/deep/b.jpg", "locked/c.jpg")
    (folder / "empty.jpg").touch()
    (folder / "sub" / "up").symlink_to("..")
    (folder / "dot").symlink_to(".")
    (folder / "self").symlink_to("self")
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "gone.jpg").symlink_to("absent.jpg")
    (folder / "gone").symlink_to("/absent/folder")
    (folder / "notes.txt").symlink_to("absent.txt")
    (folder / "linked").symlink_to("sub")
    (folder / "null.jpg").symlink_to("/dev/null")
    os.mkfifo(folder / "fifo.jpg")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket.jpg")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert names(folder, out=tmp_path / "out") == ["empty", "good", "sub/deep/b"]
    told = reasons(folder, tmp_path / "out")
    words = {
        "sub/up": "a link to a folder above",
        "dot": "a link to a folder above",
        "self": "a link that leads to itself",
        "self.jpg": "a link that leads to itself",
        "gone.jpg": "a link to a file that is not there",
        "gone": "a link to a file that is not there",
        "null.jpg": "a device",
        "fifo.jpg": "a named pipe",
        "socket.jpg": "a socket",
        "locked": "no permission to list",
    }
    assert set(told) == set(words)
    assert all(told[path].startswith(start) for path, start in words.items())


def test_folders_deeper_than_a_path_may_be_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "in", "a.jpg")
    monkeypatch.chdir(tmp_path / "in")
    for _ in range(25):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    assert names(tmp_path / "in", out=tmp_path / "out") == ["a"]
    (reason,) = reasons(tmp_path / "in", tmp_path / "out").values()
    assert reason == "the folder's path is too long: move it up"


def test_names_of_any_bytes_and_lengths_are_kept_apart_and_fit(tmp_path: Path) -> None:
    odd = ["-x.jpg", "a b.jpg", "новый.jpg", "写真.jpg", "line\nbreak.jpg", "\udcff\udcfe.jpg"]
    long = ["n" * 251 + ".jpg", "n" * 250 + ".jpeg", "写" * 83 + ".jpg"]
    put(tmp_path / "in", *odd, *long)
    found = names(tmp_path / "in", out=tmp_path / "out")
    assert {name.removesuffix(".jpg") for name in odd} < set(found)
    assert len(set(found)) == len(odd + long)
    assert all(len(os.fsencode(name)) + len(".json") <= 250 for name in found)


def test_a_folder_called_as_an_output_meets_no_mask(tmp_path: Path) -> None:
    put(tmp_path / "in", "b.jpg", "b.png/c.jpg", "b.png_/c.jpg", "classes.json/d.jpg")
    found = names(tmp_path / "in", out=tmp_path / "out")
    assert found == ["b", "b.png_/c", "b.png_/c-2", "classes.json_/d"]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.lists(
                st.sampled_from(["a", "b", "b.png", "overlays", "classes.json", "legend.png"]),
                max_size=2,
            ),
            st.sampled_from(["a", "b", "a-2", "b.png", "legend", "x.jpg"]),
            st.sampled_from([".jpg", ".PNG", ".png", ".tif"]),
            st.sampled_from(["one", "two", "deep/one"]),
        ),
        min_size=1,
        max_size=25,
    )
)
def test_no_output_is_another_one_or_a_folder_of_one(
    tmp_path: Path, files: list[tuple[list[str], str, str, str]]
) -> None:
    root = tmp_path / str(random.getrandbits(60))
    for folders, stem, suffix, source in files:
        path = root.joinpath(source, *folders, stem + suffix)
        if not any(p.is_file() for p in path.parents) and not path.is_dir():
            put(path.parent, path.name)
    sources = [root / name for name in ("one", "two", "deep/one") if (root / name).is_dir()]
    found = names(*sources, out=tmp_path / "out")
    outputs = [f"{kind}{name}{suffix}" for name in found for kind, suffix in KINDS]
    outputs += OWN_FILES
    assert len(set(outputs)) == len(outputs)
    folders_of_outputs = {str(above) for path in outputs for above in Path(path).parents}
    assert not folders_of_outputs & set(outputs)
    assert len(found) == sum(p.is_file() for p in root.rglob("*"))


@pytest.mark.parametrize(
    "pattern", ["*.jpg", "**/*.jpg", "**", "a/**/c*.jpg", "*/*", "[ab]/?.jpg", "**/b/**/*.jpg"]
)
def test_globs_find_what_the_standard_library_finds(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "in", "a.jpg", "a/c.jpg", "a/b/c1.jpg", "b/d.jpg", "b/x/b/y/e.jpg", "c.txt")
    monkeypatch.chdir(tmp_path)
    expected = {
        os.path.relpath(path, "in")
        for path in glob.glob(f"in/{pattern}", recursive=True)
        if path.endswith(".jpg")
    }
    with find_photos([f"in/{pattern}"], "out") as listing:
        fixed = "a/" if pattern.startswith("a/") else ""
        assert {f"{fixed}{photo.name}.jpg" for photo in listing} == expected
        assert {photo.path for photo in listing} == {f"in/{path}" for path in expected}


def test_a_glob_looks_into_no_folder_that_can_not_match() -> None:
    pattern = GlobPattern("2024/*/x*.jpg")
    assert pattern.may_hold("2024/a")
    assert not pattern.may_hold("2023")
    assert not pattern.may_hold("2024/a/b")


def test_a_file_whose_name_has_brackets_is_no_glob(tmp_path: Path) -> None:
    put(tmp_path, "a[1].jpg", "a1.jpg")
    assert names(tmp_path / "a[1].jpg", out=tmp_path / "out") == ["a[1]"]
