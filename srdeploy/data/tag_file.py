"""The tags file: which classes each photo shows, without saying where.

labels.csv    image,classes
              train/cow_1.jpg,cow;person
              train/cow_2.jpg,

labels.json   {"train/cow_1.jpg": ["cow", "person"], "train/cow_2.jpg": []}, or a list of
              {"image": "train/cow_1.jpg", "classes": ["cow", "person"]}
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy.errors import UserError
from srdeploy.files import read_json, read_text

CSV_FILE, JSON_FILE = "labels.csv", "labels.json"
HEADER = ("image", "classes")
"""Of the CSV file; the keys of an entry in the JSON file, too."""
SEPARATOR = ";"
"""Between classes in the CSV file."""


@dataclass(frozen=True)
class Entry:
    """What a tags file says of one photo."""

    image: str
    """As written: a name or a path."""
    classes: tuple[str | int, ...]
    """As written: names, or ids."""
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
