"""Confidence of masks: where it lies, how it is read, and what is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srdeploy.data import DataSet, open_dataset
from srdeploy.data.confidence import require_confidence
from srdeploy.errors import UserError

SIZE = (32, 40)
"""(height, width) of every photo."""
MASKS = {
    "folder": ("images/train/{}.jpg", "labels/train/{}.png"),
    "voc": ("JPEGImages/{}.jpg", "SegmentationClassAug/{}.png"),
    "cityscapes": (
        "leftImg8bit/train/ulm/{}_leftImg8bit.png",
        "gtFine/train/ulm/{}_gtFine_labelIds.png",
    ),
}


def data_set(root: Path, layout: str = "folder", names: str = "a b sub/c") -> Path:
    """Masks of class 7 with photos, in split train."""
    for name in names.replace("/", "_" if layout != "folder" else "/").split():
        photo, mask = (root / part.format(name) for part in MASKS[layout])
        for path in (photo, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(photo)
        Image.new("L", SIZE[::-1], 7).save(mask)
    if layout == "voc":
        lists = root / "ImageSets/Segmentation"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("\n".join(names.replace("/", "_").split()))
    table = {"names": [f"class {index}" for index in range(8)]}
    (root / "classes.json").write_text(json.dumps(table))
    return root


def grays(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, SIZE, dtype=np.uint8)


def file_of(data: DataSet, index: int) -> Path:
    """Written out from the documented rule."""
    path = data.root / "confidence" / data.items[index].label.relative_to(data.root)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize("layout", MASKS)
def test_confidence_mirrors_the_masks_paths_in_every_layout(tmp_path: Path, layout: str) -> None:
    data = open_dataset(data_set(tmp_path, layout), "train", layout)
    assert len(data) == 3
    for index in range(3):
        Image.fromarray(grays(index)).save(file_of(data, index))
    require_confidence(data.root, data.items)
    for index in range(3):
        found = data.confidence(index)
        assert found.dtype == np.uint8
        assert np.array_equal(found, grays(index))
        assert set(np.unique(data.read(index)[1])) <= {0, 7}, "labels are read as before"


def test_confidence_is_a_png_whatever_the_masks_format(tmp_path: Path) -> None:
    root = data_set(tmp_path, names="a")
    mask = root / "labels/train/a.png"
    with Image.open(mask) as file:
        file.save(mask.with_suffix(".tif"))
    mask.unlink()
    data = open_dataset(root, "train")
    path = file_of(data, 0).with_suffix(".png")
    Image.fromarray(grays(0)).save(path)
    assert np.array_equal(data.confidence(0), grays(0))


@pytest.mark.parametrize(("bits", "steps"), [(1, 255), (2, 85), (4, 17)])
def test_grays_that_an_optimiser_packed_are_the_same_grays(
    tmp_path: Path, bits: int, steps: int
) -> None:
    data = open_dataset(data_set(tmp_path, names="a"), "train")
    values = grays(0) // steps * np.uint8(steps)
    image = Image.fromarray(values)
    if bits == 1:
        image = Image.fromarray(values == 255)
    image.save(file_of(data, 0), bits=bits)
    assert np.array_equal(data.confidence(0), values)


@pytest.mark.parametrize(
    ("mode", "format", "size", "message"),
    [
        ("RGB", "PNG", (40, 32), r"b\.png: a confidence map is an 8-bit gray PNG, .* is PNG, RGB"),
        ("P", "PNG", (40, 32), r"b\.png: .* is PNG, P"),
        ("LA", "PNG", (40, 32), r"b\.png: .* is PNG, LA"),
        ("I;16", "PNG", (40, 32), r"b\.png: .* is PNG, I"),
        ("L", "JPEG", (40, 32), r"b\.png: .* is JPEG, L"),
        ("L", "PNG", (40, 30), r"b\.png: the map is 40x30, its photo and mask 40x32 \(width"),
        ("L", "PNG", (32, 40), r"b\.png: the map is 32x40, its photo and mask 40x32 \(width"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, mode: str, format: str, size: tuple[int, int], message: str
) -> None:
    data = open_dataset(data_set(tmp_path, names="a b"), "train")
    Image.new(mode, size).save(file_of(data, 1), format)
    with pytest.raises(UserError, match=f"confidence/labels/train/{message}") as caught:
        data.confidence(1)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    data = open_dataset(data_set(tmp_path, names="a"), "train")
    with pytest.raises(UserError, match=r"no such file: .*confidence/labels/train/a\.png"):
        data.confidence(0)
    file_of(data, 0).write_bytes(b"\x89PNG nothing")
    with pytest.raises(UserError, match=r"a\.png: not a readable confidence map"):
        data.confidence(0)


def test_the_first_mask_without_confidence_is_named_and_all_are_counted(tmp_path: Path) -> None:
    data = open_dataset(data_set(tmp_path), "train")
    Image.fromarray(grays(0)).save(file_of(data, 0))
    with pytest.raises(
        UserError, match=r"no such file: .*confidence/labels/train/b\.png; 2 of 3 masks have no"
    ) as caught:
        require_confidence(data.root, data.items)
    assert "\n" not in str(caught.value)
