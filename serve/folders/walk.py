"""Finds photos below folders, local or remote, whatever else is there: link loops, broken links,
pipes, locked folders."""

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from srdeploy.errors import UserError
from srdeploy.files import explain_os_error
from srdeploy.imaging import PHOTO_SUFFIXES
from srdeploy.serve.folders.paths import (
    GlobPattern,
    explain_remote_error,
    file_system_of,
    printable,
    split_glob,
)
from srdeploy.serve.folders.records import Unusable

DEEPEST = 100
"""Folders within folders; deeper ones are links in a circle."""
TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""Names that drivers give to the time of the last change."""


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
    """Whether a file of that name counts as a photo inside folders."""
    return os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES


def look_at(path: str, relative: str, real: str | None = None) -> Found | Unusable:
    """One path that should be a photo. It is not opened. real: if known, and no link."""
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

    Links to folders are followed after all real folders; each real folder is listed once. Hidden
    files and folders, the real folder `out`, and what `pattern` does not match are skipped. Raises
    UserError if `source` itself can't be listed.
    """
    try:
        os.scandir(source).close()
    except OSError as error:
        raise explain_os_error(error, printable(source)) from error
    visited: set[str] = set()
    folders = [(source, "")]
    links: deque[tuple[str, str]] = deque()
    while folders or links:
        # Links come last, so that a folder keeps its own name where a link also leads to it.
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


def find_remote(source: str, out: str | None) -> Iterator[Found | Unusable]:
    """The file `source`, or the photos below the folder or glob `source`. The canonical
    URL `out`, and hidden files, are skipped. Raises UserError where `source` itself
    can't be looked at."""
    split = None if source.startswith("http") else split_glob(source, "*")
    fixed, pattern = (source, None) if split is None else (split[0], GlobPattern(split[1]))
    files, path = _opened(fixed)
    try:
        about = files.info(path) if path.strip("/") else {"type": "directory"}
    except Exception as error:  # each driver has errors of its own
        raise UserError(f"{printable(fixed)}: {explain_remote_error(error)}") from error
    if about["type"] != "directory":
        if pattern is None:
            yield _found(files, about, path.rstrip("/").rpartition("/")[2])
        return
    folders = [(path, "", 0)]
    visited: set[str] = set()
    while folders:
        folder, below, depth = folders.pop()
        url = files.unstrip_protocol(folder).rstrip("/")
        if url in visited or url == out:
            continue
        visited.add(url)
        try:
            entries = files.ls(folder, detail=True)
        except Exception as error:
            if not below:
                raise UserError(f"{printable(source)}: {explain_remote_error(error)}") from error
            yield Unusable(url, f"the folder can't be listed: {explain_remote_error(error)}")
            continue
        for about in sorted(entries, key=lambda entry: str(entry["name"]), reverse=True):
            name = str(about["name"]).rstrip("/").rpartition("/")[2]
            # Object stores list a folder's own marker inside it.
            itself = str(about["name"]).strip("/") == folder.strip("/")
            if itself or not name or name.startswith("."):
                continue
            relative = below + name
            if about["type"] == "directory":
                if pattern is not None and not pattern.may_hold(relative):
                    continue
                if depth == DEEPEST:
                    reason = "folders are nested too deep here: look for a link in a circle"
                    yield Unusable(files.unstrip_protocol(about["name"]), reason)
                else:
                    folders.append((about["name"], relative + "/", depth + 1))
            elif is_photo_name(name) and (pattern is None or pattern.matches(relative)):
                yield _found(files, about, relative)


def look_at_remote(url: str, relative: str) -> Found | Unusable:
    """One file of a list."""
    try:
        files, path = _opened(url)
        return _found(files, files.info(path), relative)
    except UserError as error:
        return Unusable(url, str(error).removeprefix(f"{printable(url)}: "))
    except Exception as error:
        return Unusable(url, explain_remote_error(error))


def canonical(url: str) -> str:
    """The form in which the driver names `url`, without a slash at the end. Raises UserError if
    there is no driver."""
    files, path = _opened(url)
    return str(files.unstrip_protocol(path)).rstrip("/")


def source_error(unusable: Unusable) -> UserError:
    """The error for a source that was named directly and can't be used."""
    if unusable.reason.startswith("no such file"):
        return UserError(f"no such file or folder: {printable(unusable.path)}")
    return UserError(f"{printable(unusable.path)}: {unusable.reason}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # e.g. a link to itself: reported when it is looked at
        return False


def _counts(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a photo by name, or a broken link that may have led to a folder."""
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
    """What a path is that is not an ordinary file."""
    if stat.S_ISDIR(mode):
        return "a folder where a file is expected: give it as a source of its own"
    if stat.S_ISFIFO(mode):
        return "a named pipe, not a photo: remove it"
    if stat.S_ISSOCK(mode):
        return "a socket, not a photo: remove it"
    return "a device, not a photo: remove it"


def _opened(url: str) -> tuple[Any, str]:
    """(file system, path on it). Raises UserError where there is no driver."""
    files, path = file_system_of(url)
    # Cached lists would be an hour old, and grow with the folder.
    files.invalidate_cache()
    return files, path


def _found(files: Any, about: dict[str, Any], relative: str) -> Found | Unusable:
    url = files.unstrip_protocol(about["name"])
    if about["type"] == "directory":
        return Unusable(url, "a folder where a file is expected: give it as a source of its own")
    if about["type"] not in ("file", "link"):
        return Unusable(url, f"not a file, but {about['type']}")
    return Found(url, relative, url, False, int(about.get("size") or 0), _changed_ns(about))


def _changed_ns(about: dict[str, Any]) -> int:
    for key in TIMES:
        value = about.get(key)
        if isinstance(value, datetime):
            return int(value.timestamp() * 1e9)
        if isinstance(value, int | float):
            return int(value * 1e9)
    return 0
