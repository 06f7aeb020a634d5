"""Photos on remote file systems, by fsspec."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from srdeploy.errors import UserError
from srdeploy.serve.folders.records import Unusable
from srdeploy.serve.folders.stores import explain_remote_error, file_system_of
from srdeploy.serve.folders.walk import Found, GlobPattern, is_photo_name, printable, split_glob

DEEPEST = 100
"""Folders within folders; with more, links lead round in a circle."""
TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""What drivers call the time of the last change."""


def canonical(url: str) -> str:
    """As photos below `url` are called: the driver's form, without a slash at the end. Raises
    UserError where there is no driver."""
    files, path = _opened(url)
    return str(files.unstrip_protocol(path)).rstrip("/")


def find_remote(source: str, out: str | None) -> Iterator[Found | Unusable]:
    """The file `source`, or the photos below the folder or glob `source`. The canonical
    URL `out`, and hidden files, are passed over. Raises UserError where `source` itself
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
                    reason = "folders are nested too deep here: is there a link in a circle?"
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


def _opened(url: str) -> tuple[Any, str]:
    """(file system, path on it). Raises UserError where there is no driver."""
    files, path = file_system_of(url)
    # Cached lists would tell of what was there an hour ago, and grow with the folder.
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
