"""Tags: the file that holds them, how photos are found, and splits of photos with tags."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from srdeploy.data import open_tagged
from srdeploy.data.classes import CITYSCAPES, ClassTable, colour_map
from srdeploy.data.dataset import LAYOUTS
from srdeploy.data.tags import background_of, read_entries, read_tagging
from srdeploy.errors import UserError

NAMES = ["background", "cow", "person", "car"]
Write = Callable[[Path, Mapping[str, Sequence[str | int]]], Path]


def photo(path: Path) -> Path:
    """A black photo of 6x4 pixels (width x height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4)).save(path)
    return path


def mask(path: Path, *ids: int) -> Path:
    """A mask of 6x4 pixels that shows background and `ids`, one pixel each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.zeros((4, 6), np.uint8)
    labels[1, : len(ids)] = ids
    Image.fromarray(labels).save(path)
    return path


def as_csv(root: Path, tags: Mapping[str, Sequence[str | int]]) -> Path:
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(("image", "classes"))
    rows.writerows((image, ";".join(map(str, classes))) for image, classes in tags.items())
    (root / "labels.csv").write_text(text.getvalue(), newline="")
    return root / "labels.csv"


def as_object(root: Path, tags: Mapping[str, Sequence[str | int]]) -> Path:
    (root / "labels.json").write_text(json.dumps(tags))
    return root / "labels.json"


def as_list(root: Path, tags: Mapping[str, Sequence[str | int]]) -> Path:
    entries = [{"image": image, "classes": classes} for image, classes in tags.items()]
    (root / "labels.json").write_text(json.dumps(entries))
    return root / "labels.json"


WRITERS = [as_csv, as_object, as_list]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Photos a, b and sub/c of split train, of which only b has a mask, that of a car."""
    for name in ("a", "b", "sub/c"):
        photo(tmp_path / f"images/train/{name}.jpg")
    mask(tmp_path / "labels/train/b.png", 3)
    (tmp_path / "classes.json").write_text(json.dumps({"names": NAMES}))
    return tmp_path


@pytest.mark.parametrize("write", WRITERS)
def test_each_form_of_the_file_tags_photos_with_and_without_masks(root: Path, write: Write) -> None:
    write(root, {"a": ["cow", "person"], "b": [], "sub/c": ["background", "car"]})
    tagged = open_tagged(root, "train")
    assert [item.name for item in tagged.items] == ["a", "b", "sub/c"]
    assert [set(ids) for ids in tagged.tags] == [{1, 2}, set(), {3}]
    assert (len(tagged), tagged.source, tagged.layout, tagged.root) == (3, "file", "folder", root)
    assert (tagged.background, tagged.foreground) == (0, (1, 2, 3))


def test_photos_are_read_with_labels_that_are_all_background(root: Path) -> None:
    as_csv(root, {"a": [], "b": ["car"], "sub/c": []})
    pixels, labels = open_tagged(root, "train").read(1)
    assert pixels.shape == (4, 6, 3)
    assert labels.shape == (4, 6)
    assert pixels.dtype == labels.dtype == np.uint8
    assert not labels.any()


def test_true_masks_are_read_where_they_exist(root: Path) -> None:
    (root / "classes.json").write_text(json.dumps({"names": NAMES, "scored": [0, 1]}))
    as_csv(root, {"a": [], "b": [], "sub/c": []})
    tagged = open_tagged(root, "train")
    assert not tagged.has_masks
    assert np.unique(tagged.mask(1)).tolist() == [0, 255]
    with pytest.raises(UserError, match=r"a\.jpg has no mask: .*labels/train/a\.png"):
        tagged.mask(0)
    for name in ("a", "sub/c"):
        mask(root / f"labels/train/{name}.png")
    assert open_tagged(root, "train").has_masks


def test_a_mask_of_another_size_is_refused(root: Path) -> None:
    as_csv(root, {"a": [], "b": [], "sub/c": []})
    Image.new("L", (6, 5)).save(root / "labels/train/b.png")
    with pytest.raises(UserError, match=r"b\.png: the mask is 6x5, its photo 6x4"):
        open_tagged(root, "train").mask(1)


def test_tags_of_classes_that_are_not_scored_are_dropped(root: Path) -> None:
    (root / "classes.json").write_text(json.dumps({"names": NAMES, "scored": [2, 0]}))
    as_csv(root, {"a": ["cow", "person"], "b": ["car"], "sub/c": []})
    tagged = open_tagged(root, "train")
    assert [set(ids) for ids in tagged.tags] == [{2}, set(), set()]
    assert tagged.foreground == (2,)


def test_tags_from_masks_are_the_scored_classes_that_they_show(root: Path) -> None:
    (root / "classes.json").write_text(json.dumps({"names": NAMES, "scored": [0, 1, 3]}))
    mask(root / "labels/train/a.png", 1, 2, 255)
    mask(root / "labels/train/sub/c.png")
    as_csv(root, {"a": ["car"]})
    tagged = open_tagged(root, "train", from_masks=True)
    assert [set(ids) for ids in tagged.tags] == [{1}, {3}, set()]
    assert tagged.source == "masks"


def test_tags_from_masks_need_a_sound_mask_for_every_photo(root: Path) -> None:
    with pytest.raises(UserError, match=r"photo without mask: .*a\.jpg.*; 2 such in split 'train'"):
        open_tagged(root, "train", from_masks=True)
    for name in ("a", "sub/c"):
        mask(root / f"labels/train/{name}.png", 9)
    with pytest.raises(UserError, match=r"a\.png: pixels with id 9"):
        open_tagged(root, "train", from_masks=True)


@pytest.mark.parametrize("end", ["", ".jpg"])
@pytest.mark.parametrize("start", ["", "train/", "images/train/", "./images/train/"])
def test_a_photo_is_named_by_its_name_or_path(root: Path, start: str, end: str) -> None:
    tags = {"a": "cow", "b": "person", "sub/c": "car"}
    as_csv(root, {f"{start}{name}{end}": [tag] for name, tag in tags.items()})
    assert [set(ids) for ids in open_tagged(root, "train").tags] == [{1}, {2}, {3}]


def test_a_class_is_named_by_its_id_where_no_class_has_that_name(root: Path) -> None:
    (root / "classes.json").write_text(json.dumps({"names": ["background", "3", "cow", "car"]}))
    as_object(root, {"a": ["3"], "b": [3, "2"], "sub/c": ["0", 0]})
    assert [set(ids) for ids in open_tagged(root, "train").tags] == [{1}, {2, 3}, set()]


def test_the_whole_path_names_a_photo_although_others_fit(root: Path) -> None:
    for name in ("x.jpg", "x.jpg.jpg"):
        photo(root / "images/val" / name)
    classes = ClassTable(names=tuple(NAMES), palette=colour_map(4))
    photos = LAYOUTS["folder"].photos(root)
    found = read_tagging(as_csv(root, {"images/val/x.jpg": ["cow"]}), root, classes, photos)
    assert found.tags == {root / "images/val/x.jpg": {1}}
    found = read_tagging(as_csv(root, {"val/x.jpg": ["cow"]}), root, classes, photos)
    assert [fault.kind for fault in found.faults] == ["two photos of one name"]


def test_a_name_that_fits_photos_of_two_splits_is_refused_with_both(root: Path) -> None:
    photo(root / "images/val/a.jpg")
    as_csv(root, {"a": ["cow"], "b": [], "sub/c": []})
    with pytest.raises(
        UserError, match=r"line 2: 'a' fits images/train/a\.jpg and images/val/a\.jpg: write one"
    ):
        open_tagged(root, "train")


def test_joined_splits_follow_each_other_with_their_tags(root: Path) -> None:
    photo(root / "images/extra/a.jpg")
    as_csv(root, {"train/a": ["cow"], "b": [], "sub/c": ["car"], "extra/a": ["person"]})
    tagged = open_tagged(root, "extra+train")
    assert [item.name for item in tagged.items] == ["extra/a", "train/a", "train/b", "train/sub/c"]
    assert [set(ids) for ids in tagged.tags] == [{2}, {1}, set(), {3}]
    assert tagged.split == "extra+train"


def test_entries_of_photos_that_are_gone_do_no_harm(root: Path) -> None:
    as_csv(root, {"a": [], "b": [], "sub/c": ["cow"], "gone": ["car"]})
    assert [set(ids) for ids in open_tagged(root, "train").tags] == [set(), set(), {1}]


def test_a_split_without_photos_is_refused(root: Path) -> None:
    as_csv(root, {"a": [], "b": [], "sub/c": []})
    (root / "images/none").mkdir()
    with pytest.raises(UserError, match="split 'none' of .* is empty"):
        open_tagged(root, "none")


def test_two_photos_of_one_name_are_refused_with_tags_too(root: Path) -> None:
    photo(root / "images/train/a.png")
    as_csv(root, {"images/train/a.jpg": [], "b": [], "sub/c": []})
    with pytest.raises(UserError, match=r"two photos of one name: .*a\.png"):
        open_tagged(root, "train")


def test_without_a_tags_file_the_error_says_where_and_what_it_is(root: Path) -> None:
    with pytest.raises(UserError, match=r"labels\.csv \(or .*'image,classes'.*--labels-from-masks"):
        open_tagged(root, "train")


def test_two_tags_files_are_refused(root: Path) -> None:
    as_csv(root, {"a": []})
    as_list(root, {"a": []})
    with pytest.raises(UserError, match=r"both labels\.csv and labels\.json: keep one"):
        open_tagged(root, "train")


def test_photos_that_the_file_does_not_name_are_refused_and_counted(root: Path) -> None:
    as_csv(root, {"b": ["cow"]})
    with pytest.raises(
        UserError, match=r"photo without tags: .*a\.jpg: .*labels\.csv .*; 2 such in split 'train'"
    ):
        open_tagged(root, "train")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"names": ["sky", "cow"]},
            r"no class is called 'background' \(the classes are sky, cow\)",
        ),
        ({"names": NAMES, "scored": [1, 2]}, "'background' is not scored: .*put 0 into"),
    ],
)
def test_a_class_table_without_background_is_refused(root: Path, table: Any, message: str) -> None:
    (root / "classes.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=message):
        open_tagged(root, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"labels\.csv line 1: the header 'image,classes' is expected, this is ''"),
        ("a.jpg,cow\n", "line 1: the header .* this is 'a.jpg,cow'"),
        ("image,classes\n\na,cow,person\n", "line 3: .* 3 fields: put ';' between classes"),
        ("image,classes\na;cow\n", "line 2: 'a;cow' has no comma after it"),
        ("image,classes\n,cow\n", "line 2: the name of an image is missing"),
        ('image,classes\n"a\nb",cow\n"c"d,cow\n', "line 4: not valid CSV"),
        ("image,classes\na,cwo\n", "unknown class: .*line 2: 'a' is tagged 'cwo': did you mean"),
        ("image,classes\na,cow;4\n", "line 2: 'a' is tagged '4': ids are 0 to 3"),
        ("image,classes\na,-1\n", "line 2: 'a' is tagged '-1': known: background, cow"),
        ("image,classes\na,cow\nb,\ntrain/a.jpg,\n", "twice: .*line 4: .* is in line 2 already"),
    ],
)
def test_a_wrong_csv_is_refused_with_its_line(root: Path, text: str, message: str) -> None:
    (root / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        open_tagged(root, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ["cow"],\n}', r"labels\.json: not valid JSON \(line 2"),
        ('"a"', "an object of images .* this is a str"),
        ('{"a": "cow"}', r"entry 1 \('a'\): a list of class names is expected, .* this is 'cow'"),
        ('{"b": [], "a": [true]}', r"entry 2 \('a'\): a list of class names"),
        ('{"a": {"cow": 1}}', "this is an object with the keys cow"),
        ('[["a", "cow"]]', 'entry 1: {"image": NAME, "classes": .* is expected'),
        ('[{"image": "a"}]', "entry 1: .* this is an object with the keys image"),
        ('[{"image": 1, "classes": []}]', "entry 1: the image 1 must be a text"),
        ('{"": []}', "entry 1: the name of an image is missing"),
        ('{"a": ["cow"], "b": [], "a": []}', "listed twice: .*entry 3: 'a' is in entry 1 already"),
        ('{"a": [7]}', "entry 1: 'a' is tagged 7: ids are 0 to 3"),
    ],
)
def test_a_wrong_json_is_refused_with_its_entry(root: Path, text: str, message: str) -> None:
    (root / "labels.json").write_text(text)
    with pytest.raises(UserError, match=message):
        open_tagged(root, "train")


def test_a_csv_of_a_windows_editor_is_read(root: Path) -> None:
    (root / "labels.csv").write_bytes(b"\xef\xbb\xbfimage, classes\r\na,cow ; person;\r\n\r\n")
    assert [(e.image, e.classes) for e in read_entries(root / "labels.csv")] == [
        ("a", ("cow", "person"))
    ]


def voc_set(root: Path) -> Path:
    """A devkit whose list train names one with an SBD mask, two without, and three elsewhere."""
    photo(root / "JPEGImages/one.jpg")
    photo(root / "JPEGImages/two.jpg")
    photo(root / "Other/three.jpg")
    mask(root / "SegmentationClassAug/one.png", 10)
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("two\none\nOther/three.jpg Other/three.png\n")
    (lists / "broken.txt").write_text("a b c\n")
    return root


@pytest.mark.parametrize("write", WRITERS)
def test_vocs_photos_are_tagged_by_id_or_path(tmp_path: Path, write: Write) -> None:
    write(voc_set(tmp_path), {"two.jpg": ["cow"], "JPEGImages/one.jpg": [], "three": ["person"]})
    tagged = open_tagged(tmp_path, "train")
    assert [item.name for item in tagged.items] == ["one", "three", "two"]
    assert [set(ids) for ids in tagged.tags] == [set(), {15}, {10}]
    assert tagged.items[2].label == tmp_path / "SegmentationClass/two.png"
    assert np.unique(tagged.mask(0)).tolist() == [0, 10]


def test_vocs_absent_photos_are_refused_with_tags_too(tmp_path: Path) -> None:
    as_csv(voc_set(tmp_path), {"one": [], "two": [], "three": []})
    (tmp_path / "JPEGImages/two.jpg").unlink()
    with pytest.raises(UserError, match=r"listed photo missing: .*two\.jpg"):
        open_tagged(tmp_path, "train")


@pytest.mark.parametrize(
    "name",
    [
        "ulm_1",
        "ulm_1_leftImg8bit.png",
        "val/ulm/ulm_1_leftImg8bit",
        "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png",
    ],
)
def test_cityscapes_photos_are_tagged_by_frame_or_path(tmp_path: Path, name: str) -> None:
    path = photo(tmp_path / "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png")
    photo(tmp_path / "leftImg8bit/val/ulm/ulm_2_leftImg8bit.png")
    photos = LAYOUTS["cityscapes"].photos(tmp_path)
    found = read_tagging(as_csv(tmp_path, {name: ["car"]}), tmp_path, CITYSCAPES, photos)
    assert found.tags == {path: {CITYSCAPES.names.index("car")}}
    assert not found.faults


def test_cityscapes_has_no_background_to_supervise_weakly(tmp_path: Path) -> None:
    photo(tmp_path / "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png")
    as_csv(tmp_path, {"ulm_1": ["car"]})
    with pytest.raises(UserError, match="no class is called 'background'"):
        open_tagged(tmp_path, "val")


def test_background_is_found_wherever_it_stands() -> None:
    assert background_of(ClassTable(names=("cow", "background"), palette=colour_map(2))) == 1


# No control characters and no lone surrogates: neither stands in text files as it is.
PART = st.text(
    st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/"), min_size=1, max_size=8
).filter(lambda part: not part.startswith("."))
LAYOUT_PATHS = {
    "folder": "images/train/{}.jpg",
    "voc": "JPEGImages/{}.jpg",
    "cityscapes": "leftImg8bit/train/ulm/{}_leftImg8bit.png",
}


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(sorted(LAYOUT_PATHS)),
    write=st.sampled_from(WRITERS),
    tags=st.dictionaries(
        PART | st.sampled_from(['a,"b"', " c ", "'d'", 'e"', "ö;ü"]),
        st.sets(st.integers(1, 3)),
        min_size=1,
        max_size=5,
    ),
    by_name=st.booleans(),
)
def test_whatever_photos_are_called_their_tags_are_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    layout: str,
    write: Write,
    tags: dict[str, set[int]],
    by_name: bool,
) -> None:
    home = tmp_path_factory.mktemp("tags")
    paths = {name: LAYOUT_PATHS[layout].format(name) for name in tags}
    written = {
        (name if by_name else paths[name]): [NAMES[ident] for ident in sorted(ids)]
        for name, ids in tags.items()
    }
    classes = ClassTable(names=tuple(NAMES), palette=colour_map(4))
    photos = {home / path: name for name, path in paths.items()}
    found = read_tagging(write(home, written), home, classes, photos)
    assert found.tags == {home / paths[name]: ids for name, ids in tags.items()}
    assert not found.faults
