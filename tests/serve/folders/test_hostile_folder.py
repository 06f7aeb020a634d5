"""The verb over hostile folders and lists: everything is told of, nothing is fatal."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, decode_photo, read_labels
from srdeploy.serve.folders.listing import find_photos
from srdeploy.serve.folders.paths import printable
from srdeploy.serve.folders.records import Record, from_line
from srdeploy.serve.folders.stores import open_store
from srdeploy.serve.folders.summary import MOST_WARNED
from srdeploy.spec import InputPolicy, Spec
from tests.serve.folders.hostile_folder import ODD_NAMES, Hostile, make_hostile, photo, snapshot

MakeGraph = Callable[..., Path]
OWN = {"classes.json", "legend.png", "manifest.jsonl"}
MOST_PIXELS = 1_000_000

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's own remarks on the damage


@dataclass
class Place:
    """Folders in which the verb runs."""

    root: Path
    graph: Path

    @property
    def out(self) -> Path:
        """Its path is long, so that photos whose own path is just short enough have none."""
        return self.root / ("o" * 200) / "out"

    def run(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """The verb, for which modes of files hold, in the folder cwd; temporary files go to tmp."""
        command = [*_bound_by_modes(), sys.executable, "-m", "srdeploy", "predict"]
        command += [str(self.graph), "--out", str(self.out), "--set", "max_megapixels=1", "--json"]
        # Since 1.29 ONNX Runtime notes things in the temporary folder and at home, unless told.
        more = {"TMPDIR": str(self.root / "tmp"), "ORT_DISABLE_TELEMETRY": "1"}
        return subprocess.run(
            [*command, *words],
            input=stdin,
            capture_output=True,
            timeout=100,
            cwd=self.root / "cwd",
            env=os.environ | more,
        )


def _bound_by_modes() -> list[str]:
    """What to put before a command so that it can't read locked files, as root can: it keeps its
    user, who may be the only one that can read the interpreter."""
    if os.geteuid() != 0:
        return []
    less = "-dac_override,-dac_read_search"
    words = ["setpriv", f"--bounding-set={less}", f"--inh-caps={less}"]
    if shutil.which("setpriv") is None or subprocess.run([*words, "true"]).returncode:
        pytest.skip("root can't lay down its rights here: hostile folders were NOT tested")
    return words


@pytest.fixture
def place(make_graph: MakeGraph, tiny_spec: Spec, tmp_path: Path) -> Iterator[Place]:
    policy = InputPolicy(smallest=(1, 1), usual=(32, 32), largest=(512, 512))
    graph = make_graph(spec=tiny_spec.model_copy(update={"input": policy}))
    place = Place(tmp_path / "root", graph)
    for folder in (place.root / "cwd", place.root / "tmp", place.root / "elsewhere"):
        folder.mkdir(parents=True)
    yield place
    for path in (
        place.root / "in" / "locks" / "folder",
        place.root / "in" / "locks" / "names-only",
    ):
        if path.exists():
            path.chmod(0o755)
    shutil.rmtree(place.root)  # deeper than pytest could


def mask_of(content: bytes) -> Pixels | None:
    """What the colour graph says of a file; None where it is no photo."""
    try:
        pixels = decode_photo(content, "it", MOST_PIXELS)
    except UserError:
        return None
    return np.asarray(pixels[..., [1, 0, 2]].argmax(-1), np.uint8)


def checked_messages(result: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    """The summary. One JSON object on stdout, and one line a message on stderr."""
    err = result.stderr.decode()
    assert result.returncode == 1, err[-3000:]
    assert "Traceback" not in err
    lines = err.split("\n")
    assert lines.pop() == ""
    for line in lines:
        assert line.isprintable(), ascii(line)
        assert line.startswith("warning: "), line
    assert len(lines) <= MOST_WARNED + 1
    out = result.stdout.decode()
    assert out.count("\n") == 1
    summary = json.loads(out)
    assert isinstance(summary, dict)
    for skipped in summary["skipped"]:
        assert f"{skipped['photo']}{skipped['reason']}".isprintable(), ascii(skipped)
    return summary


def records(out: Path) -> list[Record]:
    """The manifest, which must be UTF-8, line by line."""
    lines = (out / "manifest.jsonl").read_bytes().splitlines(keepends=True)[1:]
    for line in lines:
        assert json.loads(line.decode())["photo"]
    return [from_line(line) for line in lines]


def checked_outputs(out: Path, hostile: Hostile) -> None:
    """Each good photo has the mask that it must have, and a true record; each bad one a reason."""
    found = records(out)
    skipped = {os.fsencode(one.photo.path): one.error for one in found if one.error is not None}
    done = {os.path.realpath(os.fsencode(one.photo.path)): one for one in found if not one.error}
    assert {ascii(path) for path in skipped} == {ascii(path) for path in hostile.bad}
    assert {ascii(path) for path in done} == {ascii(path) for path in hostile.good}
    assert len(found) == len(skipped) + len(done)
    for path, reason in skipped.items():
        assert reason, path
        assert len(reason) < 300 + len(path), reason
        assert reason.isprintable(), ascii(reason)
    left = {os.fsencode(path) for path in out.rglob("*") if not path.is_dir()}
    for path, record in done.items():
        ((name, output),) = record.outputs.items()
        place = os.fsencode(out / name)
        content = Path(os.fsdecode(place)).read_bytes()
        assert hashlib.sha256(content).hexdigest() == output.sha256
        expected = mask_of(Path(os.fsdecode(path)).read_bytes())
        assert expected is not None
        assert np.array_equal(read_labels(out / name), expected), path
        left.remove(place)
    assert left == {os.fsencode(out / name) for name in OWN}


def test_a_hostile_folder_gives_a_mask_of_all_that_is_sound_and_a_reason_for_the_rest(
    place: Place,
) -> None:
    (place.root / "in").mkdir()
    hostile = make_hostile(
        place.root / "in", place.root / "elsewhere", lambda content: mask_of(content) is not None
    )
    before = snapshot(place.root / "in") | snapshot(place.root / "elsewhere")
    result = place.run(str(place.root / "in"))
    summary = checked_messages(result)
    checked_outputs(place.out, hostile)
    assert (summary["images"], summary["skipped_count"], summary["left"]) == (
        len(hostile.good),
        len(hostile.bad),
        0,
    )
    assert len(hostile.good) > 200
    assert len(hostile.bad) > 500
    assert snapshot(place.root / "in") | snapshot(place.root / "elsewhere") == before
    assert {path.name for path in place.root.iterdir()} == {
        "cwd",
        "tmp",
        "in",
        "elsewhere",
        "o" * 200,
    }
    assert [*(place.root / "cwd").iterdir(), *(place.root / "tmp").iterdir()] == []
    again = checked_messages(place.run(str(place.root / "in")))
    assert (again["images"], again["done_before"]) == (0, len(hostile.good))
    assert again["skipped_count"] == len(hostile.bad)


def test_odd_names_are_shown_as_they_are_or_escaped(place: Place) -> None:
    folder = place.root / "in"
    folder.mkdir()
    (folder / "sound.png").write_bytes(photo())
    shown = {}
    for start in range(0, len(ODD_NAMES), MOST_WARNED):
        for name in ODD_NAMES[start : start + MOST_WARNED]:
            path = folder / os.fsdecode(name)
            path.parent.mkdir(exist_ok=True)  # one name has a slash in it
            path.write_text("not a photo")
            shown[path] = printable(str(path))
        result = place.run(str(folder))
        summary = checked_messages(result)
        lines = result.stderr.decode().splitlines()
        reason = "not a readable image (unknown format: give JPEG, PNG, WebP, BMP or TIFF)"
        assert set(lines) == {f"warning: skipped {name}: {reason}" for name in shown.values()}
        assert {one["photo"] for one in summary["skipped"]} == set(shown.values())
        for path in shown:
            path.unlink()
        shown.clear()


SOUND_LINES = (b"plain.png", b"./sub/../plain two.png", b"-dash.png", b"un\xff.png", b"#hash.png")
HOSTILE_LINES = (
    b"absent.png",
    b"plain.png/below-a-file.png",
    b"# a comment",
    b"~",
    b"*.png",
    b"sub",
    b"/",
    b"..",
    b"/dev/zero",
    b"pipe.jpg",
    b"tab\tand \x1b[31mcolour",
    b"\xff\xfe\x00".replace(b"\0", b""),
    b"return\rin the middle",
    b"x" * 300,
    b"y" * 100_000,
    b"deep/" * 1000,
    b"nosuch://bucket/a.png",
    b"://a.png",
    b"http://[::1/a.png",
    b"file:///absent/a.png",
    b"file://",
    b"memory://absent/a.png",
    b"\xf0\x9f\xa6\x80 \xd8\xb5\xd9\x88\xd8\xb1\xd8\xa9 \xe7\x85\xa7\xe7\x89\x87.png",
    b" ",
    b"text.txt",
)


@pytest.mark.parametrize(
    ("separator", "way"), [(b"\n", "stdin"), (b"\r\n", "list"), (b"\0", "stdin")]
)
def test_hostile_lines_of_a_list_are_told_of_and_the_others_done(
    place: Place, separator: bytes, way: str
) -> None:
    cwd = os.fsencode(place.root / "cwd")
    os.mkdir(cwd + b"/sub")
    hostile = Hostile(cwd)
    for index, line in enumerate(SOUND_LINES):
        hostile.add_good(os.path.normpath(line), photo(index))
    os.mkfifo(cwd + b"/pipe.jpg")
    Path(os.fsdecode(cwd + b"/text.txt")).write_text("not a photo")
    lines = [*HOSTILE_LINES, b"", *SOUND_LINES, b"", SOUND_LINES[0]]
    content = b"\xef\xbb\xbf" + separator.join(lines)
    hostile.bad = {line.removeprefix(b"file://") for line in HOSTILE_LINES if line != b"file://"}
    if way == "stdin":
        result = place.run("-", stdin=content)
    else:
        (place.root / "list.txt").write_bytes(content)
        result = place.run("--set", f"list={place.root / 'list.txt'}")
    summary = checked_messages(result)
    assert summary["images"] == len(SOUND_LINES)
    assert summary["skipped_count"] == len(HOSTILE_LINES)
    found = records(place.out)
    good = {os.path.join(cwd, os.fsencode(one.photo.path)) for one in found if not one.error}
    assert {os.path.normpath(path) for path in good} == hostile.good
    told = {os.fsencode(one.photo.path) for one in found if one.error}
    long = {line for line in HOSTILE_LINES if len(line) > 2**16}
    assert hostile.bad - told <= long  # cut to what a path may have


def test_no_folder_for_outputs_and_a_closed_stdin_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--out is empty"):
        open_store("")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input, which is closed"):
        find_photos(["-"], str(tmp_path / "out"))
