"""Photos on remote file systems, by fsspec."""

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from srdeploy.errors import UserError
from srdeploy.serve.folders.glob_pattern import GlobPattern, split_glob
from srdeploy.serve.folders.photo import Unusable
from srdeploy.serve.folders.summary import printable
from srdeploy.serve.folders.walk import Found, is_photo_name

DEEPEST = 100
"""Folders within folders; with more, links lead round in a circle."""
TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""What drivers call the time of the last change."""


def is_url(path: str) -> bool:
    """Whether `path` is on a file system that fsspec opens."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::[^/]*)?://", path) is not None


def local_path(url: str) -> str | None:
    """The path in a file:// URL; None for others."""
    scheme, _, rest = url.partition("://")
    return rest if scheme.lower() in ("file", "local") else None


def find_remote(source: str, out: str) -> Iterator[Found | Unusable]:
    """The file `source`, or the photos below the folder or glob `source`. `out`, if it is there,
    and hidden files are passed over. Raises UserError where `source` itself can't be looked at."""
    split = None if source.startswith("http") else split_glob(source, "*")
    fixed, pattern = (source, None) if split is None else (split[0], GlobPattern(split[1]))
    files, path = _opened(fixed, source)
    try:
        about = files.info(path) if path.strip("/") else {"type": "directory"}
    except Exception as error:  # each driver has errors of its own
        raise UserError(f"{printable(fixed)}: {_why(error)}") from error
    if about["type"] != "directory":
        if pattern is None:
            yield _found(files, about, path.rstrip("/").rpartition("/")[2])
        return
    passed_over = out.rstrip("/")
    folders = [(path, "", 0)]
    visited: set[str] = set()
    while folders:
        folder, below, depth = folders.pop()
        url = files.unstrip_protocol(folder).rstrip("/")
        if url in visited or url == passed_over:
            continue
        visited.add(url)
        try:
            entries = files.ls(folder, detail=True)
        except Exception as error:
            if not below:
                raise UserError(f"{printable(source)}: {_why(error)}") from error
            yield Unusable(url, f"the folder can't be listed: {_why(error)}")
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
                    reason = "folders are nested too deep here: is there a link in a circle?"
                    yield Unusable(files.unstrip_protocol(about["name"]), reason)
                else:
                    folders.append((about["name"], relative + "/", depth + 1))
            elif is_photo_name(name) and (pattern is None or pattern.matches(relative)):
                yield _found(files, about, relative)


def look_at_remote(url: str, relative: str) -> Found | Unusable:
    """One file of a list."""
    try:
        files, path = _opened(url, url)
        return _found(files, files.info(path), relative)
    except UserError as error:
        return Unusable(url, str(error).removeprefix(f"{printable(url)}: "))
    except Exception as error:
        return Unusable(url, _why(error))


def _opened(url: str, source: str) -> tuple[Any, str]:
    """(file system, path on it). Raises UserError where there is no driver."""
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
        # Cached lists would tell of what was there an hour ago, and grow with the folder.
        files.invalidate_cache()
        return files, str(path)
    except ImportError as error:
        raise UserError(
            f"{printable(source)}: its file system needs a package that is not installed: "
            f"{_first_line(error)}"
        ) from error
    except Exception as error:
        raise UserError(f"{printable(source)}: {_why(error)}") from error


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


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, PermissionError):
        return "no permission: check the credentials"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return printable(lines[0]) if lines else type(error).__name__
