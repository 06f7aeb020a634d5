"""PASCAL VOC 2012's layout: JPEGImages, SegmentationClass, ImageSets/Segmentation/SPLIT.txt.

A mask is taken from SegmentationClass, or where it has none from SegmentationClassAug (the masks of
SBD, Hariharan et al., ICCV 2011, with which train_aug is made). A classes.json in the folder
replaces VOC's 21 classes, for other data sets that keep the layout.
"""

from pathlib import Path

from srdeploy.data.classes import CLASSES_FILE, VOC, ClassTable, read_class_table
from srdeploy.data.pairs import Fault, Item, Pairs, plain_lookup
from srdeploy.errors import UserError
from srdeploy.files import read_text

MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")


def home(root: Path) -> Path | None:
    """The folder with JPEGImages: `root`, or VOC2012 or VOCdevkit/VOC2012 below it; else None."""
    candidates = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    return next((c for c in candidates if (c / "JPEGImages").is_dir()), None)


def splits(root: Path) -> tuple[str, ...]:
    """The lists in ImageSets/Segmentation, sorted."""
    return tuple(sorted(p.stem for p in (root / "ImageSets" / "Segmentation").glob("*.txt")))


def classes(root: Path) -> ClassTable:
    """The table in classes.json where there is one, else VOC's."""
    own = root / CLASSES_FILE
    return read_class_table(own) if own.exists() else VOC


def pairs(root: Path, split: str) -> Pairs:
    """The photos that the split's list names, with their masks. Raises UserError for a bad line."""
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    items: list[Item] = []
    bare: list[Item] = []
    faults: list[Fault] = []
    for number, line in enumerate(read_text(listed).splitlines(), start=1):
        if not line.strip():
            continue
        item = _item(root, line.split(), f"{listed} line {number}")
        if not item.image.is_file():
            detail = f"{listed} names it in line {number}"
            faults.append(Fault(kind="listed photo missing", path=str(item.image), detail=detail))
        elif not item.label.is_file():
            bare.append(item)
            detail = f"no {item.name}.png in {' or '.join(MASK_FOLDERS)}"
            faults.append(Fault(kind="photo without mask", path=str(item.image), detail=detail))
        else:
            items.append(item)
    return Pairs(
        tuple(sorted(items, key=lambda item: item.name)),
        tuple(faults),
        plain_lookup(classes(root)),
        tuple(sorted(bare, key=lambda item: item.name)),
    )


def all_photos(root: Path) -> dict[Path, str]:
    """Every photo in JPEGImages, whether a list names it or not, with its name in the lists."""
    return {photo: photo.stem for photo in sorted((root / "JPEGImages").glob("*.jpg"))}


def _item(root: Path, fields: list[str], where: str) -> Item:
    if (
        len(fields) == 2
    ):  # some lists name both files, as /JPEGImages/X.jpg /SegmentationClassAug/X.png
        image, label = (root / field.lstrip("/") for field in fields)
        return Item(image.stem, image, label)
    if len(fields) > 2:
        raise UserError(
            f"{where}: one image id, or a photo and its mask, are expected: {' '.join(fields)[:60]}"
        )
    name = fields[0]
    masks = [root / folder / f"{name}.png" for folder in MASK_FOLDERS]
    mask = next((m for m in masks if m.is_file()), masks[0])
    return Item(name, root / "JPEGImages" / f"{name}.jpg", mask)
