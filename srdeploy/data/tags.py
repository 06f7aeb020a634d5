"""Photos with image-level labels (tags): which classes each shows, for weak supervision."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np

from srdeploy import console
from srdeploy.data.classes import ClassTable
from srdeploy.data.dataset import LAYOUTS, DataSet, find_layout
from srdeploy.data.pairs import Item
from srdeploy.data.splits import common_lookup, parts_of, read_parts, refuse_faults
from srdeploy.data.tag_file import CSV_FILE, HEADER, JSON_FILE, find_tag_file
from srdeploy.data.tagging import BACKGROUND, read_tagging
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, read_photo

Tags = tuple[frozenset[int], ...]
"""Class ids of each item."""

READERS = 8
"""Most threads that read masks: decoding leaves Python's lock, more would wait for the disk."""


@dataclass(frozen=True)
class TaggedSet:
    """One split of a data set: photos with the classes that each shows."""

    root: Path
    split: str
    """As it was asked for: one name, or several that '+' joins."""
    layout: str
    """"folder", "voc" or "cityscapes"."""
    classes: ClassTable
    items: tuple[Item, ...]
    """By name within each split; the mask of an item need not exist."""
    tags: Tags
    """Of each item: scored classes only, without background."""
    background: int
    """The id of the class that what is no object belongs to."""
    source: Literal["file", "masks"]
    """Where the tags are from."""
    lookup: tuple[int, ...] = field(repr=False)
    """256 entries, as in DataSet: raw mask value -> class id, ignore index or -1."""

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> tuple[Pixels, Pixels]:
        """Photo uint8 [H, W, 3] in RGB and labels uint8 [H, W] that are all `background`.

        The labels stand in for a mask, so that what reads and augments photos with masks serves
        here too. Raises UserError where the photo can't be read.
        """
        photo = read_photo(self.items[index].image)
        return photo, np.full(photo.shape[:2], self.background, np.uint8)

    @cached_property
    def has_masks(self) -> bool:
        """Whether every item has a true mask too, so that pseudo masks can be scored."""
        return all(item.label.is_file() for item in self.items)

    def mask(self, index: int) -> Pixels:
        """The true labels uint8 [H, W] of one item; classes that are not scored are ignored.

        Raises UserError where the item has no mask, or a wrong one.
        """
        item = self.items[index]
        if not item.label.is_file():
            raise UserError(f"{item.image} has no mask: it is looked for at {item.label}")
        return self._masked.mask(index)

    @property
    def foreground(self) -> tuple[int, ...]:
        """Ids of the classes that are tagged: scored, without background, ascending."""
        return tuple(i for i in sorted(_scored(self.classes)) if i != self.background)

    @cached_property
    def _masked(self) -> DataSet:
        return DataSet(self.root, self.split, self.layout, self.classes, self.items, self.lookup)


def open_tagged(
    root: Path, split: str, layout: str = "auto", from_masks: bool = False
) -> TaggedSet:
    """Finds the photos of one split, with masks or without, and the classes that each shows.

    `split` may be several that '+' joins, as in `open_dataset`. Tags are read from labels.csv or
    labels.json in the data set's folder (see tag_file); with `from_masks` they are the classes that
    the masks show. Tags of classes that are not scored are dropped.
    Raises UserError: no such folder, layout or split, no background class, no tags file, or one
    with faults or that does not name every photo; with `from_masks`, photos without or with wrong
    masks.
    """
    name, home = find_layout(Path(root), layout)
    found = LAYOUTS[name]
    parts = parts_of(root, split, found.splits(home))
    classes = found.classes(home)
    background = background_of(classes)
    pairs = read_parts(found.pairs, home, parts)
    passed = {"mask without photo"} if from_masks else {"mask without photo", "photo without mask"}
    faults = [f for one in pairs for f in one.faults if f.kind not in passed]
    refuse_faults(faults, root, f"split '{split}'")
    items: list[Item] = []
    for part, one in zip(parts, pairs, strict=True):
        if not one.items and not one.bare:
            raise UserError(f"split '{part}' of {root} is empty: no photos found")
        items += sorted((*one.items, *one.bare), key=lambda item: item.name)
    masked = DataSet(home, split, name, classes, tuple(items), common_lookup(parts, pairs))
    if from_masks:
        shown = _tags_from_masks(masked)
    else:
        shown = _tags_from_file(masked, root, found.photos(home))
    kept = frozenset(_scored(classes)) - {background}
    return TaggedSet(
        root=home,
        split=split,
        layout=name,
        classes=classes,
        items=masked.items,
        tags=tuple(classes_of & kept for classes_of in shown),
        background=background,
        source="masks" if from_masks else "file",
        lookup=masked.lookup,
    )


def has_all_masks(root: Path, split: str, layout: str = "auto") -> bool:
    """Whether every photo of a split, or of several that '+' joins, has a mask. Raises
    UserError."""
    name, home = find_layout(Path(root), layout)
    found = LAYOUTS[name]
    parts = parts_of(root, split, found.splits(home))
    return not any(one.bare for one in read_parts(found.pairs, home, parts))


def background_of(classes: ClassTable) -> int:
    """The id of the class "background". Raises UserError where it is absent or not scored."""
    if BACKGROUND not in classes.names:
        raise UserError(
            f"no class is called '{BACKGROUND}' (the classes are {', '.join(classes.names)}): weak "
            "supervision needs it, for what is no object belongs to it"
        )
    ident = classes.names.index(BACKGROUND)
    if ident not in _scored(classes):
        raise UserError(
            f"the class '{BACKGROUND}' is not scored: weak supervision trains it, put {ident} into "
            "'scored' of the class table"
        )
    return ident


def _scored(classes: ClassTable) -> tuple[int, ...]:
    return tuple(range(len(classes.names))) if classes.scored is None else classes.scored


def _tags_from_masks(dataset: DataSet) -> Tags:
    with ThreadPoolExecutor(min(READERS, len(os.sched_getaffinity(0)))) as pool:
        shown = pool.map(partial(_classes_in, dataset), range(len(dataset)))
        return tuple(console.track(shown, "tags from masks", total=len(dataset)))


def _classes_in(dataset: DataSet, index: int) -> frozenset[int]:
    counts = np.bincount(dataset.mask(index).ravel())
    return frozenset(np.flatnonzero(counts).tolist())


def _tags_from_file(dataset: DataSet, root: Path, photos: dict[Path, str]) -> Tags:
    file = find_tag_file(dataset.root)
    if file is None:
        raise UserError(
            f"no tags: {dataset.root / CSV_FILE} (or {JSON_FILE}) is looked for, with the header "
            f"'{','.join(HEADER)}' and lines such as 'cow_1.jpg,cow;person'; --labels-from-masks "
            "takes the tags from the masks"
        )
    # Lists of VOC may name photos that lie elsewhere.
    known = {item.image: item.name for item in dataset.items} | photos
    tagging = read_tagging(file, dataset.root, dataset.classes, known)
    # What the file names besides does no harm here; `data check` lists it.
    refuse_faults([f for f in tagging.faults if f.kind != "listed photo missing"], root, file.name)
    absent = [tagging.untagged(item) for item in dataset.items if item.image not in tagging.tags]
    refuse_faults(absent, root, f"split '{dataset.split}'")
    return tuple(tagging.tags[item.image] for item in dataset.items)
