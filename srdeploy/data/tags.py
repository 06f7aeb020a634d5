"""The tags file: which classes each photo shows, without saying where.

labels.csv    image,classes
              train/cow_1.jpg,cow;person
              train/cow_2.jpg,

labels.json   {"train/cow_1.jpg": ["cow", "person"], "train/cow_2.jpg": []}, or a list of
              {"image": "train/cow_1.jpg", "classes": ["cow", "person"]}
"""

import csv
import io
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from srdeploy import console
from srdeploy.data.classes import ClassTable
from srdeploy.data.dataset import LAYOUTS, DataSet, find_layout
from srdeploy.data.pairs import (
    Fault,
    FaultKind,
    Item,
    common_lookup,
    parts_of,
    read_parts,
    refuse_faults,
)
from srdeploy.errors import UserError
from srdeploy.files import read_json, read_text
from srdeploy.imaging import Pixels, read_photo
from srdeploy.validation import closest

CSV_FILE, JSON_FILE = "labels.csv", "labels.json"
HEADER = ("image", "classes")
"""The columns of the CSV file, and the keys of an entry in the JSON file."""
SEPARATOR = ";"
"""Between classes in the CSV file."""


@dataclass(frozen=True)
class Entry:
    """One photo's entry in a tags file."""

    image: str
    """The photo as the file writes it: a name or a path."""
    classes: tuple[str | int, ...]
    """The classes as the file writes them: names or ids."""
    where: str
    """Its place in the file, as "line 3"."""


def find_tag_file(home: Path) -> Path | None:
    """The tags file in a data set's folder, None where it has none. Raises UserError for two."""
    found = [path for path in (home / CSV_FILE, home / JSON_FILE) if path.is_file()]
    if len(found) > 1:
        raise UserError(f"{home} has both {CSV_FILE} and {JSON_FILE}: keep one of them")
    return found[0] if found else None


def read_entries(path: Path) -> tuple[Entry, ...]:
    """The entries of a tags file in their order; neither photos nor classes are looked up.

    Raises UserError that names the file and the place: not CSV or JSON, or another form than the
    two.
    """
    return tuple(_csv_entries(path) if path.name == CSV_FILE else _json_entries(path))


def _csv_entries(path: Path) -> Iterator[Entry]:
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header = ",".join(HEADER)
    line = 1
    try:
        first = next(rows, [])
        if tuple(field.strip() for field in first) != HEADER:
            raise UserError(
                f"{path} line 1: the header '{header}' is expected, this is "
                f"{','.join(first)[:60]!r}"
            )
        line = rows.line_num + 1
        for row in rows:
            if len(row) > 2:
                raise UserError(
                    f"{path} line {line}: an image and its classes are expected, this has "
                    f"{len(row)} fields: put '{SEPARATOR}' between classes, and quotes around a "
                    "name with a comma"
                )
            if len(row) == 1:
                raise UserError(
                    f"{path} line {line}: {row[0][:60]!r} has no comma after it: 'IMAGE,CLASSES' "
                    "is expected, and 'IMAGE,' where it shows none of them"
                )
            if row:
                names = (name.strip() for name in row[1].split(SEPARATOR))
                yield _entry(path, row[0], tuple(filter(None, names)), f"line {line}")
            # A quoted field may go over several lines.
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} line {line}: not valid CSV ({error})") from error


def _json_entries(path: Path) -> Iterator[Entry]:
    # As pairs, for a mapping would hide all but the last of equal keys.
    content = read_json(path, object_as=tuple)
    if isinstance(content, tuple):
        pairs = content
    elif isinstance(content, list):
        pairs = tuple(_listed(path, number, entry) for number, entry in enumerate(content, start=1))
    else:
        raise UserError(
            f"{path}: an object of images with their classes, or a list of entries, is expected, "
            f"this is a {type(content).__name__}"
        )
    for number, (image, classes) in enumerate(pairs, start=1):
        where = f"entry {number}"
        if not isinstance(image, str):
            raise UserError(f"{path} {where}: the image {image!r} must be a text")
        if not isinstance(classes, list) or not all(map(_is_class, classes)):
            raise UserError(
                f"{path} {where} ({image!r}): a list of class names is expected, as "
                f'["cow", "person"], this is {_shown(classes)}'
            )
        yield _entry(path, image, tuple(classes), where)


def _listed(path: Path, number: int, entry: Any) -> tuple[Any, Any]:
    if not isinstance(entry, tuple) or sorted(key for key, _ in entry) != sorted(HEADER):
        raise UserError(
            f'{path} entry {number}: {{"image": NAME, "classes": [...]}} is expected, this is '
            f"{_shown(entry)}"
        )
    values = dict(entry)
    return values[HEADER[0]], values[HEADER[1]]


def _is_class(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _entry(path: Path, image: str, classes: tuple[str | int, ...], where: str) -> Entry:
    if not image:
        raise UserError(f"{path} {where}: the name of an image is missing")
    return Entry(image, classes, where)


def _shown(value: object) -> str:
    """A JSON value, shortened; objects as such, not as the pairs they were read as."""
    if isinstance(value, tuple):
        return f"an object with the keys {', '.join(key for key, _ in value)[:60] or '(none)'}"
    return repr(value)[:60]


# Matching a tags file with the photos and classes of its data set

BACKGROUND = "background"
"""The class of what is no object; it needs no tag."""


@dataclass(frozen=True)
class Tagging:
    """The tags of each photo in a tags file, and the file's faults."""

    file: Path
    tags: dict[Path, frozenset[int]]
    """Photo -> ids of the classes that it shows, scored or not, without background."""
    places: dict[Path, str]
    """Photo -> where the file names it, as "line 3"."""
    faults: tuple[Fault, ...]

    def fault(self, kind: FaultKind, photo: Path, detail: str) -> Fault:
        """A fault of the entry that names `photo`, which must be in `places`."""
        return Fault(kind=kind, path=str(self.file), detail=f"{self.places[photo]}: {detail}")

    def untagged(self, item: Item) -> Fault:
        """The fault of a photo that the file does not name."""
        detail = f"{self.file} does not name it (an empty list says that it shows none)"
        return Fault(kind="photo without tags", path=str(item.image), detail=detail)


def read_tagging(
    file: Path, home: Path, classes: ClassTable, photos: Mapping[Path, str]
) -> Tagging:
    """Reads a tags file; `photos` are all that its data set in `home` has, with their names.

    An entry names its photo by the photo's name, or by its path below `home` or the end of that,
    with or without the file's suffix. Entries that are wrong are faults, and are left out: an
    unknown class (but the entry's others count), no such photo, one that fits two photos, a second
    one for a photo. Raises UserError where the file can't be read.
    """
    index = _Index(home, photos)
    tags: dict[Path, frozenset[int]] = {}
    places: dict[Path, str] = {}
    faults: list[tuple[FaultKind, Entry, str]] = []
    for entry in read_entries(file):
        ids = set()
        for name in entry.classes:
            ident = _class_id(name, classes)
            if isinstance(ident, int):
                ids.add(ident)
            else:
                faults.append(
                    ("unknown class", entry, f"{entry.image!r} is tagged {name!r}: {ident}")
                )
        fitting = index.find(entry.image)
        if not fitting:
            detail = f"no photo is called {entry.image!r}: its path below {home} is expected"
            faults.append(("listed photo missing", entry, detail))
        elif len(fitting) > 1:
            paths = " and ".join(_below(photo, home) for photo in fitting[:2])
            detail = f"{entry.image!r} fits {paths}: write one of these"
            faults.append(("two photos of one name", entry, detail))
        elif fitting[0] in tags:
            detail = f"{entry.image!r} is in {places[fitting[0]]} already"
            faults.append(("listed twice", entry, detail))
        else:
            tags[fitting[0]] = frozenset(i for i in ids if classes.names[i] != BACKGROUND)
            places[fitting[0]] = entry.where
    return Tagging(
        file,
        tags,
        places,
        tuple(
            Fault(kind=kind, path=str(file), detail=f"{entry.where}: {detail}")
            for kind, entry, detail in faults
        ),
    )


class _Index:
    """Finds photos by what a tags file may call them."""

    def __init__(self, home: Path, photos: Mapping[Path, str]) -> None:
        self._exact: dict[str, Path] = {}
        self._loose: dict[str, list[Path]] = {}
        for photo, name in photos.items():
            path = _below(photo, home)
            self._exact[path] = photo
            for key in _ways(PurePosixPath(path), name):
                self._loose.setdefault(key, []).append(photo)

    def find(self, text: str) -> list[Path]:
        """The photos that `text` fits; a whole path fits only one."""
        key = str(PurePosixPath(text))  # "./images/train/a.jpg", as find prints it, is fine
        exact = self._exact.get(key)
        return [exact] if exact is not None else self._loose.get(key, [])


def _ways(path: PurePosixPath, name: str) -> set[str]:
    """The name, and the ends of the path that hold the whole name; with and without suffix."""
    ways = {name, name + path.suffix}
    for start in range(len(path.parts)):
        end = PurePosixPath(*path.parts[start:])
        if name in str(end):
            ways |= {str(end), str(end.with_suffix(""))}
    return ways


def _class_id(name: str | int, classes: ClassTable) -> int | str:
    """A class's id, or what to say where there is no such class."""
    if isinstance(name, str) and name in classes.names:
        return classes.names.index(name)
    if isinstance(name, str) and not (name.isascii() and name.isdecimal() and len(name) < 10):
        return closest(name, classes.names)
    ident, last = int(name), len(classes.names) - 1
    return ident if 0 <= ident <= last else f"ids are 0 to {last}"


def _below(photo: Path, home: Path) -> str:
    return photo.relative_to(home).as_posix()


# Photos with image-level labels (tags), for weak supervision

Tags = tuple[frozenset[int], ...]
"""Class ids of each item."""

READERS = 8
"""Most threads that read masks: decoding leaves Python's lock, more would wait for the disk."""


@dataclass(frozen=True)
class TaggedSet:
    """One split of a data set: photos with the classes that each shows."""

    root: Path
    split: str
    """The requested split: one name, or several joined by '+'."""
    layout: str
    """"folder", "voc" or "cityscapes"."""
    classes: ClassTable
    items: tuple[Item, ...]
    """The items, sorted by name within each split; an item's mask need not exist."""
    tags: Tags
    """The classes of each item: only scored ones, without background."""
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

        The labels replace a mask, so that what reads and augments photos with masks serves
        here too. Raises UserError where the photo can't be read.
        """
        photo = read_photo(self.items[index].image)
        return photo, np.full(photo.shape[:2], self.background, np.uint8)

    @cached_property
    def has_masks(self) -> bool:
        """True if every item also has a true mask, so that pseudo masks can be scored."""
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
