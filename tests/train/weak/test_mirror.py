"""The data set of pseudo masks: the layout of the original, its raw values, and whole files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from srdeploy.data import open_dataset
from srdeploy.data.cityscapes import label_ids_lookup
from srdeploy.data.classes import CITYSCAPES, VOC, ClassTable, colour_map
from srdeploy.data.pairs import Item, plain_lookup
from srdeploy.errors import UserError
from srdeploy.spec import Spec
from srdeploy.train.weak.mirror import Mirror, raw_values


def spec_of(classes: ClassTable) -> Spec:
    return Spec(classes=classes.names, palette=classes.palette, ignore_index=classes.ignore_index)


def photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (10, 200, 30)).save(path)
    return path


MASK = np.array([[0, 1, 1, 255, 2, 2]] * 4, np.uint8)
SURE = np.array([[255, 200, 100, 0, 50, 60]] * 4, np.uint8)

PLACES = {
    "folder": ("images/train/x/a.png", "labels/train/x/a.png"),
    "voc": ("JPEGImages/a.jpg", "SegmentationClass/a.png"),
    "cityscapes": (
        "leftImg8bit/train/bonn/bonn_0_1_leftImg8bit.png",
        "gtFine/train/bonn/bonn_0_1_gtFine_labelIds.png",
    ),
}
TABLES = {
    "folder": ClassTable(names=("background", "cow", "dog"), palette=colour_map(3)),
    "voc": VOC,
    "cityscapes": CITYSCAPES,
}


@pytest.mark.parametrize("layout", PLACES)
def test_a_mirror_opens_as_a_data_set_with_the_masks_that_were_put_in(
    tmp_path: Path, layout: str
) -> None:
    origin, folder = tmp_path / "origin", tmp_path / "mirror"
    image, label = PLACES[layout]
    item = Item("a", photo(origin / image), origin / label)
    lookup = label_ids_lookup() if layout == "cityscapes" else plain_lookup(TABLES[layout])
    mirror = Mirror(folder, origin, layout)
    mirror.add_classes(TABLES[layout])
    mirror.add_pseudo(item, MASK, SURE, spec_of(TABLES[layout]), lookup)
    mirror.add_list("train", [item])
    found = open_dataset(folder, "train")
    assert found.layout == layout
    read_photo, labels = found.read(0)
    assert read_photo.shape == (4, 6, 3)
    assert (labels == MASK).all()
    assert (np.asarray(Image.open(folder / "confidence" / label)) == SURE).all()


def test_a_photo_is_shared_with_the_original_where_the_file_system_can(tmp_path: Path) -> None:
    item = Item("a", photo(tmp_path / "o/images/train/a.png"), tmp_path / "o/labels/train/a.png")
    mirror = Mirror(tmp_path / "m", tmp_path / "o", "folder")
    mirror.add_photo(item)
    assert mirror.photo(item).samefile(item.image)
    mirror.add_photo(item)  # again: nothing to do


def test_a_photo_is_copied_where_it_cannot_be_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refused)
    item = Item("a", photo(tmp_path / "o/images/train/a.png"), tmp_path / "o/labels/train/a.png")
    mirror = Mirror(tmp_path / "m", tmp_path / "o", "folder")
    mirror.add_photo(item)
    assert mirror.photo(item).read_bytes() == item.image.read_bytes()
    assert not mirror.photo(item).samefile(item.image)


def test_a_photo_outside_the_data_set_is_refused(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "m", tmp_path / "o", "folder")
    item = Item("a", photo(tmp_path / "elsewhere/a.png"), tmp_path / "o/labels/train/a.png")
    with pytest.raises(UserError, match=r"elsewhere/a\.png lies outside the data set"):
        mirror.add_photo(item)


@given(st.sampled_from([*range(19), 255]))
def test_raw_values_mean_the_label_that_they_are_written_for(label: int) -> None:
    lookup = label_ids_lookup()
    assert lookup[int(raw_values(spec_of(CITYSCAPES), lookup)[label])] == label
