"""Paths, URLs, globs and lists of paths, whatever is in a name."""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, BinaryIO

from srdeploy.errors import UserError
from srdeploy.files import explain_os_error

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[^/]*)?://")
CHUNK = 1 << 16
"""Bytes of a list that are read at once."""
LONGEST_PATH = 1 << 16
"""Bytes; known systems take 4096."""


def as_text(path: str) -> str:
    """The path as UTF-8 text for files: other bytes (surrogates in Python) become \\xff, so that
    one odd name does not make a file of a million unreadable."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def printable(path: str) -> str:
    """A path on one line for messages, whatever is in its name."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in path
    )


def is_url(path: str) -> bool:
    """Whether `path` names a place on another file system, e.g. s3://bucket/folder; file:// is
    local, but also a URL."""
    return _SCHEME.match(path) is not None


def local_path(url: str) -> str | None:
    """The path in a file:// URL, which is taken as it stands; None for others."""
    scheme, _, rest = url.partition("://")
    return rest if scheme.lower() in ("file", "local") else None


def file_system_of(url: str) -> tuple[Any, str]:
    """(fsspec file system, path on it). Raises UserError where there is no such file system,
    its driver is missing, or it can't be reached."""
    try:
        import fsspec
    except ImportError as error:
        raise UserError(
            f"{url} needs fsspec, which is not installed: pip install fsspec"
        ) from error
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:  # fsspec's message names the package
        raise UserError(f"{url} needs a driver: {_one_line(error)}") from error
    except Exception as error:  # drivers raise what their libraries raise
        raise UserError(f"{url} can't be opened: {_one_line(error)}") from error
    return system, str(path)


def explain_remote_error(error: Exception) -> str:
    """A driver's error in one line; drivers raise errors of many libraries."""
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, PermissionError):
        return f"no permission ({_one_line(error)})"
    if isinstance(error, NotImplementedError):
        return "its file system can't do that"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _one_line(error)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:300]


class GlobPattern:
    """The part of a glob after its fixed folders, e.g. **/*.jpg; it matches paths of a walk."""

    def __init__(self, pattern: str) -> None:
        self._parts = tuple(part for part in pattern.split("/") if part not in ("", "."))
        # The folders of one photo are those of the next one.
        self._after = lru_cache(maxsize=1024)(self._step_through)

    def matches(self, relative: str) -> bool:
        """Whether a file's path, relative to the fixed part, matches."""
        return len(self._parts) in self._after(relative, True)

    def may_hold(self, relative: str) -> bool:
        """Whether files in this folder may match."""
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
        """Adds the states in which `**` matches no folder; at the end it matches any file."""
        opened = set(states)
        for state in sorted(states):
            while state < len(self._parts) and self._parts[state] == "**":
                state += 1
                opened.add(state)
        return opened


def split_glob(source: str, magic: str = "*?[") -> tuple[str, str] | None:
    """(folder before the first special character, pattern after it); None where there is none."""
    parts = source.split("/")
    for index, part in enumerate(parts):
        if any(one in part for one in magic):
            fixed = "/".join(parts[:index])
            return fixed or ("/" if source.startswith("/") else "."), "/".join(parts[index:])
    return None


@contextmanager
def open_list(path: str) -> Iterator[BinaryIO]:
    """A file or pipe with paths. Raises UserError if it can't be opened, or never ends."""
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
    """The paths in `file`, one a line or separated by zero bytes, without empty ones. Entries too
    long for a path are cut, so that they are reported as absent. Raises UserError if it can't be
    read."""
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
        rest = rest[:LONGEST_PATH]
        chunk = file.read(CHUNK)
    yield _trimmed(rest, separator)


def _trimmed(entry: bytes, separator: bytes) -> bytes:
    return entry.removesuffix(b"\r") if separator == b"\n" else entry


def _explained(error: OSError | ValueError, path: str) -> UserError:
    if isinstance(error, OSError):
        return explain_os_error(error, printable(path))
    return UserError(f"{printable(path)}: not a path")
