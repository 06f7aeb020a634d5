"""The files that a layout finds on disk: photos with their masks, and files without a partner."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from srdeploy.data.classes import ClassTable
from srdeploy.errors import UserError
from srdeploy.imaging import PHOTO_SUFFIXES, Pixels
from srdeploy.validation import Settings, closest

MASK_SUFFIXES = frozenset({".png", ".bmp", ".tif", ".tiff"})
"""Lossless formats: JPEG blurs class ids."""

NOT_AN_ID = -1
"""The lookup entry of a raw value without a meaning: a mask that holds it is wrong."""

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


class PhotoSet(Protocol):
    """Photos of a split, with their labels or a substitute for labels."""

    @property
    def classes(self) -> ClassTable:
        """The class table of the labels."""

    @property
    def items(self) -> tuple[Item, ...]:
        """The photos, in their order."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Pixels, Pixels]:
        """Photo uint8 [H, W, 3] and labels uint8 [H, W] of one item. Raises UserError."""


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


# Split names

JOIN = "+"


def parts_of(root: Path, split: str, known: Sequence[str]) -> tuple[str, ...]:
    """The splits that the text `split` names, in its order; `known` are those of the data set.

    Raises UserError for a split that is not known, and for one that stands twice.
    """
    if split in known:
        return (split,)
    parts = tuple(split.split(JOIN))
    for place, part in enumerate(parts):
        if part not in known:
            hint = closest(part, known) if known else "it has none"
            joined = "" if len(parts) == 1 else f", which '{split}' names"
            raise UserError(f"{root} has no split '{part}'{joined}: {hint}")
        if part in parts[:place]:
            raise UserError(f"'{split}' names the split '{part}' twice: name it once")
    return parts


def read_parts(
    pairs: Callable[[Path, str], Pairs], home: Path, parts: Sequence[str]
) -> tuple[Pairs, ...]:
    """What each of the splits `parts` holds, as their layout's `pairs` finds it.

    Where two splits use one name for different photos, all names get their split's before them, as
    "extra/cow_1". Raises UserError where one photo is in two splits.
    """
    found = tuple(pairs(home, part) for part in parts)
    if len(parts) == 1:
        return found
    owners: dict[Path, str] = {}
    names: dict[str, str] = {}
    shared = False
    for part, one in zip(parts, found, strict=True):
        for item in (*one.items, *one.bare):
            owner = owners.setdefault(item.image.resolve(), part)
            if owner != part:
                raise UserError(
                    f"{item.image} is in both splits '{owner}' and '{part}', which are joined: "
                    "it would count twice, take it out of one"
                )
            shared = shared or names.setdefault(item.name, part) != part
    if not shared:
        return found
    return tuple(
        replace(one, items=_prefixed(part, one.items), bare=_prefixed(part, one.bare))
        for part, one in zip(parts, found, strict=True)
    )


def common_lookup(parts: Sequence[str], found: Sequence[Pairs]) -> tuple[int, ...]:
    """The lookup of all masks. Raises UserError where splits store class ids in different ways."""
    with_masks = [pair for pair in zip(parts, found, strict=True) if pair[1].items]
    if not with_masks:
        return found[0].lookup
    first, kept = with_masks[0]
    for part, one in with_masks[1:]:
        if one.lookup != kept.lookup:
            raise UserError(
                f"the masks of split '{part}' number the classes otherwise than those of "
                f"'{first}': such splits can't be joined"
            )
    return kept.lookup


def refuse_faults(faults: Sequence[Fault], root: Path, where: str) -> None:
    """Raises UserError with the first of `faults` and their number; passes where there are none.

    where: what they were found in, as "split 'train'".
    """
    if faults:
        raise UserError(
            f"{faults[0].kind}: {faults[0].path}: {faults[0].detail}; {len(faults)} such in "
            f"{where}, listed by: srdeploy data check {root}"
        )


def _prefixed(part: str, items: tuple[Item, ...]) -> tuple[Item, ...]:
    return tuple(replace(item, name=f"{part}/{item.name}") for item in items)
