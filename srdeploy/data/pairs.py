"""What a layout finds on disk: photos with their masks, and what does not pair up."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from srdeploy.data.classes import ClassTable
from srdeploy.imaging import PHOTO_SUFFIXES
from srdeploy.validation import Settings

MASK_SUFFIXES = frozenset({".png", ".bmp", ".tif", ".tiff"})
"""Lossless formats: JPEG blurs class ids."""

NOT_AN_ID = -1
"""In a lookup: the raw value stands for nothing, so the mask is wrong."""

FaultKind = Literal[
    "photo without mask",
    "listed photo missing",
    "mask without photo",
    "two photos of one name",
    "unreadable photo",
    "unreadable mask",
    "sizes differ",
    "unknown id",
    "empty split",
    "unknown class",
    "photo without tags",
    "listed twice",
    "tag without pixels",
    "untagged class",
]


@dataclass(frozen=True)
class Item:
    """One photo with its mask."""

    name: str
    """Unique in its split; without suffix, with '/' where the photos lie in sub-folders."""
    image: Path
    label: Path
    """Its mask, or where one is looked for."""


class Fault(Settings):
    """Something in a data set that is wrong."""

    kind: FaultKind
    path: str
    """The file at fault."""
    detail: str
    """What was expected or found."""


@dataclass(frozen=True)
class Pairs:
    """The items of one split, sorted by name, and what did not pair up."""

    items: tuple[Item, ...]
    faults: tuple[Fault, ...]
    lookup: tuple[int, ...]
    """256 entries: the class id (or ignore index) that each raw mask value means, or NOT_AN_ID."""
    bare: tuple[Item, ...] = ()
    """Photos without a mask, sorted by name; each is among the faults too."""


def plain_lookup(classes: ClassTable) -> tuple[int, ...]:
    """The lookup of masks that carry class ids and the ignore index as they are."""
    known = {*range(len(classes.names)), classes.ignore_index}
    return tuple(value if value in known else NOT_AN_ID for value in range(256))


def photos_below(folder: Path) -> list[Path]:
    """Photos in `folder` and its sub-folders, sorted; hidden files are left out."""
    return _files_below(folder, PHOTO_SUFFIXES)


def masks_below(folder: Path) -> list[Path]:
    """Mask files in `folder` and its sub-folders, sorted; hidden files are left out."""
    return _files_below(folder, MASK_SUFFIXES)


def _files_below(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    return sorted(p for p in found if not p.name.startswith(".") and p.is_file())
