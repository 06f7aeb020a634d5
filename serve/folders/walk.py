"""Photos below a local folder, whatever else lies there: loops, broken links, pipes, locked
folders."""

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from srdeploy.errors import UserError
from srdeploy.files import explain_os_error
from srdeploy.imaging import PHOTO_SUFFIXES
from srdeploy.serve.folders.glob_pattern import GlobPattern
from srdeploy.serve.folders.photo import Unusable
from srdeploy.serve.folders.text import printable


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
