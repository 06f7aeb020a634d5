"""Checking a data set before training time is spent on it: pairs, files, sizes, ids, classes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from srdeploy import console
from srdeploy.data.check_tags import TagCheck
from srdeploy.data.classes import ClassTable
from srdeploy.data.dataset import LAYOUTS, find_layout, id_fault, size_fault
from srdeploy.data.pairs import NOT_AN_ID, Fault, FaultKind, Item, Pairs
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, UnreadableImageError, read_labels, read_photo
from srdeploy.validation import Settings, closest

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_FAULTS = 20
"""Faults listed for people; the report holds all."""


class SplitReport(Settings):
    """What one split holds. Distributions are over readable masks."""

    images: int
    """Photos that have a mask."""
    sizes: dict[str, int]
    """How many photos of each size, "WIDTHxHEIGHT", the most frequent first."""
    labels: Literal["masks", "tags"] = "masks"
    """What says which classes its photos show."""
    pixels: dict[str, float | None]
    """Share of all pixels in 0..1 per class, scored or not, and "(ignored)"; None for tags."""
    images_with: dict[str, int]
    """How many images hold the class."""


class CheckReport(Settings):
    """The outcome of a check: all well where `faults` is empty."""

    root: str
    layout: str
    classes: ClassTable
    splits: dict[str, SplitReport]
    faults: tuple[Fault, ...]

    @property
    def passed(self) -> bool:
        """Whether no fault was found."""
        return not self.faults

    def fault_counts(self) -> dict[FaultKind, int]:
        """How many faults of each kind, the most frequent first."""
        return dict(Counter(fault.kind for fault in self.faults).most_common())


IGNORED = "(ignored)"
"""Row of the ignored pixels; no class can be called so in a table of ours."""


def check_dataset(
    root: Path, splits: Sequence[str] | None = None, layout: str = "auto"
) -> CheckReport:
    """Decodes every photo and mask of `splits` (None: all) and reports what is wrong.

    Raises UserError where the folder can't be used: it is absent, has no class table or no split.
    """
    name, home = find_layout(Path(root), layout)
    found = LAYOUTS[name]
    known = found.splits(home)
    if not known:
        raise UserError(f"{root} has no splits: sub-folders of {found.signs} or lists are expected")
    for split in splits or ():
        if split not in known:
            raise UserError(f"{root} has no split '{split}': {closest(split, known)}")
    classes = found.classes(home)
    every = {split: found.pairs(home, split) for split in known}
    tags = TagCheck(home, classes, every)
    reports: dict[str, SplitReport] = {}
    faults: list[Fault] = [*tags.faults]
    for split in splits or known:
        pairs = every[split]
        if tags.alone(split):
            faults.extend(f for f in pairs.faults if f.kind != "photo without mask")
            reports[split] = _check_tagged(split, pairs, tags, classes, faults)
            continue
        faults.extend(pairs.faults)
        if not pairs.items:
            detail = "no photo with a mask was found"
            faults.append(Fault(kind="empty split", path=f"{home} ({split})", detail=detail))
        tally = _Tally(classes, pairs.lookup)
        for item in console.track(pairs.items, f"checking {split}", total=len(pairs.items)):
            faults.extend(tally.add(item))
            faults.extend(tags.compare(item, tally.shown))
        reports[split] = tally.report(len(pairs.items))
    return CheckReport(
        root=str(root), layout=name, classes=classes, splits=reports, faults=tuple(faults)
    )


def _check_tagged(
    split: str, pairs: Pairs, tags: TagCheck, classes: ClassTable, faults: list[Fault]
) -> SplitReport:
    """Decodes the photos of a split without masks; adds to `faults`."""
    tally = _Tally(classes, pairs.lookup)
    for item in console.track(pairs.bare, f"checking {split}", total=len(pairs.bare)):
        faults.extend(tally.add_tagged(item, tags.shown(item)))
    faults.extend(tags.untagged(split))
    return tally.report(len(pairs.bare), tagged=True)


class _Tally:
    """Counts of one split, as its items are read."""

    def __init__(self, classes: ClassTable, lookup: tuple[int, ...]) -> None:
        self._classes = classes
        self._lookup = np.asarray(lookup, np.int16)
        self._pixels = np.zeros(256, np.int64)
        self._images_with = np.zeros(256, np.int64)
        self._sizes: Counter[str] = Counter()
        self.shown: frozenset[int] = frozenset()
        """The labels in the mask that was read last; empty where it could not be."""

    def add_tagged(self, item: Item, tags: frozenset[int]) -> list[Fault]:
        """Reads a photo without a mask, and counts what its tags say."""
        for index in tags:
            self._images_with[index] += 1
        try:
            photo = read_photo(item.image)
        except UnreadableImageError as error:
            return [_fault("unreadable photo", item.image, error)]
        self._sizes[f"{photo.shape[1]}x{photo.shape[0]}"] += 1
        return []

    def add(self, item: Item) -> list[Fault]:
        """Reads one item, counts it, and returns what is wrong with it."""
        faults: list[Fault] = []
        photo = raw = None
        self.shown = frozenset()
        try:
            photo = read_photo(item.image)
            self._sizes[f"{photo.shape[1]}x{photo.shape[0]}"] += 1
        except UnreadableImageError as error:
            faults.append(_fault("unreadable photo", item.image, error))
        try:
            raw = read_labels(item.label)
        except UnreadableImageError as error:
            faults.append(_fault("unreadable mask", item.label, error))
        if photo is not None and raw is not None and photo.shape[:2] != raw.shape:
            faults.append(_fault("sizes differ", item.label, size_fault(item, photo, raw)))
        if raw is not None and not self._count(raw):
            text = id_fault(item, raw, tuple(self._lookup.tolist()))
            faults.append(_fault("unknown id", item.label, text))
        return faults

    def report(self, images: int, tagged: bool = False) -> SplitReport:
        """The counts as shares, by class name."""
        named = {name: index for index, name in enumerate(self._classes.names)}
        named[IGNORED] = self._classes.ignore_index
        total = max(1, int(self._pixels.sum()))
        return SplitReport(
            images=images,
            labels="tags" if tagged else "masks",
            sizes=dict(self._sizes.most_common()),
            pixels={
                name: None if tagged else float(self._pixels[index] / total)
                for name, index in named.items()
            },
            images_with={name: int(self._images_with[index]) for name, index in named.items()},
        )

    def _count(self, raw: Pixels) -> bool:
        """Adds a mask's pixels; False where some values mean nothing (those are left out)."""
        counts = np.bincount(raw.ravel(), minlength=256)
        good = self._lookup != NOT_AN_ID
        of_class: npt.NDArray[np.int64] = np.zeros(256, np.int64)
        np.add.at(of_class, self._lookup[good], counts[good])
        self._pixels += of_class
        self._images_with += of_class > 0
        self.shown = frozenset(np.flatnonzero(of_class).tolist())
        return not counts[~good].any()


def _fault(kind: FaultKind, path: Path, reason: object) -> Fault:
    return Fault(kind=kind, path=str(path), detail=str(reason).removeprefix(f"{path}: "))


def distribution_table(report: CheckReport) -> "Table":
    """One row per class; for each split, its share of the pixels and the images that hold it."""
    from rich.table import Table

    title = f"{report.root} ({report.layout})"
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("")
    table.add_column("id", justify="right")
    table.add_column("class", footer="images")
    for split, found in report.splits.items():
        table.add_column(
            f"{split}\n{'tags' if found.labels == 'tags' else 'pixels %'}", justify="right"
        )
        table.add_column("\nimages", justify="right", footer=str(found.images))
    classes = report.classes
    rows = [*enumerate(classes.names), (classes.ignore_index, IGNORED)]
    for ident, name in rows:
        colour = classes.void_colour if name == IGNORED else classes.palette[ident]
        left_out = classes.scored is not None and name != IGNORED and ident not in classes.scored
        cells = []
        for found in report.splits.values():
            share = found.pixels[name]
            cells += ["-" if share is None else f"{100 * share:.2f}", str(found.images_with[name])]
        swatch = f"[rgb({colour[0]},{colour[1]},{colour[2]})]██[/]"
        label = f"{name} (not scored)" if left_out else name
        table.add_row(swatch, str(ident), label, *cells)
    return table
