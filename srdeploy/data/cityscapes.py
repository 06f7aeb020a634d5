"""Cityscapes' layout: leftImg8bit/SPLIT/CITY/X_leftImg8bit.png with a mask in gtFine/SPLIT/CITY.

The ids of the original masks, X_gtFine_labelIds.png, are mapped to the 19 training ids; where a
split has none of those, X_gtFine_labelTrainIds.png, which Cityscapes' scripts make, are read as
they are.
"""

from pathlib import Path

from srdeploy.data.classes import (
    CITYSCAPES,
    CITYSCAPES_HIGHEST_LABEL_ID,
    CITYSCAPES_LABEL_IDS,
    ClassTable,
)
from srdeploy.data.pairs import NOT_AN_ID, Fault, Item, Pairs, plain_lookup

PHOTO_END = "_leftImg8bit.png"
LABEL_IDS_END = "_gtFine_labelIds.png"
TRAIN_IDS_END = "_gtFine_labelTrainIds.png"


def home(root: Path) -> Path | None:
    """`root` where it is laid out so, else None."""
    return root if (root / "leftImg8bit").is_dir() else None


def splits(root: Path) -> tuple[str, ...]:
    """The sub-folders of leftImg8bit, sorted."""
    return tuple(sorted(p.name for p in (root / "leftImg8bit").iterdir() if p.is_dir()))


def classes(root: Path) -> ClassTable:
    """The 19 classes; `root` is not looked at."""
    return CITYSCAPES


def pairs(root: Path, split: str) -> Pairs:
    """Photos with the masks of the same city and frame."""
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    original = any(labels.glob(f"*/*{LABEL_IDS_END}"))
    end = LABEL_IDS_END if original else TRAIN_IDS_END
    items: list[Item] = []
    bare: list[Item] = []
    faults: list[Fault] = []
    for photo in sorted(images.glob(f"*/*{PHOTO_END}")):
        name = photo.name.removesuffix(PHOTO_END)
        mask = labels / photo.parent.name / f"{name}{end}"
        if mask.is_file():
            items.append(Item(name, photo, mask))
        else:
            bare.append(Item(name, photo, mask))
            detail = f"a mask is looked for at {mask}"
            faults.append(Fault(kind="photo without mask", path=str(photo), detail=detail))
    for mask in sorted(labels.glob(f"*/*{end}")):
        photo = images / mask.parent.name / f"{mask.name.removesuffix(end)}{PHOTO_END}"
        if not photo.is_file():
            detail = f"a photo is looked for at {photo}"
            faults.append(Fault(kind="mask without photo", path=str(mask), detail=detail))
    for found in (items, bare):
        found.sort(key=lambda item: item.name)
    return Pairs(
        tuple(items),
        tuple(faults),
        label_ids_lookup() if original else plain_lookup(CITYSCAPES),
        tuple(bare),
    )


def all_photos(root: Path) -> dict[Path, str]:
    """Every photo of every split, with its name: city, sequence and frame."""
    found = sorted((root / "leftImg8bit").glob(f"*/*/*{PHOTO_END}"))
    return {photo: photo.name.removesuffix(PHOTO_END) for photo in found}


def label_ids_lookup() -> tuple[int, ...]:
    """Original id 0..33 (255 for -1) -> training id or the ignore index."""
    table = [NOT_AN_ID] * 256
    ignored = [*range(CITYSCAPES_HIGHEST_LABEL_ID + 1), 255]
    for ident in ignored:
        table[ident] = CITYSCAPES.ignore_index
    for train_id, ident in enumerate(CITYSCAPES_LABEL_IDS):
        table[ident] = train_id
    return tuple(table)
