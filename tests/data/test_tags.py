"""Image tags: the file's two formats, photos by any of their names, and tags from masks."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srdeploy.data import open_dataset
from srdeploy.data.check import check_dataset
from srdeploy.data.tag_file import Entry, read_tag_file
from srdeploy.data.tags import has_all_masks, open_tagged
from srdeploy.errors import UserError

NAMES = ["background", "cow", "dog", "traffic light"]
MASKS = {"a": [0, 1], "b": [0, 2, 255], "c": [0], "d": [1, 2, 3]}
"""Photo of the folder layout -> ids in its mask."""


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (9, 90, 200)).save(path)


def mask(path: Path, ids: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.resize(np.array(ids, np.uint8), (6, 8))
    Image.fromarray(labels).save(path)


def folder(root: Path, masks: bool = False, **table: object) -> Path:
    """The folder layout: a, b, c in train, d in val."""
    for name, ids in MASKS.items():
        split = "val" if name == "d" else "train"
        photo(root / "images" / split / f"{name}.png")
        if masks:
            mask(root / "labels" / split / f"{name}.png", ids)
    (root / "classes.json").write_text(json.dumps({"names": NAMES, **table}))
    return root


def tag_csv(root: Path, *lines: str) -> None:
    (root / "labels.csv").write_text("\n".join(["image,classes", *lines]) + "\n")


TAGS = ("train/a.png,cow", "b,dog;background", "images/train/c.png,", "val/d,cow;dog;3")


def test_photos_have_the_tags_that_the_file_gives_them(tmp_path: Path) -> None:
    tag_csv(folder(tmp_path), *TAGS)
    found = open_tagged(tmp_path, "train")
    assert [item.name for item in found.items] == ["a", "b", "c"]
    assert found.tags == (frozenset({1}), frozenset({2}), frozenset())
    assert found.source == "file"
    assert not found.has_masks


def test_a_class_may_be_named_by_its_id(tmp_path: Path) -> None:
    tag_csv(folder(tmp_path), *TAGS)
    assert open_tagged(tmp_path, "val").tags == (frozenset({1, 2, 3}),)


def test_json_says_the_same_as_csv(tmp_path: Path) -> None:
    root = folder(tmp_path)
    lines = {"a": ["cow"], "b.png": ["dog"], "train/c": [], "d": ["cow", "dog", 3]}
    (root / "labels.json").write_text(json.dumps(lines))
    first = open_tagged(root, "train").tags
    rows = [{"image": name, "classes": classes} for name, classes in lines.items()]
    (root / "labels.json").write_text(json.dumps(rows))
    assert open_tagged(root, "train").tags == first == (frozenset({1}), frozenset({2}), frozenset())


def test_tags_of_masks_are_what_they_show(tmp_path: Path) -> None:
    found = open_tagged(folder(tmp_path, masks=True), "train+val", from_masks=True)
    assert found.tags == (frozenset({1}), frozenset({2}), frozenset(), frozenset({1, 2, 3}))
    assert found.source == "masks"
    assert found.has_masks


def test_classes_that_are_not_scored_are_no_tags(tmp_path: Path) -> None:
    found = open_tagged(folder(tmp_path, masks=True, scored=[0, 2]), "train+val", from_masks=True)
    assert found.foreground == (2,)
    assert found.tags == (frozenset(), frozenset({2}), frozenset(), frozenset({2}))


def test_a_tagged_photo_is_read_with_background_in_place_of_labels(tmp_path: Path) -> None:
    tag_csv(folder(tmp_path), *TAGS)
    pixels, labels = open_tagged(tmp_path, "train").read(0)
    assert pixels.shape == (6, 8, 3)
    assert (labels == 0).all()


def test_true_masks_are_at_hand_where_they_exist(tmp_path: Path) -> None:
    tag_csv(folder(tmp_path, masks=True), *TAGS)
    found = open_tagged(tmp_path, "train")
    assert (found.mask(1) == open_dataset(tmp_path, "train").read(1)[1]).all()


def test_whether_all_photos_have_masks_is_known(tmp_path: Path) -> None:
    root = folder(tmp_path, masks=True)
    (root / "labels/train/b.png").unlink()
    assert has_all_masks(root, "val")
    assert not has_all_masks(root, "train+val")


def voc(root: Path) -> str:
    photo(root / "JPEGImages/2008_1.jpg")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("2008_1\n")
    return "2008_1.jpg,cow;person"


def test_voc_photos_without_masks_have_tags(tmp_path: Path) -> None:
    tag_csv(tmp_path, voc(tmp_path))
    found = open_tagged(tmp_path, "train")
    assert found.tags == (frozenset({10, 15}),)
    assert found.items[0].label == tmp_path / "SegmentationClass/2008_1.png"


def test_cityscapes_has_no_background_and_so_no_tags(tmp_path: Path) -> None:
    photo(tmp_path / "leftImg8bit/train/bonn/bonn_0_1_leftImg8bit.png")
    tag_csv(tmp_path, "bonn_0_1,car")
    with pytest.raises(UserError, match="need a class called 'background'"):
        open_tagged(tmp_path, "train")


def refused(root: Path, *lines: str) -> str:
    tag_csv(folder(root), *lines)
    with pytest.raises(UserError) as error:
        open_tagged(root, "train")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a,cows", "labels.csv line 2: no class 'cows': did you mean 'cow'?"),
        ("a,7", "labels.csv line 2: no class '7'"),
        ("a,cow,dog", "labels.csv line 2: 3 fields, not 2"),
        ('"a,cow', "not valid CSV"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    assert said in refused(tmp_path, line, "b,", "c,")


def test_a_photo_tagged_twice_names_both_lines(tmp_path: Path) -> None:
    said = refused(tmp_path, "a,cow", "train/a.png,dog", "b,", "c,")
    assert "labels.csv line 3" in said
    assert "tagged already" in said
    assert "labels.csv line 2" in said


def test_photos_without_tags_are_counted(tmp_path: Path) -> None:
    assert "2 photos of split 'train' are not in it, such as" in refused(tmp_path, "a,cow", "d,")


def test_a_name_of_two_photos_needs_more_of_the_path(tmp_path: Path) -> None:
    photo(tmp_path / "images/train/x/a.png")
    assert "give more of the path" in refused(tmp_path, "a,cow", "b,", "c,", "x/a,dog")


def test_no_file_of_tags_says_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels\.csv is looked for, with the header.*from-masks"):
        open_tagged(folder(tmp_path), "train")


def test_two_files_of_tags_are_refused(tmp_path: Path) -> None:
    tag_csv(folder(tmp_path), *TAGS)
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(UserError, match="keep one of them"):
        open_tagged(tmp_path, "train")


@pytest.mark.parametrize("content", ["3", '["a"]', '{"a": "cow"}', '[{"image": 1, "classes": []}]'])
def test_json_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    (folder(tmp_path) / "labels.json").write_text(content)
    with pytest.raises(UserError, match=r"labels\.json"):
        open_tagged(tmp_path, "train")


texts = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters=";"), min_size=1
).map(str.strip)
entries = st.lists(
    st.tuples(texts.filter(bool), st.lists(texts.filter(bool), max_size=4)), max_size=6
)


@settings(max_examples=60, deadline=None)
@given(entries)
def test_both_formats_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, list[str]]]
) -> None:
    """Names with commas, quotes and letters of any script."""
    root = tmp_path_factory.mktemp("tags")
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["image", "classes"])
    for image, classes in rows:
        writer.writerow([image, ";".join(classes)])
    (root / "labels.csv").write_text(text.getvalue(), encoding="utf-8", newline="")
    listed = [{"image": image, "classes": classes} for image, classes in rows]
    (root / "labels.json").write_text(json.dumps(listed), encoding="utf-8")

    def parts(found: list[Entry]) -> list[tuple[str, tuple[str, ...]]]:
        return [(one.image, one.classes) for one in found]

    expected = [(image, tuple(classes)) for image, classes in rows]
    assert parts(read_tag_file(root / "labels.csv")) == expected
    assert parts(read_tag_file(root / "labels.json")) == expected


def test_splits_are_joined_in_the_order_they_are_named(tmp_path: Path) -> None:
    root = folder(tmp_path, masks=True)
    found = open_dataset(root, "val+train")
    assert [item.name for item in found.items] == ["d", "a", "b", "c"]
    assert found.split == "val+train"


def test_a_split_whose_own_name_has_a_plus_is_meant_first(tmp_path: Path) -> None:
    root = folder(tmp_path, masks=True)
    photo(root / "images/train+val/e.png")
    mask(root / "labels/train+val/e.png", [0])
    assert [item.name for item in open_dataset(root, "train+val").items] == ["e"]


def test_a_photo_is_not_joined_to_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'train\+train' has .* twice"):
        open_dataset(folder(tmp_path, masks=True), "train+train")


def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no split 'vall': did you mean 'val'"):
        open_dataset(folder(tmp_path, masks=True), "train+vall")


def test_check_passes_a_data_set_of_tags_alone(tmp_path: Path) -> None:
    tag_csv(folder(tmp_path), *TAGS)
    found = check_dataset(tmp_path)
    assert found.passed
    assert found.splits["train"].labels == "tags"
    assert found.splits["train"].images == 3
    assert found.splits["train"].images_with["cow"] == 1
    assert found.splits["train"].pixels["cow"] is None


def test_check_finds_what_is_wrong_with_tags(tmp_path: Path) -> None:
    tag_csv(folder(tmp_path), "a,cow", "a.png,dog", "nowhere.png,cow", "b,wolf", "d,")
    found = check_dataset(tmp_path)
    assert found.fault_counts() == {
        "listed twice": 1,
        "listed photo missing": 1,
        "unknown class": 1,
        "photo without tags": 2,
    }


def test_check_holds_tags_against_masks(tmp_path: Path) -> None:
    tag_csv(folder(tmp_path, masks=True), "a,dog", "b,dog", "c,", "d,cow;dog;traffic light")
    found = check_dataset(tmp_path)
    assert found.fault_counts() == {"tag without pixels": 1, "untagged class": 1}
    assert all(fault.path.endswith("a.png") for fault in found.faults)


def test_check_still_wants_masks_where_nothing_is_tagged(tmp_path: Path) -> None:
    assert "photo without mask" in check_dataset(folder(tmp_path)).fault_counts()
