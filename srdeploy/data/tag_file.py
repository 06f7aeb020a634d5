"""labels.csv and labels.json: which classes each photo shows, where no masks say so."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

from srdeploy.data.classes import ClassTable
from srdeploy.data.pairs import Item
from srdeploy.errors import UserError
from srdeploy.files import read_json, read_text
from srdeploy.validation import closest

CSV, JSON = "labels.csv", "labels.json"
HEADER = ("image", "classes")
SEPARATOR = ";"
BACKGROUND = "background"


@dataclass(frozen=True)
class Entry:
    """What the file says of one photo."""

    where: str
    """The file and the place in it, for messages."""
    image: str
    classes: tuple[str, ...]
    """Names, or ids as text."""


def find_tag_file(home: Path) -> Path | None:
    """labels.csv or labels.json of the data set at `home`; None where it has none. Raises UserError
    where it has both."""
    found = [home / name for name in (CSV, JSON) if (home / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{home} has {CSV} and {JSON}: keep one of them")
    return found[0] if found else None


def read_tag_file(path: Path) -> list[Entry]:
    """The entries in their order. Raises UserError naming the line, or the entry, at fault."""
    return _from_csv(path) if path.suffix == ".csv" else _from_json(path)


def _from_csv(path: Path) -> list[Entry]:
    # Not splitlines: a quoted name may hold a line break.
    reader = csv.reader(StringIO(read_text(path), newline=""), strict=True)
    entries: list[Entry] = []
    try:
        header = tuple(cell.strip() for cell in next(reader, []))
        if header != HEADER:
            raise UserError(
                f"{path} line 1: the header is to be '{','.join(HEADER)}', not "
                f"'{','.join(header)[:60]}'"
            )
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if not row:
                continue
            if len(row) != len(HEADER):
                raise UserError(
                    f"{where}: {len(row)} fields, not 2: an image, and its classes separated by "
                    f"'{SEPARATOR}' (a name with a comma is put in double quotes)"
                )
            names = tuple(one.strip() for one in row[1].split(SEPARATOR))
            entries.append(Entry(where, row[0], tuple(one for one in names if one)))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not valid CSV ({error})") from error
    return entries


def _from_json(path: Path) -> list[Entry]:
    content = read_json(path)
    pairs: list[tuple[Any, Any]]
    if isinstance(content, dict):
        pairs = list(content.items())
    elif isinstance(content, list) and all(isinstance(one, dict) for one in content):
        pairs = [(one.get("image"), one.get("classes")) for one in content]
    else:
        raise UserError(
            f'{path}: an object {{"IMAGE": ["CLASS", ...]}} is needed, or a list of '
            '{"image": ..., "classes": [...]}'
        )
    entries = []
    for number, (image, classes) in enumerate(pairs, start=1):
        where = f"{path} entry {number}"
        named = isinstance(classes, list) and all(_is_name(one) for one in classes)
        if not isinstance(image, str) or not named:
            raise UserError(f"{where}: an image's name and a list of class names are needed")
        entries.append(Entry(where, image, tuple(str(one) for one in classes)))
    return entries


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def class_ids(entry: Entry, classes: ClassTable) -> frozenset[int]:
    """The ids of an entry's classes, the background's left out. Raises UserError for an unknown
    one."""
    ids = set()
    for name in entry.classes:
        if name in classes.names:
            ids.add(classes.names.index(name))
        elif name.isascii() and name.isdigit() and int(name) < len(classes.names):
            ids.add(int(name))
        elif name != BACKGROUND:
            raise UserError(f"{entry.where}: no class '{name}': {closest(name, classes.names)}")
    return frozenset(ids - {i for i, name in enumerate(classes.names) if name == BACKGROUND})


class Photos:
    """Photos by the names that an entry may use of them."""

    def __init__(self, items: Sequence[Item], home: Path) -> None:
        self._items = items
        self._by_name: dict[str, set[int]] = defaultdict(set)
        for index, item in enumerate(items):
            for name in _names(item, home):
                self._by_name[name].add(index)

    def find(self, entry: Entry) -> int | None:
        """The index of the entry's photo; None where it is not among these. Raises UserError where
        it could be either of two."""
        found = self._by_name.get(entry.image.strip().removeprefix("./"), set())
        if len(found) > 1:
            first, second = (self._items[i].image for i in sorted(found)[:2])
            raise UserError(
                f"{entry.where}: '{entry.image}' may be {first} or {second}: give more of the path"
            )
        return next(iter(found), None)


def _names(item: Item, home: Path) -> Iterable[str]:
    """The item's name, and its photo's path below the data set, each part of that from its
    beginning left away, with and without suffix."""
    path = PurePosixPath(item.image.relative_to(home).as_posix())
    yield item.name
    for skipped in range(len(path.parts)):
        rest = PurePosixPath(*path.parts[skipped:])
        yield str(rest)
        yield str(rest.with_suffix(""))
