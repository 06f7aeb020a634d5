"""The photos of a job and what their outputs are called, in bounded memory."""

import hashlib
import os
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from types import TracebackType
from typing import BinaryIO, Self

from srdeploy import console
from srdeploy.errors import UserError
from srdeploy.imaging import PHOTO_SUFFIXES
from srdeploy.serve.folders.naming import (
    KINDS,
    OWN_FILES,
    choose_names,
    safe_folder,
    safe_name,
    shared_folders,
)
from srdeploy.serve.folders.paths import (
    GlobPattern,
    is_url,
    listed_paths,
    local_path,
    open_list,
    printable,
    split_glob,
)
from srdeploy.serve.folders.records import Photo, Unusable
from srdeploy.serve.folders.walk import (
    Found,
    canonical,
    find_remote,
    look_at,
    look_at_remote,
    source_error,
    walk,
)

ROWS = 1000
"""Photos that are added between two reports of progress."""
TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA temp_store = FILE;
PRAGMA cache_size = -24000;
CREATE TABLE photos (
    id INTEGER PRIMARY KEY, real BLOB UNIQUE, source INTEGER, label BLOB, is_link INTEGER,
    suffixed BLOB, stem BLOB, name BLOB, path BLOB, bytes INTEGER, changed_ns INTEGER);
CREATE TABLE unusable (path BLOB PRIMARY KEY, reason TEXT) WITHOUT ROWID;
CREATE TABLE inside (below_out BLOB, path BLOB);
"""
"""A temporary database. Paths are bytes: they may not be text."""
# Of two paths of one file the same one is kept, in whatever order they are met.
ADD = """
INSERT INTO photos (real, source, label, is_link, suffixed, stem, path, bytes, changed_ns)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (real) DO UPDATE SET
    source = excluded.source, label = excluded.label, is_link = excluded.is_link,
    suffixed = excluded.suffixed, stem = excluded.stem, path = excluded.path
WHERE (excluded.source, excluded.is_link, excluded.suffixed, excluded.path)
    < (source, is_link, suffixed, path)
"""


class Listing:
    """Photos by name, and what can't be used, in a temporary database. A context manager."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._photos = int(database.execute("SELECT count(*) FROM photos").fetchone()[0])
        self.unusable_count = int(database.execute("SELECT count(*) FROM unusable").fetchone()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._database.close()

    def __len__(self) -> int:
        return self._photos

    def __iter__(self) -> Iterator[Photo]:
        cursor = self._database.execute(
            "SELECT path, name, bytes, changed_ns FROM photos ORDER BY name"
        )
        for path, name, size, changed_ns in cursor:
            yield Photo(os.fsdecode(path), os.fsdecode(name), size, changed_ns)

    def unusable(self) -> Iterator[Unusable]:
        """What can't be used, sorted by path."""
        for path, reason in self._database.execute(
            "SELECT path, reason FROM unusable ORDER BY path"
        ):
            yield Unusable(os.fsdecode(path), reason)


def find_photos(
    sources: Sequence[str],
    out: str,
    list_file: str | None = None,
    stdin: BinaryIO | None = None,
) -> Listing:
    """The photos in `sources`: folders (with their sub-folders), files, globs, URLs, and "-" for
    a list on `stdin`; and those in the list `list_file`.

    Names are paths below the folder source, a glob's fixed part, or a list's common folder, without
    suffix. Photos that differ only in their suffix keep it; sources with equal names get their
    folder's name in front; numbers separate the rest. A file that is met twice counts once.
    Hidden files and the contents of `out` are skipped. What can't be used inside the sources is
    listed as unusable. Raises UserError: a source does not exist, no photos, `out` is among the
    sources (the next prediction would take its masks for photos), or an output would replace a
    photo.
    """
    if not sources and list_file is None:
        raise UserError("no photos are named: give a folder, files, or a list of them")
    with ExitStack() as stack:
        try:
            database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            stack.callback(database.close)
            database.executescript(TABLES)
            database.execute("BEGIN")
            with console.progress() as bar:
                finder = _Finder(database, out)
                task = bar.add_task("look for photos", total=None)
                for count in finder.find(sources, list_file, stdin):
                    bar.update(task, completed=count)
                choose_names(database)
            finder.check(sources, list_file)
            listing = Listing(database)
        except sqlite3.Error as error:
            raise UserError(
                f"the list of photos can't be kept in the temporary folder ({error}): free some "
                "space there, or set SQLITE_TMPDIR to another folder"
            ) from error
        stack.pop_all()
    return listing


class _Finder:
    """Fills the tables of a listing."""

    def __init__(self, database: sqlite3.Connection, out: str) -> None:
        self._database = database
        self._out = out
        local = local_path(out) if is_url(out) else out
        self._local_out = None if local is None else os.path.realpath(local)
        self._remote_out = canonical(out) if local is None else None
        self._real_folder = lru_cache(maxsize=1024)(os.path.realpath)
        self._folders: list[str] = []
        """Real folders among the sources that are below `out`, relative to it."""

    def find(
        self, sources: Sequence[str], list_file: str | None, stdin: BinaryIO | None
    ) -> Iterator[int]:
        """Adds everything; yields the number of paths seen, now and then."""
        seen = 0
        lists = [] if list_file is None else [list_file]
        for index, source in enumerate(chain(dict.fromkeys(sources), lists)):
            listed = index >= len(dict.fromkeys(sources))
            if listed:
                with open_list(source) as file:
                    yield from self._add_list(index, file, source)
                continue
            if source == "-":
                given = stdin or getattr(sys.stdin, "buffer", None)
                if given is None:
                    raise UserError(
                        "- is a list on standard input, which is closed: use --set list=FILE"
                    )
                yield from self._add_list(index, given, "standard input")
                continue
            label, found = self._look(source)
            for one in found:
                self._add(one, index, label)
                seen += 1
                if seen % ROWS == 0:
                    yield seen

    def check(self, sources: Sequence[str], list_file: str | None) -> None:
        """Raises UserError where there are no photos, or where outputs would replace them."""
        run = self._database.execute
        if run("SELECT 1 FROM photos LIMIT 1").fetchone() is None:
            listed = ", ".join(
                "the list on stdin" if one == "-" else printable(one)
                for one in chain(sources, [list_file] if list_file else [])
            )
            first = run("SELECT path, reason FROM unusable ORDER BY path LIMIT 1").fetchone()
            looked_for = f"{', '.join(sorted(PHOTO_SUFFIXES))} are looked for"
            if first is not None:
                looked_for = f"{printable(os.fsdecode(first[0]))}: {first[1]}"
            raise UserError(f"no photos in {listed}: {looked_for}")
        for below_out, path in run("SELECT below_out, path FROM inside"):
            below = os.fsdecode(below_out)
            if below in OWN_FILES or any(self._is_output(below, *kind) for kind in KINDS):
                raise UserError(
                    f"an output would replace a photo, {printable(os.fsdecode(path))}: "
                    f"give another folder than {printable(self._out)}"
                )
        for folder in self._folders:
            if any(self._outputs_go_into(folder, kind) for kind, _ in KINDS):
                raise UserError(_among_photos(self._out))

    def _look(self, source: str) -> tuple[str, Iterable[Found | Unusable]]:
        """The prefix for names that are not unique, and what the source holds."""
        if is_url(source):
            local = local_path(source)
            if local is None:
                split = split_glob(source, "*")
                self._note_folder(canonical(split[0] if split else source))
                name = (split[0] if split else source).rstrip("/").rpartition("/")[2]
                return name, find_remote(source, self._remote_out)
            source = local
        if not source or "\0" in source:
            raise UserError("one of the sources is no path: it is empty, or has a zero byte")
        if os.path.isdir(source):
            self._note_folder(os.path.realpath(source))
            return os.path.basename(os.path.abspath(source)), walk(source, self._local_out)
        split = None if os.path.lexists(source) else split_glob(source)
        if split is not None:
            folder, pattern = split
            if os.path.isdir(folder):
                self._note_folder(os.path.realpath(folder))
            label = os.path.basename(os.path.abspath(folder))
            return label, walk(folder, self._local_out, GlobPattern(pattern))
        one = look_at(source, os.path.basename(source))
        if isinstance(one, Unusable):
            raise source_error(one)
        return os.path.basename(os.path.dirname(os.path.abspath(source))), [one]

    def _note_folder(self, real: str) -> None:
        if real in (self._local_out, self._remote_out):
            raise UserError(_among_photos(self._out))
        below = self._below_out(real)
        if below is not None:
            self._folders.append(below)

    def _add_list(self, index: int, file: BinaryIO, name: str) -> Iterator[int]:
        """Adds the files of a list. Their names are cut once their common folder is known."""
        common: list[str] | None = None
        for seen, path in enumerate(listed_paths(file, name)):
            if is_url(path) and local_path(path) is None:
                whole = os.path.normpath("/" + path.replace("://", "/", 1))
                found = look_at_remote(path, whole)
            else:
                path = local_path(path) or path
                whole = os.path.abspath(path) if "\0" not in path else "/"
                found = look_at(path, whole, self._real(path))
            if "\0" not in path:
                folders = safe_name(whole.lstrip("/"))[0].split("/")[:-1]
                common = folders if common is None else shared_folders(common, folders)
            if isinstance(found, Found):
                found = replace(found, relative=whole.lstrip("/"))
            self._add(found, index, "")
            if seen % ROWS == 0:
                yield seen
        cut = sum(len(os.fsencode(folder)) + 1 for folder in common or [])
        self._database.execute(
            "UPDATE photos SET suffixed = substr(suffixed, ?1), stem = substr(stem, ?1), "
            "label = ?2 WHERE source = ?3",
            (cut + 1, os.fsencode(common[-1] if common else "list"), index),
        )

    def _real(self, path: str) -> str | None:
        """The real path of a file that is no link, else None: resolving each folder above each file
        of a list would take longer than everything else."""
        folder, file = os.path.split(path)
        if "\0" in path or file in ("", ".", "..") or os.path.islink(path):
            return None
        return os.path.join(self._real_folder(folder or "."), file)

    def _add(self, found: Found | Unusable, index: int, label: str) -> None:
        path = os.fsencode(found.path)
        if isinstance(found, Unusable):
            self._database.execute(
                "INSERT OR IGNORE INTO unusable VALUES (?, ?)", (path, found.reason)
            )
            return
        suffixed, stem = map(os.fsencode, safe_name(found.relative))
        front = os.fsencode(safe_folder(label or "photos"))
        real = hashlib.blake2b(os.fsencode(found.real), digest_size=16).digest()
        row = (real, index, front, found.is_link, suffixed, stem, path)
        self._database.execute(ADD, (*row, found.bytes, found.changed_ns))
        places = {found.real}
        if found.is_link:  # a link that is replaced is also a lost photo
            folder, name = os.path.split(found.path)
            places.add(os.path.join(os.path.realpath(folder), name))
        for place in places:
            below = self._below_out(place)
            if below is not None:
                self._database.execute(
                    "INSERT INTO inside VALUES (?, ?)", (os.fsencode(below), path)
                )

    def _below_out(self, real: str) -> str | None:
        """A real path (or URL) relative to `out`, where it lies below."""
        above = (self._local_out or self._remote_out or "").rstrip("/") + "/"
        return real[len(above) :] if real.startswith(above) else None

    def _is_output(self, below: str, folder: str, suffix: str) -> bool:
        if not (below.startswith(folder) and below.endswith(suffix)):
            return False
        name = os.fsencode(below[len(folder) : len(below) - len(suffix)])
        row = self._database.execute("SELECT 1 FROM photos WHERE name = ? LIMIT 1", (name,))
        return row.fetchone() is not None

    def _outputs_go_into(self, folder: str, kind: str) -> bool:
        """Whether outputs of a kind go into a folder of photos."""
        inside = f"{folder}/"
        if kind and kind.startswith(inside):
            return True
        if not inside.startswith(kind):
            return False
        start = os.fsencode(inside[len(kind) :])
        row = self._database.execute(
            "SELECT 1 FROM photos WHERE name >= ? AND name < ? LIMIT 1", (start, start[:-1] + b"0")
        )
        return row.fetchone() is not None


def _among_photos(out: str) -> str:
    return (
        f"{printable(out)} holds the photos, and masks among them would be taken for photos: "
        "give another --out, e.g. a new folder inside it"
    )
