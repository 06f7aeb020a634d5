"""The three layouts, their class tables, and what is said of folders that can't be used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srdeploy.data import open_dataset, spec_for, splits_of
from srdeploy.data.cityscapes import label_ids_lookup
from srdeploy.data.classes import CITYSCAPES, VOC, colour_map, read_class_table
from srdeploy.data.dataset import LAYOUTS
from srdeploy.data.pairs import NOT_AN_ID
from srdeploy.errors import UserError
from srdeploy.spec import InputPolicy

TABLE: dict[str, Any] = {"names": ["sky", "road", "car"]}


def write_pair(photo: Path, mask: Path, ids: np.ndarray) -> None:
    """A black photo and a mask of the same size."""
    for path in (photo, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (ids.shape[1], ids.shape[0])).save(photo)
    Image.fromarray(ids.astype(np.uint8)).save(mask)


def folder_set(
    root: Path, ids: np.ndarray, table: dict[str, Any] | None = None, names: str = "a b"
) -> Path:
    """Split `val` with a pair per name."""
    for name in names.split():
        write_pair(root / f"images/val/{name}.jpg", root / f"labels/val/{name}.png", ids)
    (root / "classes.json").write_text(json.dumps(TABLE if table is None else table))
    return root


def square(value: int = 0) -> np.ndarray:
    return np.full((32, 32), value, np.uint8)


def test_the_folder_layout_pairs_photos_and_masks_by_name(tmp_path: Path) -> None:
    data = open_dataset(folder_set(tmp_path, square(2), names="b a sub/c"), "val")
    assert data.layout == "folder"
    assert [item.name for item in data.items] == ["a", "b", "sub/c"]
    assert len(data) == 3
    photo, labels = data.read(2)
    assert photo.shape == (32, 32, 3)
    assert photo.dtype == labels.dtype == np.uint8
    assert (labels == 2).all()


def test_labels_of_classes_that_are_not_scored_are_ignored(tmp_path: Path) -> None:
    ids = np.tile(np.array([0, 1, 2, 255], np.uint8), (32, 8))
    root = folder_set(tmp_path, ids, TABLE | {"eval_class_ids": [0, 2]})
    data = open_dataset(root, "val")
    assert data.read(0)[1][0, :4].tolist() == [0, 255, 2, 255]
    assert spec_for(data).scored == (0, 2)


def test_an_id_that_means_nothing_is_refused_with_file_and_id(tmp_path: Path) -> None:
    data = open_dataset(folder_set(tmp_path, square(7)), "val")
    with pytest.raises(UserError, match=r"a\.png: pixels with id 7, .*ids are 0\.\.2, 255"):
        data.read(0)


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    root = folder_set(tmp_path, square())
    Image.new("L", (20, 32)).save(root / "labels/val/a.png")
    with pytest.raises(UserError, match=r"a\.png: the mask is 20x32, its photo 32x32"):
        open_dataset(root, "val").read(0)


def test_photos_without_masks_are_refused_and_counted(tmp_path: Path) -> None:
    root = folder_set(tmp_path, square(), names="a b c")
    (root / "labels/val/b.png").unlink()
    (root / "labels/val/c.png").unlink()
    with pytest.raises(UserError, match=r"photo without mask: .*b\.jpg: .*; 2 such in split 'val'"):
        open_dataset(root, "val")


def test_photos_without_masks_are_kept_with_the_place_of_the_mask(tmp_path: Path) -> None:
    root = folder_set(tmp_path, square(), names="a b x/c.d")
    for name in ("a", "x/c.d"):
        (root / f"labels/val/{name}.png").unlink()
    found = LAYOUTS["folder"].pairs(root, "val")
    assert [item.name for item in found.items] == ["b"]
    assert [(item.name, item.image, item.label) for item in found.bare] == [
        (name, root / f"images/val/{name}.jpg", root / f"labels/val/{name}.png")
        for name in ("a", "x/c.d")
    ]
    assert [fault.kind for fault in found.faults] == ["photo without mask"] * 2


def joined_set(root: Path) -> Path:
    """Splits val, with photos a and b, extra, with c and a shared photo, and one called a+b."""
    folder_set(root, square(1))
    for split, names in {"extra": "c", "other": "a", "a+b": "d"}.items():
        for name in names:
            photo, mask = root / f"images/{split}/{name}.jpg", root / f"labels/{split}/{name}.png"
            write_pair(photo, mask, square(2))
    return root


def test_joined_splits_follow_each_other_in_their_order(tmp_path: Path) -> None:
    data = open_dataset(joined_set(tmp_path), "extra+val")
    assert data.split == "extra+val"
    assert [item.name for item in data.items] == ["c", "a", "b"]
    assert [int(data.read(index)[1].max()) for index in range(3)] == [2, 1, 1]


def test_names_that_joined_splits_share_get_their_splits_before_them(tmp_path: Path) -> None:
    data = open_dataset(joined_set(tmp_path), "val+other")
    assert [item.name for item in data.items] == ["val/a", "val/b", "other/a"]
    assert [int(data.mask(index).max()) for index in range(3)] == [1, 1, 2]


def test_a_split_of_the_very_name_wins_over_joined_ones(tmp_path: Path) -> None:
    assert [item.name for item in open_dataset(joined_set(tmp_path), "a+b").items] == ["d"]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("val+extr", r"no split 'extr', which 'val\+extr' names: did you mean 'extra'"),
        ("val+", r"no split '', which 'val\+' names: known"),
        ("val+extra+val", r"'val\+extra\+val' names the split 'val' twice"),
        ("val+empty", "split 'empty' of .* is empty"),
        ("val+link", r"link/z\.jpg is in both splits 'val' and 'link'"),
    ],
)
def test_splits_that_can_not_be_joined_are_refused(
    tmp_path: Path, split: str, message: str
) -> None:
    root = joined_set(tmp_path)
    for folder in ("images/empty", "images/link", "labels/link"):
        (root / folder).mkdir()
    (root / "images/link/z.jpg").symlink_to(root / "images/val/a.jpg")
    (root / "labels/link/z.png").symlink_to(root / "labels/val/a.png")
    with pytest.raises(UserError, match=message):
        open_dataset(root, split)


def test_two_photos_of_one_name_are_refused(tmp_path: Path) -> None:
    root = folder_set(tmp_path, square())
    Image.new("RGB", (32, 32)).save(root / "images/val/a.png")
    with pytest.raises(UserError, match=r"two photos of one name: .*a\.png: a\.jpg"):
        open_dataset(root, "val")


def test_hidden_and_foreign_files_are_left_alone(tmp_path: Path) -> None:
    root = folder_set(tmp_path, square())
    for name in (".DS_Store", "._a.jpg", "Thumbs.db", "notes.txt"):
        (root / "images/val" / name).write_text("x")
    assert len(open_dataset(root, "val")) == 2


@pytest.mark.parametrize(
    ("split", "layout", "message"),
    [
        ("vall", "auto", r"has no split 'vall': did you mean 'val'\?"),
        ("holdout", "auto", "has no split 'holdout': known: empty, val"),
        ("../val", "auto", r"has no split '\.\./val'"),
        ("empty", "auto", "split 'empty' of .* is empty"),
        ("val", "vok", r"unknown layout 'vok': did you mean 'voc'\?"),
        ("val", "cityscapes", "not laid out as 'cityscapes': it has no leftImg8bit"),
    ],
)
def test_a_wrong_split_or_layout_is_refused_with_the_known_ones(
    tmp_path: Path, split: str, layout: str, message: str
) -> None:
    root = folder_set(tmp_path, square())
    (root / "images/empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_dataset(root, split, layout)


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has none of images/SPLIT \(folder\), JPEGImages \(voc\)"):
        splits_of(tmp_path)
    with pytest.raises(UserError, match="no such data folder: .*gone"):
        splits_of(tmp_path / "gone")
    (tmp_path / "images" / "val").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no classes\.json in .*: it names the classes"):
        open_dataset(tmp_path, "val")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (["sky", "road"], "a JSON object with 'names' is needed, this is list"),
        ({}, "'names' is missing|'palette' is missing"),
        ({"names": ["sky"]}, "'names'"),
        ({"names": ["sky", "sky"]}, "'sky' stands twice"),
        ({"names": "sky"}, "'names'"),
        (TABLE | {"pallete": []}, "unknown key 'pallete': did you mean 'palette'"),
        (TABLE | {"ignore_indx": 0}, "unknown key 'ignore_indx': did you mean 'ignore_index'"),
        (TABLE | {"palette": [[0, 0, 0]]}, "3 classes but 1 palette colours"),
        (TABLE | {"ignore_index": 2}, "ignore_index 2 is also the id of class 'car'"),
        (TABLE | {"eval_class_ids": [3]}, r"scored class ids \[3\]"),
        (TABLE | {"eval_class_ids": [1], "scored": [1]}, "mean the same"),
    ],
)
def test_a_wrong_class_table_is_refused_with_the_fault(
    tmp_path: Path, table: Any, message: str
) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(table))
    with pytest.raises(UserError, match=f"classes.json: .*({message})"):
        read_class_table(path)


def test_a_class_table_may_hold_notes_and_leave_out_colours(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    notes = {"dataset": "ours", "note": "x", "eval_class_names": ["sky"], "stats": {"a": 1}}
    path.write_text(json.dumps(TABLE | notes | {"eval_class_ids": [0]}))
    table = read_class_table(path)
    assert table.palette == colour_map(3)
    assert table.scored == (0,)
    assert table.ignore_index == 255


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 255), first=st.integers(0, 254))
def test_the_default_colours_differ_from_each_other(count: int, first: int) -> None:
    colours = colour_map(count)
    assert len(set(colours)) == count
    assert colour_map(255)[:count] == colours
    assert all(0 <= value <= 255 for value in colours[first % count])


def voc_set(root: Path) -> Path:
    """A devkit with a fine mask for one, an SBD mask for two, and lists of both kinds."""
    home = root / "VOCdevkit" / "VOC2012"
    write_pair(home / "JPEGImages/one.jpg", home / "SegmentationClass/one.png", square(20))
    write_pair(home / "JPEGImages/one.jpg", home / "SegmentationClassAug/one.png", square(19))
    write_pair(home / "JPEGImages/two.jpg", home / "SegmentationClassAug/two.png", square(255))
    lists = home / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("two\none\n\n")
    (lists / "train_aug.txt").write_text("/JPEGImages/one.jpg /SegmentationClassAug/one.png\n")
    (lists / "val.txt").write_text("three\n")
    (lists / "broken.txt").write_text("one\na b c\n")
    return root


def test_vocs_devkit_is_read_through_its_lists(tmp_path: Path) -> None:
    root = voc_set(tmp_path)
    assert splits_of(root) == ("broken", "train", "train_aug", "val")
    data = open_dataset(root, "train")
    assert data.layout == "voc"
    assert data.classes == VOC
    assert [item.name for item in data.items] == ["one", "two"]
    assert [int(data.read(i)[1].max()) for i in range(2)] == [20, 255]
    assert int(open_dataset(root, "train_aug").read(0)[1].max()) == 19


def test_vocs_lists_are_refused_where_they_name_absent_photos_or_nonsense(tmp_path: Path) -> None:
    root = voc_set(tmp_path)
    with pytest.raises(UserError, match=r"listed photo missing: .*three\.jpg: .*val\.txt.* line 1"):
        open_dataset(root, "val")
    with pytest.raises(UserError, match=r"broken\.txt line 2: .*: a b c"):
        open_dataset(root, "broken")


def test_a_photo_in_two_joined_lists_of_voc_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one\.jpg is in both splits 'train' and 'train_aug'"):
        open_dataset(voc_set(tmp_path), "train+train_aug")


def test_vocs_photos_without_masks_are_kept_with_the_place_of_the_mask(tmp_path: Path) -> None:
    home = voc_set(tmp_path) / "VOCdevkit/VOC2012"
    (home / "SegmentationClassAug/two.png").unlink()
    found = LAYOUTS["voc"].pairs(home, "train")
    assert [item.name for item in found.items] == ["one"]
    (bare,) = found.bare
    assert (bare.name, bare.label) == ("two", home / "SegmentationClass/two.png")


def test_a_class_table_replaces_vocs(tmp_path: Path) -> None:
    root = voc_set(tmp_path)
    names = [f"c{i}" for i in range(22)]
    (root / "VOCdevkit/VOC2012/classes.json").write_text(json.dumps({"names": names}))
    assert open_dataset(root, "train").classes.names == tuple(names)


def test_vocs_palette_begins_as_published() -> None:
    assert VOC.palette[:5] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert VOC.palette[20] == (0, 64, 128)


def cityscapes_set(root: Path, end: str, ids: np.ndarray) -> Path:
    """One frame of one city."""
    frame = "ulm/ulm_000001_000019"
    write_pair(
        root / f"leftImg8bit/val/{frame}_leftImg8bit.png", root / f"gtFine/val/{frame}{end}", ids
    )
    return root


def test_cityscapes_label_ids_are_mapped_to_training_ids(tmp_path: Path) -> None:
    ids = np.tile(np.array([7, 33, 0, 255], np.uint8), (32, 8))
    data = open_dataset(cityscapes_set(tmp_path, "_gtFine_labelIds.png", ids), "val")
    assert data.layout == "cityscapes"
    assert data.items[0].name == "ulm_000001_000019"
    assert data.read(0)[1][0, :4].tolist() == [0, 18, 255, 255]
    assert len(data.classes.names) == 19


def test_cityscapes_training_ids_are_read_as_they_are(tmp_path: Path) -> None:
    ids = np.tile(np.array([0, 18, 255, 7], np.uint8), (32, 8))
    data = open_dataset(cityscapes_set(tmp_path, "_gtFine_labelTrainIds.png", ids), "val")
    assert data.read(0)[1][0, :4].tolist() == [0, 18, 255, 7]


def test_cityscapes_ids_beyond_its_table_are_refused(tmp_path: Path) -> None:
    root = cityscapes_set(tmp_path, "_gtFine_labelIds.png", square(34))
    with pytest.raises(UserError, match=r"labelIds\.png: pixels with id 34"):
        open_dataset(root, "val").read(0)


def test_cityscapes_lookup_covers_every_class_once() -> None:
    lookup = label_ids_lookup()
    ids = [v for v in lookup if v not in (NOT_AN_ID, CITYSCAPES.ignore_index)]
    assert ids == list(range(19))  # Cityscapes numbers both in the same order
    assert lookup.count(NOT_AN_ID) == 256 - 35


def test_a_cityscapes_frame_without_its_mask_is_refused(tmp_path: Path) -> None:
    root = cityscapes_set(tmp_path, "_gtFine_labelIds.png", square(7))
    Image.new("RGB", (32, 32)).save(root / "leftImg8bit/val/ulm/ulm_2_leftImg8bit.png")
    with pytest.raises(UserError, match=r"photo without mask: .*ulm_2_leftImg8bit\.png"):
        open_dataset(root, "val")
    (bare,) = LAYOUTS["cityscapes"].pairs(root, "val").bare
    assert bare.name == "ulm_2"
    assert bare.label == root / "gtFine/val/ulm/ulm_2_gtFine_labelIds.png"


def test_cityscapes_splits_whose_masks_differ_in_kind_are_not_joined(tmp_path: Path) -> None:
    root = cityscapes_set(tmp_path, "_gtFine_labelIds.png", square(7))
    photo = root / "leftImg8bit/train/bonn/bonn_1_leftImg8bit.png"
    write_pair(photo, root / "gtFine/train/bonn/bonn_1_gtFine_labelTrainIds.png", square())
    with pytest.raises(UserError, match="split 'train' number the classes otherwise than .*'val'"):
        open_dataset(root, "val+train")


def test_the_spec_takes_usual_and_largest_size_from_the_photos(tmp_path: Path) -> None:
    root = folder_set(tmp_path, square(), names="a")
    for name, (height, width) in {"b": (40, 50), "c": (40, 50), "d": (90, 33)}.items():
        ids = np.zeros((height, width))
        write_pair(root / f"images/val/{name}.png", root / f"labels/val/{name}.png", ids)
    data = open_dataset(root, "val")
    measured = spec_for(data).input
    assert measured == InputPolicy(smallest=(32, 32), usual=(40, 50), largest=(96, 64))
    scaled = spec_for(data, longest_side=100).input
    assert scaled == InputPolicy(longest_side=100, usual=(80, 100), largest=(128, 128))
    given = InputPolicy(usual=(64, 64), largest=(64, 64))
    assert spec_for(data, given).input == given


def test_photos_too_small_for_any_network_are_named(tmp_path: Path) -> None:
    data = open_dataset(folder_set(tmp_path, np.zeros((20, 40))), "val")
    with pytest.raises(
        UserError, match=r"a\.jpg: 40x20 is too small: networks need at least 32x32"
    ):
        spec_for(data)
