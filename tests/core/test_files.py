"""Files and folders appear whole or not at all, and errors name the right one."""

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from srdeploy.errors import UserError
from srdeploy.files import (
    read_json,
    read_text,
    sha256_of,
    whole_file,
    whole_folder,
    write_json,
    write_whole,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.onnx"
    write_whole(path, "old")

    def write_half() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("ha")
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        write_half()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_written_file_has_the_usual_mode(tmp_path: Path) -> None:
    write_whole(tmp_path / "ours", "x")
    (tmp_path / "usual").write_text("x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "usual")}
    assert len(modes) == 1


def test_the_temporary_file_keeps_the_suffix(tmp_path: Path) -> None:
    with whole_file(tmp_path / "plot.png") as temporary:
        assert temporary.suffix == ".png"


def test_a_folder_replaces_an_older_one_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "run.v1"
    with whole_folder(path) as place:
        (place / "first").write_text("1")

    def fill_half() -> None:
        with whole_folder(path) as place:
            (place / "second").write_text("2")
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        fill_half()
    assert [p.name for p in path.iterdir()] == ["first"]
    with whole_folder(path) as place:
        (place / "second").write_text("2")
    assert [p.name for p in path.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["run.v1"]


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("keep")
    with pytest.raises(UserError, match="notes is a file"), whole_folder(tmp_path / "notes"):
        pass
    assert (tmp_path / "notes").read_text() == "keep"


def test_a_device_or_folder_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an ordinary file"):
        write_whole(tmp_path, "x")
    with pytest.raises(UserError, match="/dev/null is not an ordinary file"):
        write_whole(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()


def test_a_link_is_followed_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_json(tmp_path / "link.json", [1])
    assert (tmp_path / "link.json").is_symlink()
    assert read_json(tmp_path / "real.json") == [1]


def test_an_error_in_the_block_names_the_file_it_is_about(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"no such file or folder: .*weights\.pth"),
        whole_file(tmp_path / "out.json"),
    ):
        (tmp_path / "weights.pth").read_bytes()


def test_an_error_about_the_temporary_file_names_the_wanted_one(tmp_path: Path) -> None:
    def write() -> None:
        with whole_folder(tmp_path / "data") as place:
            (place / "absent" / "x").write_text("")

    with pytest.raises(UserError) as raised:
        write()
    assert str(raised.value) == f"no such file or folder: {tmp_path / 'data'}"


def test_a_full_disk_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"no space left .*big\.onnx: free some space"),
        whole_file(tmp_path / "big.onnx"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        write_whole(tmp_path / "file" / "x.json", "{}")


def test_json_is_refused_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{\n"a": }')
    with pytest.raises(UserError, match=r"bad\.json: not valid JSON \(line 2"):
        read_json(tmp_path / "bad.json")


def test_text_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "marked.json") == [1]


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(UserError, match=r"latin\.txt: not a UTF-8 text file"):
        read_text(tmp_path / "latin.txt")


def test_not_a_number_is_never_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_the_digest_is_sha256_and_an_absent_file_is_named(tmp_path: Path) -> None:
    write_whole(tmp_path / "x", b"abc")
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(UserError, match="no such file or folder: .*gone"):
        sha256_of(tmp_path / "gone")
