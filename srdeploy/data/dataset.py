"""Opening a data set: which layout, which split, and reading photo and labels of one item."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from srdeploy.data import cityscapes, folder, voc
from srdeploy.data.classes import ClassTable
from srdeploy.data.confidence import read_confidence
from srdeploy.data.pairs import (
    NOT_AN_ID,
    Item,
    Pairs,
    PhotoSet,
    common_lookup,
    parts_of,
    read_parts,
    refuse_faults,
)
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, photo_size, read_labels, read_photo, scaled_size
from srdeploy.spec import IMAGENET_MEAN, IMAGENET_STD, InputPolicy, Spec
from srdeploy.validation import closest

SIZE_STEP = 32
"""`largest` is rounded up to a multiple of this, the deepest stride of usual networks."""


@dataclass(frozen=True)
class Layout:
    """How one kind of folder is read."""

    home: Callable[[Path], Path | None]
    """The folder below the given one where the data lie, or None where it is laid out otherwise."""
    splits: Callable[[Path], tuple[str, ...]]
    classes: Callable[[Path], ClassTable]
    pairs: Callable[[Path, str], Pairs]
    photos: Callable[[Path], dict[Path, str]]
    """Every photo of the data set, with its name."""
    signs: str
    """The required content of the folder, for messages."""


LAYOUTS: dict[str, Layout] = {
    "folder": Layout(
        folder.home, folder.splits, folder.classes, folder.pairs, folder.all_photos, "images/SPLIT"
    ),
    "voc": Layout(voc.home, voc.splits, voc.classes, voc.pairs, voc.all_photos, "JPEGImages"),
    "cityscapes": Layout(
        cityscapes.home,
        cityscapes.splits,
        cityscapes.classes,
        cityscapes.pairs,
        cityscapes.all_photos,
        "leftImg8bit",
    ),
}


@dataclass(frozen=True)
class DataSet:
    """One split of a data set: photos with their masks."""

    root: Path
    split: str
    """The requested split: one name, or several joined by '+'."""
    layout: str
    """"folder", "voc" or "cityscapes"."""
    classes: ClassTable
    items: tuple[Item, ...]
    lookup: tuple[int, ...] = field(repr=False)
    """256 entries: raw mask value -> class id or ignore index, or -1 where it means nothing."""

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> tuple[Pixels, Pixels]:
        """Photo uint8 [H, W, 3] in RGB and labels uint8 [H, W] of one item.

        Labels are class ids; classes that are not scored are read as the ignore index.
        Raises UserError naming the file: unreadable, sizes that differ, an id that means nothing.
        """
        item = self.items[index]
        photo, raw = read_photo(item.image), read_labels(item.label)
        if photo.shape[:2] != raw.shape:
            raise UserError(size_fault(item, (photo.shape[0], photo.shape[1]), raw))
        return photo, self._labels(item, raw)

    def mask(self, index: int) -> Pixels:
        """The labels that `read` gives, uint8 [H, W]; of the photo only the header is read.

        Raises UserError as `read` does.
        """
        item = self.items[index]
        size, raw = photo_size(item.image), read_labels(item.label)
        if size != raw.shape:
            raise UserError(size_fault(item, size, raw))
        return self._labels(item, raw)

    def _labels(self, item: Item, raw: Pixels) -> Pixels:
        labels = self._table[raw]
        if (labels == NOT_AN_ID).any():
            raise UserError(id_fault(item, raw, self.lookup))
        return labels.astype(np.uint8)

    def confidence(self, index: int) -> Pixels:
        """How sure the mask of one item is, uint8 [H, W]: 255 is certain, 0 counts for nothing.

        Raises UserError naming the file in confidence/: absent, no 8-bit gray PNG, another size.
        """
        return read_confidence(self.root, self.items[index])

    @cached_property
    def _table(self) -> np.ndarray[tuple[int], np.dtype[np.int16]]:
        table = np.asarray(self.lookup, np.int16)
        if self.classes.scored is not None:
            kept = [*self.classes.scored, NOT_AN_ID]
            table = np.where(np.isin(table, kept), table, self.classes.ignore_index)
        return table.astype(np.int16)


def size_fault(item: Item, photo: tuple[int, int], raw: Pixels) -> str:
    """The message for a photo, of size (height, width), whose mask has another size."""
    return (
        f"{item.label}: the mask is {raw.shape[1]}x{raw.shape[0]}, its photo "
        f"{photo[1]}x{photo[0]} (width x height): they must be equal"
    )


def id_fault(item: Item, raw: Pixels, lookup: tuple[int, ...]) -> str:
    """The message for a mask that holds values without a meaning."""
    present = np.flatnonzero(np.bincount(raw.ravel(), minlength=256))
    bad = [int(value) for value in present if lookup[value] == NOT_AN_ID]
    known = [value for value in range(256) if lookup[value] != NOT_AN_ID]
    shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    return (
        f"{item.label}: pixels with id {shown}, which is neither a class nor the ignored label "
        f"(ids are {_ranges(known)})"
    )


def open_dataset(root: Path, split: str, layout: str = "auto") -> DataSet:
    """Finds the photos and masks of one split; reads no pixels.

    `split` may be several that '+' joins, "train+extra": their items one after the other; a split
    of that very name wins. `layout` is "folder", "voc" or "cityscapes"; "auto" goes by the
    sub-folders that exist.
    Raises UserError: no such folder, unknown layout or split, an empty split, photos without masks,
    the same split or photo twice.
    """
    name, home = find_layout(Path(root), layout)
    found = LAYOUTS[name]
    parts = parts_of(root, split, found.splits(home))
    classes = found.classes(home)
    pairs = read_parts(found.pairs, home, parts)
    faults = [f for one in pairs for f in one.faults if f.kind != "mask without photo"]
    refuse_faults(faults, root, f"split '{split}'")
    for part, one in zip(parts, pairs, strict=True):
        if not one.items:
            raise UserError(f"split '{part}' of {root} is empty: no photos found")
    items = tuple(item for one in pairs for item in one.items)
    return DataSet(home, split, name, classes, items, common_lookup(parts, pairs))


def splits_of(root: Path, layout: str = "auto") -> tuple[str, ...]:
    """The names of the splits, sorted. Raises UserError where `root` is not a data set."""
    name, home = find_layout(Path(root), layout)
    return LAYOUTS[name].splits(home)


def find_layout(root: Path, layout: str) -> tuple[str, Path]:
    """(layout's name, folder where it starts). Raises UserError naming what was looked for."""
    if layout != "auto" and layout not in LAYOUTS:
        raise UserError(f"unknown layout '{layout}': {closest(layout, ['auto', *LAYOUTS])}")
    if not root.is_dir():
        raise UserError(f"no such data folder: {root}")
    for name in LAYOUTS if layout == "auto" else [layout]:
        home = LAYOUTS[name].home(root)
        if home is not None:
            return name, home
    if layout == "auto":
        signs = ", ".join(f"{entry.signs} ({name})" for name, entry in LAYOUTS.items())
        raise UserError(f"{root} is not a data set: it has none of {signs}")
    raise UserError(f"{root} is not laid out as '{layout}': it has no {LAYOUTS[layout].signs}")


def spec_for(
    dataset: PhotoSet,
    input: InputPolicy | None = None,
    *,
    longest_side: int | None = None,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    colour_order: Literal["RGB", "BGR"] = "RGB",
) -> Spec:
    """The spec of networks trained on `dataset`.

    Without an `input` policy the sizes are measured from the photos' headers: `usual` is the most
    frequent one, `largest` the largest height and width, rounded up to a multiple of 32;
    `longest_side` is the policy's. Raises UserError where a photo is too small for any network.
    """
    if input is None:
        input = measured_policy(dataset, longest_side)
    elif longest_side is not None:
        raise UserError("longest_side is part of the input policy: give one or the other")
    return Spec(
        classes=dataset.classes.names,
        palette=dataset.classes.palette,
        ignore_index=dataset.classes.ignore_index,
        void_colour=dataset.classes.void_colour,
        scored=dataset.classes.scored,
        mean=mean,
        std=std,
        colour_order=colour_order,
        input=input,
    )


def measured_policy(dataset: PhotoSet, longest_side: int | None = None) -> InputPolicy:
    """The input policy that fits the photos; reads their headers only. Raises UserError."""
    policy = InputPolicy(longest_side=longest_side)
    counts: Counter[tuple[int, int]] = Counter()
    for item in dataset.items:
        height, width = photo_size(item.image)
        size = scaled_size(height, width, longest_side)
        if size[0] < policy.smallest[0] or size[1] < policy.smallest[1]:
            raise UserError(
                f"{item.image}: {width}x{height} is too small: networks need at least "
                f"{policy.smallest[1]}x{policy.smallest[0]} (width x height)"
            )
        counts[size] += 1
    usual = max(counts, key=lambda size: (counts[size], size))
    largest = tuple(
        -(-max(size[axis] for size in counts) // SIZE_STEP) * SIZE_STEP for axis in (0, 1)
    )
    return InputPolicy(longest_side=longest_side, usual=usual, largest=(largest[0], largest[1]))


def _ranges(values: list[int]) -> str:
    """[0, 1, 2, 255] as '0..2, 255'."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(values) + 1):
        if end == len(values) or values[end] != values[end - 1] + 1:
            first, last = values[start], values[end - 1]
            parts.append(str(first) if first == last else f"{first}..{last}")
            start = end
    return ", ".join(parts)
