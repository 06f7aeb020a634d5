"""The tags file held against the photos and classes of its data set."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from srdeploy.data.classes import ClassTable
from srdeploy.data.pairs import Fault, FaultKind, Item
from srdeploy.data.tag_file import Entry, read_entries
from srdeploy.validation import closest

BACKGROUND = "background"
"""The class of what is no object; it needs no tag."""


@dataclass(frozen=True)
class Tagging:
    """What a tags file says, photo by photo, and what is wrong with it."""

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
        """The photos that `text` fits; a whole path fits one alone."""
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
