"""Opening a data set of which the classes in each photo are known, and not where they are."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from srdeploy import console
from srdeploy.data.classes import ClassTable
from srdeploy.data.dataset import LAYOUTS, DataSet, find_layout, join_splits, split_parts
from srdeploy.data.pairs import Item
from srdeploy.data.tag_file import (
    BACKGROUND,
    CSV,
    Entry,
    Photos,
    class_ids,
    find_tag_file,
    read_tag_file,
)
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, read_photo

READERS = 4
"""Threads that read masks for the tags in them."""


@dataclass(frozen=True)
class TaggedSet:
    """One split of a data set: photos with the classes that each shows."""

    root: Path
    split: str
    layout: str
    classes: ClassTable
    items: tuple[Item, ...]
    """Their masks need not exist."""
    tags: tuple[frozenset[int], ...]
    """Class ids of each item; without the background and classes that are not scored."""
    background: int
    """The class of whatever is none of the others."""
    source: Literal["file", "masks"]
    """What says so."""
    lookup: tuple[int, ...] = field(repr=False)
    """What raw values of the masks mean, as of `DataSet`."""

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> tuple[Pixels, Pixels]:
        """The photo, uint8 [H, W, 3], and labels uint8 [H, W] that are background everywhere: a
        stand-in, for what reads and varies photos with their masks. Raises UserError."""
        photo = read_photo(self.items[index].image)
        return photo, np.full(photo.shape[:2], self.background, np.uint8)

    @property
    def foreground(self) -> tuple[int, ...]:
        """The classes that tags can name, ascending."""
        return foreground_of(self.classes, self.background)

    @property
    def has_masks(self) -> bool:
        """Whether every photo has a true mask, which pseudo masks can be held against."""
        return all(item.label.is_file() for item in self.items)

    def mask(self, index: int) -> Pixels:
        """The true labels of one item, uint8 [H, W], as `DataSet.read` gives them. Raises
        UserError."""
        return self._with_masks().read(index)[1]

    def _with_masks(self) -> DataSet:
        return DataSet(self.root, self.split, self.layout, self.classes, self.items, self.lookup)


def background_of(classes: ClassTable) -> int:
    """The id of the class called "background". Raises UserError where there is none."""
    if BACKGROUND not in classes.names:
        raise UserError(
            f"image tags need a class called '{BACKGROUND}', which is whatever shows none of the "
            f"others; the classes are {', '.join(classes.names)}"
        )
    return classes.names.index(BACKGROUND)


def foreground_of(classes: ClassTable, background: int) -> tuple[int, ...]:
    """The scored classes but for the background, ascending."""
    scored = range(len(classes.names)) if classes.scored is None else classes.scored
    return tuple(sorted(set(scored) - {background}))


def has_all_masks(root: Path, split: str, layout: str = "auto") -> bool:
    """Whether every photo of the split has a mask. Raises UserError for an unknown split."""
    name, home = find_layout(Path(root), layout)
    found = LAYOUTS[name]
    parts = split_parts(root, split, found.splits(home))
    return not any(found.pairs(home, part).bare for part in parts)


def open_tagged(
    root: Path, split: str, layout: str = "auto", from_masks: bool = False
) -> TaggedSet:
    """Opens a split with its tags: from labels.csv or labels.json beside the photos, or, with
    `from_masks`, from what each mask shows.

    Photos with and without a mask belong to it. Raises UserError: no such split, no tags file, a
    photo without tags, an unknown class, no class called "background".
    """
    name, home = find_layout(Path(root), layout)
    found = LAYOUTS[name]
    classes = found.classes(home)
    background = background_of(classes)
    items, lookup = join_splits(found, home, root, split, with_bare=not from_masks)
    opened = TaggedSet(
        root=home,
        split=split,
        layout=name,
        classes=classes,
        items=items,
        tags=(),
        background=background,
        source="masks" if from_masks else "file",
        lookup=lookup,
    )
    tags = _of_masks(opened) if from_masks else _of_file(opened)
    wanted = frozenset(opened.foreground)
    return TaggedSet(**vars(opened) | {"tags": tuple(one & wanted for one in tags)})


def _of_masks(opened: TaggedSet) -> list[frozenset[int]]:
    masks = opened._with_masks()

    def shown(index: int) -> frozenset[int]:
        return frozenset(np.unique(masks.read(index)[1]).tolist())

    with ThreadPoolExecutor(READERS, thread_name_prefix="tags") as pool:
        found = pool.map(shown, range(len(masks)))
        text = f"tags of {opened.split} from its masks"
        return list(console.track(found, text, total=len(masks)))


def _of_file(opened: TaggedSet) -> list[frozenset[int]]:
    path = find_tag_file(opened.root)
    if path is None:
        raise UserError(
            f"no tags: {opened.root / CSV} is looked for, with the header 'image,classes' and "
            "lines such as 'cow_1.jpg,cow;person'; --labels-from-masks takes tags from masks"
        )
    matched = match(read_tag_file(path), opened.items, opened.root)
    untagged = [item.image for item, entry in zip(opened.items, matched, strict=True) if not entry]
    if untagged:
        raise UserError(
            f"{path}: {len(untagged)} photos of split '{opened.split}' are not in it, such as "
            f"{untagged[0]} (a photo that shows none of the classes has an empty list of them)"
        )
    return [class_ids(entry, opened.classes) for entry in matched if entry is not None]


def match(entries: Sequence[Entry], items: Sequence[Item], home: Path) -> list[Entry | None]:
    """The entry of each item; entries of other photos are left out. Raises UserError where an item
    has two."""
    photos = Photos(items, home)
    found: list[Entry | None] = [None] * len(items)
    for entry in entries:
        index = photos.find(entry)
        if index is None:
            continue
        before = found[index]
        if before is not None:
            raise UserError(
                f"{entry.where}: {items[index].image} is tagged already ({before.where})"
            )
        found[index] = entry
    return found
