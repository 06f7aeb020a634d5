"""Checking a data set before training time is spent on it: pairs, files, sizes, ids, tags."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from srdeploy import console
from srdeploy.data.classes import ClassTable
from srdeploy.data.dataset import LAYOUTS, Layout, find_layout, id_fault, size_fault
from srdeploy.data.pairs import NOT_AN_ID, Fault, FaultKind, Item, Pairs
from srdeploy.data.tags import BACKGROUND, Tagging, find_tag_file, read_tagging
from srdeploy.errors import UserError
from srdeploy.imaging import Pixels, UnreadableImageError, read_labels, read_photo
from srdeploy.validation import Settings, closest

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_FAULTS = 20
"""Faults listed for people; the report holds all."""


class SplitReport(Settings):
    """What one split holds. Distributions are over readable masks, or over the tags of a split
    that has no masks."""

    labels: Literal["masks", "tags"] = "masks"
    """The kind of labels that the photos have."""
    images: int
    """Photos that have a mask; where labels are tags, all photos."""
    sizes: dict[str, int]
    """How many photos of each size, "WIDTHxHEIGHT", the most frequent first."""
    pixels: dict[str, float] | None
    """Share of all pixels in 0..1 per class, scored or not, and "(ignored)"; None where labels are
    tags."""
    images_with: dict[str, int]
    """How many images hold the class; where labels are tags, without background and ignored."""


class CheckReport(Settings):
    """The outcome of a check: all well where `faults` is empty."""

    root: str
    layout: str
    classes: ClassTable
    splits: dict[str, SplitReport]
    faults: tuple[Fault, ...]

    @property
    def passed(self) -> bool:
        """True if the check found no fault."""
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

    Where there is a tags file, it is checked too: splits without any mask are taken as tagged, and
    the masks of others are compared with the tags of the photos that the file names.
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
    pairs_of = {split: found.pairs(home, split) for split in splits or known}
    tagging = _tagging_of(found, home, classes, pairs_of)
    faults: list[Fault] = [] if tagging is None else [*tagging.faults]
    for split, pairs in pairs_of.items():
        tally: _Tally | _TagTally
        if tagging is not None and pairs.bare and not pairs.items:
            faults.extend(fault for fault in pairs.faults if fault.kind != "photo without mask")
            items, tally = pairs.bare, _TagTally(classes, tagging)
        else:
            faults.extend(pairs.faults)
            items, tally = pairs.items, _Tally(classes, pairs.lookup, tagging)
        if not items:
            detail = "no photo with a mask was found"
            faults.append(Fault(kind="empty split", path=f"{home} ({split})", detail=detail))
        for item in console.track(items, f"checking {split}", total=len(items)):
            faults.extend(tally.add(item))
        reports[split] = tally.report(len(items))
    return CheckReport(
        root=str(root), layout=name, classes=classes, splits=reports, faults=tuple(faults)
    )


def _tagging_of(
    found: Layout, home: Path, classes: ClassTable, pairs_of: dict[str, Pairs]
) -> Tagging | None:
    file = find_tag_file(home)
    if file is None:
        return None
    # Lists of VOC may name photos that lie elsewhere.
    items = [item for pairs in pairs_of.values() for item in (*pairs.items, *pairs.bare)]
    photos = {item.image: item.name for item in items} | found.photos(home)
    return read_tagging(file, home, classes, photos)


class _TagTally:
    """Counts of one split whose photos have tags and no masks, as they are read."""

    def __init__(self, classes: ClassTable, tagging: Tagging) -> None:
        self._classes = classes
        self._tagging = tagging
        self._images_with: Counter[int] = Counter()
        self._sizes: Counter[str] = Counter()

    def add(self, item: Item) -> list[Fault]:
        """Reads one photo, counts its tags, and returns what is wrong with it."""
        faults: list[Fault] = []
        _read_photo(item, self._sizes, faults)
        tags = self._tagging.tags.get(item.image)
        if tags is None:
            faults.append(self._tagging.untagged(item))
        else:
            self._images_with.update(tags)
        return faults

    def report(self, images: int) -> SplitReport:
        """The counts by class name."""
        named = {name: index for index, name in enumerate(self._classes.names)}
        named.pop(BACKGROUND, None)
        return SplitReport(
            labels="tags",
            images=images,
            sizes=dict(self._sizes.most_common()),
            pixels=None,
            images_with={name: self._images_with[index] for name, index in named.items()},
        )


class _Tally:
    """Counts of one split, as its items are read."""

    def __init__(
        self, classes: ClassTable, lookup: tuple[int, ...], tagging: Tagging | None
    ) -> None:
        self._classes = classes
        self._tagging = tagging
        self._lookup = np.asarray(lookup, np.int16)
        self._pixels = np.zeros(256, np.int64)
        self._images_with = np.zeros(256, np.int64)
        self._sizes: Counter[str] = Counter()

    def add(self, item: Item) -> list[Fault]:
        """Reads one item, counts it, and returns what is wrong with it."""
        faults: list[Fault] = []
        raw = None
        photo = _read_photo(item, self._sizes, faults)
        try:
            raw = read_labels(item.label)
        except UnreadableImageError as error:
            faults.append(_fault("unreadable mask", item.label, error))
        if photo is not None and raw is not None and photo.shape[:2] != raw.shape:
            faults.append(
                _fault(
                    "sizes differ",
                    item.label,
                    size_fault(item, (photo.shape[0], photo.shape[1]), raw),
                )
            )
        if raw is not None:
            shown, sound = self._count(raw)
            if not sound:
                text = id_fault(item, raw, tuple(self._lookup.tolist()))
                faults.append(_fault("unknown id", item.label, text))
            faults.extend(self._compare(item, shown))
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

    def _count(self, raw: Pixels) -> tuple[frozenset[int], bool]:
        """Adds a mask's pixels; returns the labels that it shows, and False where some values mean
        nothing (those are left out)."""
        counts = np.bincount(raw.ravel(), minlength=256)
        good = self._lookup != NOT_AN_ID
        of_class: npt.NDArray[np.int64] = np.zeros(256, np.int64)
        np.add.at(of_class, self._lookup[good], counts[good])
        self._pixels += of_class
        self._images_with += of_class > 0
        return frozenset(np.flatnonzero(of_class).tolist()), not counts[~good].any()

    def _compare(self, item: Item, shown: frozenset[int]) -> list[Fault]:
        """Where the labels that a mask shows are not the classes that its photo is tagged with."""
        if self._tagging is None or item.image not in self._tagging.tags:
            return []
        names = self._classes.names
        compared = frozenset(
            range(len(names)) if self._classes.scored is None else self._classes.scored
        )
        if BACKGROUND in names:
            compared -= {names.index(BACKGROUND)}
        tags = self._tagging.tags[item.image]
        faults: list[Fault] = []
        for ident in sorted(compared & (tags - shown)):
            detail = f"{item.name} is tagged '{names[ident]}', its mask {item.label} shows none"
            faults.append(self._tagging.fault("tag without pixels", item.image, detail))
        for ident in sorted(compared & (shown - tags)):
            detail = f"{item.name} is not tagged '{names[ident]}', its mask {item.label} shows it"
            faults.append(self._tagging.fault("untagged class", item.image, detail))
        return faults


def _read_photo(item: Item, sizes: Counter[str], faults: list[Fault]) -> Pixels | None:
    """The photo of an item, counted in `sizes`; where it can't be read, None and a fault more."""
    try:
        photo = read_photo(item.image)
    except UnreadableImageError as error:
        faults.append(_fault("unreadable photo", item.image, error))
        return None
    sizes[f"{photo.shape[1]}x{photo.shape[0]}"] += 1
    return photo


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
            share = "-" if found.pixels is None else f"{100 * found.pixels[name]:.2f}"
            cells += [share, str(found.images_with.get(name, "-"))]
        swatch = f"[rgb({colour[0]},{colour[1]},{colour[2]})]██[/]"
        label = f"{name} (not scored)" if left_out else name
        table.add_row(swatch, str(ident), label, *cells)
    return table
