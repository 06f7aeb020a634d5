"""`srdeploy data check` and `synth`: what they find, print and exit with."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from srdeploy.cli.main import app
from srdeploy.data.check import IGNORED, check_dataset
from srdeploy.errors import UserError

NAMES = ["sky", "road", "car"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six good pairs of 8x4 pixels in split train: the left half sky, the right half road."""
    ids = np.repeat(np.array([[0, 1]], np.uint8), 4, 1).repeat(4, 0)
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder / "train").mkdir(parents=True)
    for name in "abcdef":
        Image.new("RGB", (8, 4)).save(tmp_path / f"data/images/train/{name}.png")
        Image.fromarray(ids).save(tmp_path / f"data/labels/train/{name}.png")
    (tmp_path / "data/classes.json").write_text(json.dumps({"names": NAMES}))
    return tmp_path / "data"


def break_all(root: Path) -> None:
    """One fault of each kind that a folder can have."""
    photos, masks = root / "images/train", root / "labels/train"
    (masks / "a.png").unlink()
    (photos / "b.png").unlink()
    (photos / "c.png").write_bytes((photos / "c.png").read_bytes()[:40])
    (masks / "d.png").write_text("not a picture")
    Image.new("L", (7, 4)).save(masks / "e.png")
    Image.fromarray(np.full((4, 8), 9, np.uint8)).save(masks / "f.png")
    shutil.copy(photos / "f.png", photos / "f.webp.png")
    Image.new("RGB", (8, 4)).save(photos / "e.jpg")
    (root / "images/val").mkdir()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", *arguments])


def test_a_good_set_passes_with_its_class_distribution(root: Path) -> None:
    report = check_dataset(root)
    assert report.passed
    found = report.splits["train"]
    assert found.images == 6
    assert found.sizes == {"8x4": 6}
    assert found.pixels == {"sky": 0.5, "road": 0.5, "car": 0.0, IGNORED: 0.0}
    assert found.images_with == {"sky": 6, "road": 6, "car": 0, IGNORED: 0}


def test_every_kind_of_fault_is_found_and_named(root: Path) -> None:
    break_all(root)
    report = check_dataset(root)
    found = {(fault.kind, Path(fault.path).name.split()[0]) for fault in report.faults}
    assert found == {
        ("photo without mask", "a.png"),
        ("photo without mask", "f.webp.png"),
        ("mask without photo", "b.png"),
        ("unreadable photo", "c.png"),
        ("unreadable mask", "d.png"),
        ("sizes differ", "e.png"),
        ("two photos of one name", "e.png"),
        ("unknown id", "f.png"),
        ("empty split", "data"),
    }
    assert report.fault_counts()["photo without mask"] == 2
    assert not report.passed


def test_classes_that_are_not_scored_count_as_what_they_are(root: Path) -> None:
    (root / "classes.json").write_text(json.dumps({"names": NAMES, "scored": [0]}))
    found = check_dataset(root).splits["train"]
    assert found.pixels is not None
    assert found.pixels["road"] == 0.5


def tag(root: Path, *lines: str) -> None:
    (root / "labels.csv").write_text("\n".join(["image,classes", *lines, ""]))


@pytest.fixture
def tagged(root: Path) -> Path:
    """The pairs of `root`, and a split tagged with photos x and y that have tags and no masks."""
    for name in "xy":
        (root / "images/tagged").mkdir(exist_ok=True)
        shutil.copy(root / "images/train/a.png", root / f"images/tagged/{name}.png")
    tag(root, "x,road;car", "y,car")
    return root


def test_a_split_without_masks_is_checked_by_its_tags(tagged: Path) -> None:
    report = check_dataset(tagged)
    assert report.passed, report.faults
    found = report.splits["tagged"]
    assert (found.labels, found.images, found.sizes) == ("tags", 2, {"8x4": 2})
    assert found.pixels is None
    assert found.images_with == {"sky": 0, "road": 1, "car": 2}
    assert report.splits["train"].labels == "masks"


def test_background_is_not_counted_by_tags(tagged: Path) -> None:
    (tagged / "classes.json").write_text(json.dumps({"names": ["background", "road", "car"]}))
    assert check_dataset(tagged).splits["tagged"].images_with == {"road": 1, "car": 2}


def test_every_kind_of_fault_of_tags_is_found_and_named(tagged: Path) -> None:
    shutil.copy(tagged / "images/train/a.png", tagged / "images/tagged/a.png")
    (tagged / "images/tagged/y.png").write_text("not a picture")
    tag(tagged, "a,", "x,cra", "tagged/x.png,", "gone,car", "train/b,car;sky", "train/c,road;sky")
    found = {
        (fault.kind, Path(fault.path).name, fault.detail.partition(":")[0])
        for fault in check_dataset(tagged).faults
        if fault.kind not in ("photo without tags", "unreadable photo")
    }
    assert found == {
        ("two photos of one name", "labels.csv", "line 2"),
        ("unknown class", "labels.csv", "line 3"),
        ("listed twice", "labels.csv", "line 4"),
        ("listed photo missing", "labels.csv", "line 5"),
        ("tag without pixels", "labels.csv", "line 6"),
        ("untagged class", "labels.csv", "line 6"),
    }
    others = [fault for fault in check_dataset(tagged).faults if Path(fault.path).suffix == ".png"]
    assert [(fault.kind, Path(fault.path).name) for fault in others] == [
        ("photo without tags", "a.png"),
        ("unreadable photo", "y.png"),
        ("photo without tags", "y.png"),
    ]


def test_tags_and_masks_that_disagree_are_named_with_class_and_files(root: Path) -> None:
    tag(root, "b,car;sky")
    first, second = (fault.detail for fault in check_dataset(root).faults)
    mask = root / "labels/train/b.png"
    assert first == f"line 2: b is tagged 'car', its mask {mask} shows none"
    assert second == f"line 2: b is not tagged 'road', its mask {mask} shows it"


def test_masks_need_no_tags_for_background_and_classes_that_are_not_scored(root: Path) -> None:
    table = {"names": ["background", "road", "car"], "scored": [0, 2]}
    (root / "classes.json").write_text(json.dumps(table))
    tag(root, "a,", "b,road")
    assert check_dataset(root).passed


def test_masks_that_are_missing_beside_others_stay_a_fault_with_tags(root: Path) -> None:
    (root / "labels/train/a.png").unlink()
    tag(root, "a,road")
    assert [fault.kind for fault in check_dataset(root).faults] == ["photo without mask"]


def test_a_tags_file_of_another_form_can_not_be_checked(root: Path) -> None:
    (root / "labels.csv").write_text("file,label\n")
    with pytest.raises(UserError, match=r"labels\.csv line 1: the header 'image,classes'"):
        check_dataset(root)


def test_the_verb_shows_tags_with_dashes_for_pixels(tagged: Path) -> None:
    result = run("check", str(tagged), "--split", "tagged")
    assert result.exit_code == 0, result.output
    row = next(line for line in result.stdout.splitlines() if " car " in line)
    assert [cell.strip() for cell in row.split("│")][-3:-1] == ["-", "2"]
    assert "2 photos, no faults" in result.output
    content = json.loads(run("check", str(tagged), "--json").stdout)
    assert content["splits"]["tagged"]["labels"] == "tags"
    assert content["splits"]["train"]["labels"] == "masks"
    assert content["splits"]["train"]["pixels"]["sky"] == 0.5


@pytest.mark.parametrize(
    ("splits", "message"), [(["tran"], "did you mean 'train'"), (["x"], "known")]
)
def test_an_unknown_split_is_refused(root: Path, splits: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_dataset(root, splits)


def test_a_folder_without_splits_can_not_be_checked(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="has no splits"):
        check_dataset(tmp_path)


def test_the_verb_prints_the_table_and_exits_with_zero_for_a_good_set(root: Path) -> None:
    result = run("check", str(root))
    assert result.exit_code == 0, result.output
    assert "50.00" in result.stdout
    assert "road" in result.stdout


def test_the_verb_exits_with_one_for_a_set_with_faults_and_json_holds_them_all(root: Path) -> None:
    break_all(root)
    result = run("check", str(root), "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert content["passed"] is False
    assert len(content["faults"]) == 9
    assert content["splits"]["train"]["images"] == 4


def test_the_verb_writes_scenes_of_the_size_asked_for(tmp_path: Path) -> None:
    counts = ["--train", "2", "--val", "1", "--test", "0"]
    result = run("synth", str(tmp_path / "s"), *counts, "--size", "64x80", "-q")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "s/images/val/scene_00000.jpg") as file:
        assert file.size == (80, 64)
    assert run("check", str(tmp_path / "s"), "--split", "val").exit_code == 0


def test_the_next_step_that_the_verb_names_is_a_whole_command(tmp_path: Path) -> None:
    result = run("synth", str(tmp_path / "s"), "--train", "1", "--val", "0", "--test", "0")
    said = " ".join(result.output.split())
    assert f"srdeploy train {tmp_path / 's'} --out runs/NAME" in said, result.output


@pytest.mark.parametrize("size", ["80", "80x", "axb", "-1x64", "64x64x3", ""])
def test_a_size_that_is_no_size_is_refused(tmp_path: Path, size: str) -> None:
    result = run("synth", str(tmp_path / "s"), f"--size={size}")
    assert isinstance(result.exception, UserError)
    assert "height x width in pixels" in str(result.exception)
