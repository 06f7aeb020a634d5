"""Checking a data set before training time is spent on it: pairs, files, sizes, ids, classes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from srdeploy import console
from srdeploy.data.classes import ClassTable
from srdeploy.data.dataset import LAYOUTS, find_layout, id_fault, size_fault
from srdeploy.data.pairs import NOT_AN_ID, Fault, FaultKind, Item
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
    pixels: dict[str, float]
    """Share of all pixels in 0..1 per class, scored or not, and "(ignored)"."""
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
    reports: dict[str, SplitReport] = {}
    faults: list[Fault] = []
    for split in splits or known:
        pairs = found.pairs(home, split)
        faults.extend(pairs.faults)
        if not pairs.items:
            detail = "no photo with a mask was found"
            faults.append(Fault(kind="empty split", path=f"{home} ({split})", detail=detail))
        tally = _Tally(classes, pairs.lookup)
        for item in console.track(pairs.items, f"checking {split}", total=len(pairs.items)):
            faults.extend(tally.add(item))
        reports[split] = tally.report(len(pairs.items))
    return CheckReport(
        root=str(root), layout=name, classes=classes, splits=reports, faults=tuple(faults)
    )


class _Tally:
    """Counts of one split, as its items are read."""

    def __init__(self, classes: ClassTable, lookup: tuple[int, ...]) -> None:
        self._classes = classes
        self._lookup = np.asarray(lookup, np.int16)
        self._pixels = np.zeros(256, np.int64)
        self._images_with = np.zeros(256, np.int64)
        self._sizes: Counter[str] = Counter()

    def add(self, item: Item) -> list[Fault]:
        """Reads one item, counts it, and returns what is wrong with it."""
        faults: list[Fault] = []
        photo = raw = None
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

    def report(self, images: int) -> SplitReport:
        """The counts as shares, by class name."""
        named = {name: index for index, name in enumerate(self._classes.names)}
        named[IGNORED] = self._classes.ignore_index
        total = max(1, int(self._pixels.sum()))
        return SplitReport(
            images=images,
            sizes=dict(self._sizes.most_common()),
            pixels={name: float(self._pixels[index] / total) for name, index in named.items()},
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
        table.add_column(f"{split}\npixels %", justify="right")
        table.add_column("\nimages", justify="right", footer=str(found.images))
    classes = report.classes
    rows = [*enumerate(classes.names), (classes.ignore_index, IGNORED)]
    for ident, name in rows:
        colour = classes.void_colour if name == IGNORED else classes.palette[ident]
        left_out = classes.scored is not None and name != IGNORED and ident not in classes.scored
        cells = []
        for found in report.splits.values():
            cells += [f"{100 * found.pixels[name]:.2f}", str(found.images_with[name])]
        swatch = f"[rgb({colour[0]},{colour[1]},{colour[2]})]██[/]"
        label = f"{name} (not scored)" if left_out else name
        table.add_row(swatch, str(ident), label, *cells)
    return table
