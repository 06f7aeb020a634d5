"""Paths as text: for files that every reader of UTF-8 takes, and for messages of one line."""

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import PurePosixPath
from typing import BinaryIO

from srdeploy.errors import UserError
from srdeploy.files import explain_os_error
from srdeploy.imaging import PHOTO_SUFFIXES
from srdeploy.serve.folders.records import Unusable


def as_text(path: str) -> str:
    """The path; bytes that are no UTF-8 (surrogates in Python) as \\xff, so that one odd name does
    not make a file of a million unreadable."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def printable(path: str) -> str:
    """A path on one line, whatever is in its name."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in path
    )


# Globs such as photos/**/*.jpg, matched against paths that are found by a walk.


class GlobPattern:
    """The part of a glob behind its fixed folders."""

    def __init__(self, pattern: str) -> None:
        self._parts = tuple(part for part in pattern.split("/") if part not in ("", "."))
        # The folders of one photo are those of the next one.
        self._after = lru_cache(maxsize=1024)(self._step_through)

    def matches(self, relative: str) -> bool:
        """Whether a file's path, below the fixed part, is meant."""
        return len(self._parts) in self._after(relative, True)

    def may_hold(self, relative: str) -> bool:
        """Whether files in this folder may be meant."""
        return bool(self._after(relative, False))

    def _step_through(self, relative: str, is_file: bool) -> frozenset[int]:
        """How many parts of the pattern may have been used up after `relative`; for folders, only
        such that leave some."""
        states = self._opened({0})
        for name in relative.split("/"):
            reached = set()
            for state in states:
                if state < len(self._parts):
                    part = self._parts[state]
                    if part == "**":
                        reached.add(state)
                    elif fnmatchcase(name, part):
                        reached.add(state + 1)
            states = self._opened(reached)
        return frozenset(states if is_file else states - {len(self._parts)})

    def _opened(self, states: set[int]) -> set[int]:
        """With `**` standing for no folder at all; at the end it stands for any file."""
        opened = set(states)
        for state in sorted(states):
            while state < len(self._parts) and self._parts[state] == "**":
                state += 1
                opened.add(state)
        return opened


def split_glob(source: str, magic: str = "*?[") -> tuple[str, str] | None:
    """(folder before the first special character, pattern behind it); None where there is none."""
    parts = source.split("/")
    for index, part in enumerate(parts):
        if any(one in part for one in magic):
            fixed = "/".join(parts[:index])
            return fixed or ("/" if source.startswith("/") else "."), "/".join(parts[index:])
    return None


# Lists of paths, one a line or ended by zero bytes, of any length.

CHUNK = 1 << 16
LONGEST = 1 << 16
"""Bytes of a path; the systems that we know take 4096."""


@contextmanager
def open_list(path: str) -> Iterator[BinaryIO]:
    """A list file or a pipe. Raises UserError where it can't be opened, or never ends."""
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise UserError(
                f"{printable(path)} is no ordinary file: give a text file with one path a line"
            )
        file = open(path, "rb")  # noqa: SIM115  closed below; reading it raises elsewhere
    except (OSError, ValueError) as error:
        raise _explained(error, path) from error
    with file:
        yield file


def listed_paths(file: BinaryIO, name: str) -> Iterator[str]:
    """The paths in `file`, empty lines left out; what is too long for a path is cut, so that it
    is told as absent. Raises UserError where it can't be read."""
    try:
        yield from map(os.fsdecode, filter(None, _entries(file)))
    except OSError as error:
        raise _explained(error, name) from error


def _entries(file: BinaryIO) -> Iterator[bytes]:
    chunk = file.read(CHUNK).removeprefix(b"\xef\xbb\xbf")  # Windows editors write a mark
    separator = b"\0" if b"\0" in chunk else b"\n"
    rest = b""
    while chunk:
        *whole, last = chunk.split(separator)
        if whole:
            whole[0] = rest + whole[0]
            rest = last
        else:
            rest += last
        yield from (_trimmed(one, separator) for one in whole)
        rest = rest[:LONGEST]
        chunk = file.read(CHUNK)
    yield _trimmed(rest, separator)


def _trimmed(entry: bytes, separator: bytes) -> bytes:
    return entry.removesuffix(b"\r") if separator == b"\n" else entry


def _explained(error: OSError | ValueError, path: str) -> UserError:
    if isinstance(error, OSError):
        return explain_os_error(error, printable(path))
    return UserError(f"{printable(path)}: not a path")


# Photos below a local folder, whatever else lies there: loops, broken links, pipes, locked
# folders.


@dataclass(frozen=True)
class Found:
    """A file that counts as a photo."""

    path: str
    relative: str
    """Below its source, with its suffix."""
    real: str
    """Equal for two paths of one file."""
    is_link: bool
    bytes: int
    changed_ns: int


def is_photo_name(name: str) -> bool:
    """Whether files of that name count inside folders."""
    return os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES


def look_at(path: str, relative: str, real: str | None = None) -> Found | Unusable:
    """One path that should be a photo. It is not opened. real: where it is known, and no link."""
    try:
        status = os.stat(path)
        is_link = real is None and os.path.islink(path)
        real = real or os.path.realpath(path)
    except (OSError, ValueError) as error:
        return Unusable(path, _why_not(error, path))
    if stat.S_ISREG(status.st_mode):
        return Found(path, relative, real, is_link, status.st_size, status.st_mtime_ns)
    return Unusable(path, _what_it_is(status.st_mode))


def walk(
    source: str, out: str | None, pattern: GlobPattern | None = None
) -> Iterator[Found | Unusable]:
    """Photos below the folder `source`, in no order.

    Links to folders are followed, after all folders that are none; each real folder is listed once.
    Hidden files and folders, and the real folder `out`, are passed over; so is what `pattern`
    does not match. Raises UserError where `source` itself can't be listed.
    """
    try:
        os.scandir(source).close()
    except OSError as error:
        raise explain_os_error(error, printable(source)) from error
    visited: set[str] = set()
    folders = [(source, "")]
    links: deque[tuple[str, str]] = deque()
    while folders or links:
        # Links come last, so that a folder keeps its own name where a link leads to it, too.
        path, below = folders.pop() if folders else links.popleft()
        real = os.path.realpath(path)
        if real in visited or real == out:
            continue
        visited.add(real)
        deeper: list[tuple[str, str]] = []
        linked: list[tuple[str, str]] = []
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    relative = below + entry.name
                    if _is_folder(entry):
                        if pattern is not None and not pattern.may_hold(relative):
                            continue
                        if not entry.is_symlink():
                            deeper.append((entry.path, relative + "/"))
                        elif _leads_up(entry.path, real):
                            yield Unusable(
                                entry.path, "a link to a folder above it: it is not followed again"
                            )
                        else:
                            linked.append((entry.path, relative + "/"))
                    elif _counts(entry) and (pattern is None or pattern.matches(relative)):
                        known = None if entry.is_symlink() else f"{real.rstrip('/')}/{entry.name}"
                        yield look_at(entry.path, relative, known)
        except OSError as error:
            yield Unusable(path, _why_no_list(error))
        folders += sorted(deeper, reverse=True)
        links += sorted(linked)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # e.g. a link to itself: told when it is looked at
        return False


def _counts(entry: os.DirEntry[str]) -> bool:
    """Photos by name, and broken links that may have led to folders of photos."""
    if is_photo_name(entry.name):
        return True
    if PurePosixPath(entry.name).suffix or not entry.is_symlink():
        return False
    return not os.path.exists(entry.path)


def _leads_up(link: str, real_folder: str) -> bool:
    target = os.path.realpath(link)
    return real_folder == target or real_folder.startswith(target.rstrip("/") + "/")


def _why_not(error: OSError | ValueError, path: str) -> str:
    """Why a file can't be looked at, and what to do."""
    if isinstance(error, ValueError):
        return "not a path: it has a zero byte or is not text"
    if error.errno == errno.ELOOP:
        return "a link that leads to itself: remove it"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if os.path.islink(path):
            return "a link to a file that is not there: restore the file, or remove the link"
        return "no such file: check the path"
    if isinstance(error, PermissionError):
        return "no permission to look at it: check the modes of the folders above it"
    if error.errno == errno.ENAMETOOLONG:
        return "its path is too long: move it up"
    return f"can't be looked at: {error.strerror or error}"


def _why_no_list(error: OSError) -> str:
    """Why a folder can't be listed, and what to do."""
    if isinstance(error, PermissionError):
        return "no permission to list this folder: check its owner and mode"
    if isinstance(error, FileNotFoundError):
        return "the folder went away while it was listed: run again"
    if error.errno == errno.ENAMETOOLONG:
        return "the folder's path is too long: move it up"
    return f"the folder can't be listed: {error.strerror or error}"


def _what_it_is(mode: int) -> str:
    """What is no ordinary file."""
    if stat.S_ISDIR(mode):
        return "a folder where a file is expected: give it as a source of its own"
    if stat.S_ISFIFO(mode):
        return "a named pipe, not a photo: remove it"
    if stat.S_ISSOCK(mode):
        return "a socket, not a photo: remove it"
    return "a device, not a photo: remove it"


def source_error(unusable: Unusable) -> UserError:
    """Something that was named by itself and can't be used."""
    if unusable.reason.startswith("no such file"):
        return UserError(f"no such file or folder: {printable(unusable.path)}")
    return UserError(f"{printable(unusable.path)}: {unusable.reason}")
